"""Folders whose weights are replaced while an evaluation runs: no sample gets a wrong name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_runs import EvalServer, command, eval_server, rows_of
from rl_fixtures import other_model, surroundings, tiny_model
from trainer_rollouts import single_thread

from softvllm.core.fingerprint import fingerprint
from trainer.eval import likelihood
from trainer.eval.__main__ import main
from trainer.rollout_client import RolloutClient

threads = pytest.fixture(single_thread, autouse=True, scope="module")
model = pytest.fixture(tiny_model, scope="module")
other = pytest.fixture(other_model, scope="module")
server = pytest.fixture(eval_server)
around = pytest.fixture(surroundings, autouse=True)


def replace(folder: Path, source: Path) -> None:
    """As a trainer writes a new `best`: other files under the old names."""
    shutil.rmtree(folder)
    shutil.copytree(source, folder)


def meanwhile(
    monkeypatch: pytest.MonkeyPatch, server: EvalServer, number: int, act: Callable[[], None]
) -> None:
    """Do something when the server is about to make its sample of this number."""
    sample, sent = server._sample, []

    def then(*given: Any) -> Any:
        sent.append(given)
        if len(sent) == number:
            act()
        return sample(*given)

    monkeypatch.setattr(server, "_sample", then)


@pytest.fixture
def best(other: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(other, tmp_path / "best"))


def test_a_checkpoint_replaced_before_its_turn_is_not_sampled(
    server: EvalServer, model: Path, best: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    before = fingerprint(best)
    meanwhile(monkeypatch, server, 5, lambda: replace(best, model))
    points = ("--checkpoints", "none=served", f"soft={best}")
    assert main(command(server.url, model, tmp_path / "eval", *points)) == 1
    error = capsys.readouterr().err
    assert f"{best} changed since the evaluation began" in error
    assert f"{before} -> {fingerprint(model)}" in error and "a copy of it" in error
    assert server.versions == []
    assert not rows_of(tmp_path / "eval", "soft/sums/soft-sample")


def test_a_checkpoint_that_is_gone_at_its_turn_says_so(
    server: EvalServer, model: Path, best: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    meanwhile(monkeypatch, server, 5, lambda: shutil.rmtree(best))
    points = ("--checkpoints", "none=served", f"soft={best}")
    assert main(command(server.url, model, tmp_path / "eval", *points)) == 1
    assert f"{best} changed since the evaluation began" in capsys.readouterr().err


def test_a_restarted_server_is_not_given_a_replaced_checkpoint(
    server: EvalServer, model: Path, other: Path, best: Path, tmp_path: Path, capsys: Any
) -> None:
    def replaced_and_restarted() -> None:
        replace(best, model)
        server.restart()
        raise ConnectionResetError("server died")

    out, points = tmp_path / "eval", ("--checkpoints", f"soft={best}")
    with pytest.MonkeyPatch.context() as patch:
        meanwhile(patch, server, 8, replaced_and_restarted)
        assert main(command(server.url, model, out, *points)) == 1
    assert f"{best} changed since the evaluation began" in capsys.readouterr().err
    assert len(server.versions) == 1  # of the first push
    # With the old weights back, the same command goes on to samples of one model.
    replace(best, other)
    for folder in (out, tmp_path / "calm"):
        assert main(command(server.url, model, folder, *points)) == 0
    names = ("eval", "calm")
    left, right = ((tmp_path / name / "results.json").read_text() for name in names)
    assert left == right


def test_weights_replaced_while_the_server_reads_them_do_not_come_into_service(
    server: EvalServer, model: Path, best: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    call = RolloutClient.call

    def then_replace(self: RolloutClient, method: str, path: str, **more: Any) -> Any:
        if path == "/update_weights":
            replace(best, model)
        return call(self, method, path, **more)

    monkeypatch.setattr(RolloutClient, "call", then_replace)
    points = ("--checkpoints", f"soft={best}")
    assert main(command(server.url, model, tmp_path / "eval", *points)) == 1
    assert f"{best} changed since the evaluation began" in capsys.readouterr().err
    assert server.versions == [] and not server._started  # given up, not left open


@pytest.mark.parametrize("which", ["checkpoint", "base"])
def test_likelihoods_are_not_those_of_a_replaced_folder(
    model: Path, best: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, which: str
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "one two three"}\n')
    load = likelihood.load_model

    def replaced_before(path: str, config: Any) -> Any:
        if path == str(best):
            replace(best, model)
        return load(path, config)

    monkeypatch.setattr(likelihood, "load_model", replaced_before)
    out = tmp_path / "eval"
    base, point = (model, best) if which == "checkpoint" else (best, model)
    arguments = ["--kl.texts", str(texts), "--model.path", str(base), "--out", str(out)]
    arguments += ["--checkpoints", f"soft={point}"]
    assert main(arguments) == 1
    assert f"{best} changed since the evaluation began" in capsys.readouterr().err
    assert len((out / "likelihood" / "soft" / "kl.jsonl").read_text().splitlines()) == 1
