"""Wherever a run is killed, it goes on as the uninterrupted one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rl_dies
from fake_rollout_server import FakeRolloutServer
from rl_fixtures import assert_same_weights, fake_server, surroundings, tiny_model
from rl_runs import REPOSITORY, arguments, learned, train
from trainer_rollouts import single_thread

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
model = pytest.fixture(tiny_model, scope="module")
server = pytest.fixture(fake_server)
around = pytest.fixture(surroundings, autouse=True)


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
        assert_same_weights(undisturbed / name, run / name)
    assert not [path for path in run.rglob(".*") if path.is_dir()]


@pytest.mark.parametrize("new_is_there", [False, True])
def test_the_best_model_outlives_a_kill_between_its_two_renames(
    server: FakeRolloutServer, model: Path, tmp_path: Path, new_is_there: bool
) -> None:
    run = tmp_path / "run"
    settings = {**SETTINGS, "steps": 1}
    train(model, run, server.url, **settings)
    shutil.copytree(run / "best", tmp_path / "best")
    if new_is_there:
        shutil.copytree(run / "best", run / ".best.old")
    else:
        os.rename(run / "best", run / ".best.old")
    train(model, run, server.url, **settings, resume=True)
    assert_same_weights(tmp_path / "best", run / "best")
    assert not (run / ".best.old").exists()
