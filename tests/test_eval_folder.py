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
from trainer.rollout_client import RolloutClient, ServerGone

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
    serve, held, out = CheckpointSync.serve, [], tmp_path / "eval" / "samples"

    def then_look(self: CheckpointSync, *given: Any) -> None:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        held.append([f for f in map(os.path.realpath, links) if f.startswith(str(out))])
        serve(self, *given)

    monkeypatch.setattr(CheckpointSync, "serve", then_look)
    points = ("--checkpoints", "none=served", f"soft={other}", f"hard={model}")
    assert main(command(server.url, model, tmp_path / "eval", *points)) == 0
    assert held == [[], []]


# ---- refused before there is anything ------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "eval"])
def test_a_file_in_the_folders_place_is_named(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any, below: str
) -> None:
    file = tmp_path / "file"
    file.write_text("a file")
    arguments = command(server.url, model, tmp_path / "eval")
    arguments[arguments.index("--out") + 1] = str(file / below)
    assert main(arguments) == 1
    assert f"--out {file / below}: {file} is no folder" in capsys.readouterr().err
    assert not server.calls


@pytest.mark.parametrize(
    "given",
    [
        ("--checkpoints", "soft=/nowhere"),
        ("--settings", "no-such-setting"),
        ("--restore", "/nowhere"),
    ],
)
def test_refused_arguments_leave_no_folder(
    server: EvalServer, model: Path, tmp_path: Path, given: tuple[str, ...]
) -> None:
    assert main(command(server.url, model, tmp_path / "eval", *given)) == 1
    assert not (tmp_path / "eval").exists()


def test_a_run_that_was_refused_before_its_first_sample_binds_the_next_one_to_nothing(
    server: EvalServer, model: Path, other: Path, tmp_path: Path
) -> None:
    given = ("--checkpoints", f"soft={other}", "--seed")
    server.trouble.refuse_weights = "bad shape"
    assert main(command(server.url, model, tmp_path / "eval", *given, "1")) == 1
    assert main(command(server.url, model, tmp_path / "eval", *given, "2")) == 0


# ---- reported without its server -----------------------------------------------------------------


def test_a_finished_evaluation_is_reported_without_its_server(
    model: Path, other: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "eval"
    points = ("--checkpoints", "none=served", f"soft={other}")
    with EvalServer(model) as server:
        arguments = command(server.url, model, out, *points)
        assert main(arguments) == 0
    before = (out / "results.json").read_bytes()
    (out / "results.json").unlink()
    assert main(arguments) == 0
    assert "does not answer; no sample is missing" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before
    # Whatever needs the server waits for it, and says so in the end.
    for more in (("--samples", "4"), ("--restore", str(model))):
        assert main([*arguments, "--retry-for", "0", *more]) == 1
        error = capsys.readouterr().err
        assert f"stopped: {server.url}/v1/cot/info does not answer" in error
    assert main([*arguments, "--seed", "1"]) == 1
    assert "made with other settings (seed: 0 -> 1)" in capsys.readouterr().err


def test_a_server_that_is_late_for_missing_samples_is_waited_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "eval"
    with EvalServer(model) as server:
        assert main(command(server.url, model, out)) == 0
        call, tried = RolloutClient.call, []

        def late(self: RolloutClient, method: str, path: str, **more: Any) -> Any:
            tried.append(path)
            if len(tried) == 1:
                raise ServerGone("not there yet")
            return call(self, method, path, **more)

        monkeypatch.setattr(RolloutClient, "call", late)
        assert main(command(server.url, model, out, "--samples", "4")) == 0
    assert len(server.samples_sent) == 24 + 6


def test_the_record_does_not_hide_that_another_server_answers(
    model: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "eval"
    with EvalServer(model) as server:
        assert main(command(server.url, model, out)) == 0
    with EvalServer(model, dtype="bfloat16") as server:
        assert main(command(server.url, model, out)) == 1
    assert "made with other settings (server: " in capsys.readouterr().err
