"""The evaluation's own folder: what it holds, what is left alone, and what it needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from eval_runs import EvalServer, command, eval_server
from rl_fixtures import other_model, surroundings, tiny_model
from trainer_rollouts import single_thread

from trainer.eval.__main__ import main
from trainer.eval.checkpoints import CheckpointSync
from trainer.eval.sampling import LINKS

threads = pytest.fixture(single_thread, autouse=True, scope="module")
model = pytest.fixture(tiny_model, scope="module")
other = pytest.fixture(other_model, scope="module")
server = pytest.fixture(eval_server)
around = pytest.fixture(surroundings, autouse=True)


def test_files_of_others_in_the_folder_are_left_alone(
    server: EvalServer, model: Path, other: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"  # a trainer's, whose weights travel through `weights`
    theirs = [out / "weights" / "step-7" / "a.safetensors", out / LINKS / "b.safetensors"]
    for file in theirs:
        file.parent.mkdir(parents=True)
        file.write_text("precious")
    points = ("--checkpoints", f"soft={other}", "--restore", str(model))
    assert main(command(server.url, model, out, *points)) == 0
    assert [file.read_text() for file in theirs] == ["precious"] * 2
    assert [file.name for file in (out / LINKS).iterdir()] == ["b.safetensors"]


def test_no_links_stay_behind(server: EvalServer, model: Path, other: Path, tmp_path: Path) -> None:
    points = ("--checkpoints", f"soft={other}", "--restore", str(model))
    assert main(command(server.url, model, tmp_path / "eval", *points)) == 0
    assert len(server.versions) == 2
    assert not (tmp_path / "eval" / LINKS).exists()


def test_a_checkpoints_files_are_closed_before_the_next_is_served(
    server: EvalServer, model: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, held = CheckpointSync.serve, []

    def then_look(self: CheckpointSync, *given: Any) -> None:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        held.append([f for f in map(os.path.realpath, links) if f.endswith(".jsonl")])
        serve(self, *given)

    monkeypatch.setattr(CheckpointSync, "serve", then_look)
    points = ("--checkpoints", "none=served", f"soft={other}", f"hard={model}")
    assert main(command(server.url, model, tmp_path / "eval", *points)) == 0
    assert held == [[], []]
