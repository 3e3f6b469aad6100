"""Wherever a run is killed, it goes on as the uninterrupted one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rl_dies
import torch
from fake_rollout_server import FakeRolloutServer
from rl_runs import REPOSITORY, arguments, learned, train
from tiny_models import tiny_llama
from trainer_rollouts import single_thread
from transformers import AutoModelForCausalLM

from trainer import rollout_client

SETTINGS: dict[str, Any] = {
    "steps": 3,
    "checkpoint.every": 1,
    "validation.every": 1,
    "validation.problems": 2,
}
POINTS = {
    "weights arrive, the step's line is not written": ("trainer.logging:Journal.step", 2),
    "the line is written, nothing is validated": ("trainer.rl:validate", 3),
    "the best model is written and has no name yet": ("trainer.checkpoint:_name_dtype", 1),
    "the checkpoint's tensors are written": ("trainer.checkpoint:_sync", 4),
    "the checkpoint has no name yet": ("trainer.checkpoint:_sync", 5),
    "a checkpoint too many is not removed": ("trainer.checkpoint:whole", 5),
    "weights are being sent": ("trainer.sync.folder:write_weights", 3),
}


threads = pytest.fixture(single_thread, autouse=True, scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def server(model: Path) -> Iterator[FakeRolloutServer]:
    with FakeRolloutServer(model) as server:
        yield server


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_client, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Metrics and folder of the run that nobody disturbs."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch, FakeRolloutServer(model) as server:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        return learned(train(model, run, server.url, **SETTINGS)), run


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_any_point_ends_as_the_undisturbed_one(
    server: FakeRolloutServer,
    model: Path,
    tmp_path: Path,
    expected: tuple[Any, Path],
    point: str,
) -> None:
    rows, undisturbed = expected
    place, nth = POINTS[point]
    run = tmp_path / "run"
    given = arguments(model, run, server.url, **SETTINGS)
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))
    died = subprocess.run(
        [sys.executable, str(Path(rl_dies.__file__)), place, str(nth), *given],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert died.returncode == rl_dies.CODE, died.stdout + died.stderr
    assert learned(train(model, run, server.url, **SETTINGS, resume=True)) == rows
    for name in ("final", "best"):
        one, other = weights_of(undisturbed / name), weights_of(run / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not [path for path in run.rglob(".*") if path.is_dir()]
