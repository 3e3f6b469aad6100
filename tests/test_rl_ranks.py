"""Whole runs under torchrun: two processes learn what one learns, and take over from each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_rollout_server import FakeRolloutServer
from rl_runs import REPOSITORY, arguments, train
from tiny_models import tiny_llama
from trainer_rollouts import single_thread
from transformers import AutoModelForCausalLM

from trainer.config import Config, ModelConfig, SyncConfig
from trainer.logging import read_metrics
from trainer.ranks import Ranks
from trainer.setup import require_one_process

threads = pytest.fixture(single_thread, autouse=True, scope="module")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the reward's workers


def train_in_two(
    model: Path, run: Path, url: str | None, **settings: Any
) -> list[dict[str, float]]:
    """The same as `train`, by two processes."""
    path = os.pathsep.join((str(Path(__file__).parent), str(REPOSITORY)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [sys.executable, *command, "trainer.rl", "--", *arguments(model, run, url, **settings)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(run)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_two_processes_go_on_as_one_would(tmp_path: Path) -> None:
    """From one process's checkpoint, on the same rollouts: losses, gradients and weights agree."""
    model = tiny_llama(tmp_path / "model", tied=False)
    one, two, tape = (tmp_path / name for name in ("one", "two", "tape"))
    settings: dict[str, Any] = {
        "micro-batch-tokens": 64,
        "optim.schedule": "constant",
        "objective.kl-coef": 0.1,
        "objective.soft-dims": "mean",
        "objective.ratio": "clip",
    }
    with FakeRolloutServer(model) as server:
        expected = train(model, one, server.url, record=tape, **settings)
    train(model, two, None, replay=tape, steps=1, **settings)
    rows = train_in_two(model, two, None, replay=tape, resume=True, **settings)
    assert len(rows) == len(expected) == 3
    for left, right in zip(expected, rows):
        for name in ("loss/total", "grad/norm", "policy/kl", "agree/gaussian_distance"):
            assert right[name] == pytest.approx(left[name], rel=1e-4, abs=1e-6), name
    weights, others = (weights_of(folder / "final") for folder in (one, two))
    assert all((weights[name] - others[name]).abs().max() < 1e-5 for name in weights)


def test_two_processes_train_with_a_server(tmp_path: Path) -> None:
    """In bfloat16: probe, validation, new weights to the server, and the model that is left."""
    model = tiny_llama(tmp_path / "model")
    settings: dict[str, Any] = {
        "model.dtype": "bfloat16",
        "steps": 2,
        "rollout.max-staleness": 1,
        "objective.ratio": "clip",
        "validation.every": 1,
        "validation.problems": 2,
    }
    run = tmp_path / "two"
    with FakeRolloutServer(model) as server:
        one = train(model, tmp_path / "one", server.url, **settings)
        server.restart()
        two = train_in_two(model, run, server.url, **settings)
        served = server.oracle.model.state_dict()
        assert server.version.endswith("-000002")
    left, right = (next(r for r in rows if "grad/norm" in r) for rows in (one, two))
    assert left["reward/mean"] == right["reward/mean"]
    for name in ("grad/norm", "agree/gaussian_distance", "agree/hard_kl"):
        assert right[name] == pytest.approx(left[name], rel=0.05), name
    kept = weights_of(run / "final")
    assert {weight.dtype for weight in kept.values()} == {torch.bfloat16}
    assert all(torch.equal(weight.float(), served[name]) for name, weight in kept.items())
    assert json.loads((run / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (run / "best" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": ModelConfig(lora_rank=4)}, "LoRA trains in one process"),
        ({"sync": SyncConfig(method="nccl")}, "sync.method = safetensors"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        require_one_process(Config(**settings), Ranks(rank=1, size=2))
