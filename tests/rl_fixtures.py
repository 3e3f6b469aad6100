"""What tests against the fake rollout server begin with; made fixtures where they are used:

model = pytest.fixture(tiny_model, scope="module")
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_rollout_server import FakeRolloutServer
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from trainer import patience


def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "other", seed=1)


def fake_server(model: Path) -> Iterator[FakeRolloutServer]:
    with FakeRolloutServer(model) as server:
        yield server


def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)


def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, and worker processes that find the tests' rewards."""
    short_waits(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = weights_of(one), weights_of(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
