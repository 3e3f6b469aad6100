"""What an evaluation may be continued with: same content and server, failures judged again."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from eval_runs import EvalServer, command, eval_server, results_of, rows_of
from eval_scorers import BUSY, SLOW
from msgspec import structs
from rl_fixtures import other_model, surroundings, tiny_model
from trainer_rollouts import single_thread

from trainer.eval import tasks
from trainer.eval.__main__ import main
from trainer.eval.config import EvalConfig
from trainer.eval.verdicts import Verifiers
from trainer.rewards.pool import RewardFailure

threads = pytest.fixture(single_thread, autouse=True, scope="module")
model = pytest.fixture(tiny_model, scope="module")
other = pytest.fixture(other_model, scope="module")
server = pytest.fixture(eval_server)
around = pytest.fixture(surroundings, autouse=True)


# ---- failures ------------------------------------------------------------------------------------


def test_too_many_failed_samples_stop_the_evaluation(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any
) -> None:
    server.trouble.fail = {(0, 0): "nan"}
    assert main(command(server.url, model, tmp_path / "eval")) == 1
    assert "max_failure_rate" in capsys.readouterr().err
    assert main(command(server.url, model, tmp_path / "eval")) == 1  # not forgotten
    more = ("--max-failure-rate", "0.9")
    assert main(command(server.url, model, tmp_path / "eval", *more)) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert sum(cell["failed_samples"] for cell in results["cells"]) >= 1


def test_a_resume_counts_failures_as_an_undisturbed_run_does(
    server: EvalServer, model: Path, tmp_path: Path
) -> None:
    arguments = command(server.url, model, tmp_path / "eval", "--max-failure-rate", "0.1")
    assert main(arguments) == 0
    file = tmp_path / "eval" / "samples" / "none" / "sums" / "soft-sample.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    server.trouble.fail = {(0, 0): "nan"}
    assert main(arguments) == 0  # one of 24, not one of one
    assert sum(cell["failed_samples"] for cell in results_of(tmp_path / "eval")["cells"]) == 1


def test_answers_that_could_not_be_judged_are_judged_by_the_next_run(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    assert main(command(server.url, model, tmp_path / "calm")) == 0
    busy = tmp_path / "busy"
    busy.touch()
    monkeypatch.setenv(BUSY, str(busy))
    arguments = command(server.url, model, tmp_path / "eval")
    cells = [f"none/sums/{name}" for name in ("hard-greedy", "soft-sample")]
    for _ in range(2):  # a rerun meets the same trouble, and says so
        assert main(arguments) == 1
        assert "judged again by the same command" in capsys.readouterr().err
    left = [row for cell in cells for row in rows_of(tmp_path / "eval", cell) if "judge" in row]
    assert len(left) > 1
    busy.unlink()
    sent = len(server.samples_sent)
    assert main(arguments) == 0
    assert len(server.samples_sent) == sent  # the answers were there
    calm, late = (tmp_path / name / "results.json" for name in ("calm", "eval"))
    assert late.read_bytes() == calm.read_bytes()


def test_ctrl_c_does_not_wait_for_answers_to_be_judged_and_leaves_them_to_the_next_run(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    assert main(command(server.url, model, tmp_path / "calm")) == 0
    slow = tmp_path / "slow"
    slow.touch()
    monkeypatch.setenv(SLOW, str(slow))
    arguments = command(server.url, model, tmp_path / "eval", "--judge-timeout", "20")
    wanted = 2 * len(server.samples_sent)

    def interrupt() -> None:
        while len(server.samples_sent) < wanted:
            time.sleep(0.01)
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        signal.pthread_kill(main_thread, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(arguments) == 1
    assert "stopped by Ctrl-C" in capsys.readouterr().err
    cells = [f"none/sums/{name}" for name in ("hard-greedy", "soft-sample")]
    assert [row for cell in cells for row in rows_of(tmp_path / "eval", cell)] == []
    slow.unlink()
    assert main(arguments) == 0
    calm, late = (results_of(tmp_path / name) for name in ("calm", "eval"))
    assert late.pop("configuration")["judge_timeout"] == 20
    assert calm.pop("configuration") and late == calm


def test_a_few_failures_say_nothing_and_many_name_the_flags(monkeypatch: Any) -> None:
    reward = "reward_functions:fails_on_answers"
    config = EvalConfig(rollout_url="http://x", tasks=("sums",), workers=1)
    with ExitStack() as stack:
        verifiers = Verifiers(config, stack)
        for _ in range(5):
            verifiers(reward).submit("a", "1", {}).result()
        verifiers.check(reward)
        verifiers(reward).submit("a", "1", {}).result()
        with pytest.raises(RewardFailure, match=r"--judge-timeout.*--max-failure-rate") as raised:
            verifiers.check(reward)
    assert "reward.timeout" not in str(raised.value)


# ---- what may not change -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: {**row, "question": row["question"].replace("is", "was")}, "another prompt"),
        (lambda row: {**row, "answer": row["answer"] + "1"}, "another gold"),
    ],
    ids=["question", "gold"],
)
def test_a_changed_problem_is_refused_before_anything_is_added(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any, change: Any, words: str
) -> None:
    out = tmp_path / "eval"
    assert main(command(server.url, model, out)) == 0
    problems = tmp_path / "problems.jsonl"
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    rows[1] = change(rows[1])
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sent = len(server.samples_sent)
    assert main(command(server.url, model, out, "--samples", "4")) == 1
    error = capsys.readouterr().err
    assert words in error and "another --out" in error
    assert len(server.samples_sent) == sent


def test_a_problem_judged_by_other_metadata_is_refused(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any
) -> None:
    """The same words and the same gold, but its scorer would measure it otherwise."""
    arguments = [*command(server.url, model, tmp_path / "eval"), "--samples", "4"]
    assert main(command(server.url, model, tmp_path / "eval")) == 0
    sent = len(server.samples_sent)
    read = tasks.load

    def judged_otherwise(*given: Any) -> Any:
        (task,) = read(*given)
        changed = [structs.replace(p, metadata={"tolerance": 0.1}) for p in task.problems]
        return [dataclasses.replace(task, problems=changed)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "load", judged_otherwise)
        assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "other metadata" in error and "another --out" in error
    assert len(server.samples_sent) == sent


def test_a_server_of_another_type_does_not_go_on(model: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "eval"
    with EvalServer(model) as server:
        assert main(command(server.url, model, out)) == 0
    with EvalServer(model, dtype="bfloat16") as server:
        assert main(command(server.url, model, out, "--samples", "4")) == 1
        assert "'dtype': 'bfloat16'" in capsys.readouterr().err
        assert not server.samples_sent


def test_a_server_that_restarts_with_another_type_is_noticed(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    sample, sent = server._sample, []

    def then_restart(*given: Any) -> Any:
        sent.append(given)
        if len(sent) == 3:
            server.dtype = "bfloat16"
            raise ConnectionResetError("cut on demand")
        return sample(*given)

    monkeypatch.setattr(server, "_sample", then_restart)
    assert main(command(server.url, model, tmp_path / "eval")) == 1
    assert "the server restarted as" in capsys.readouterr().err


def test_a_servers_own_defaults_change_nothing(
    server: EvalServer, model: Path, tmp_path: Path
) -> None:
    chosen = ("--settings", "hard-sample", "soft-greedy", "soft-sample", "warm")
    cot = {"top_k": 3, "top_p": 0.5, "min_p": 0.3, "min_think_tokens": 6, "noise_scale": 0.7}
    cot |= {"cold_stop_entropy": 500.0, "cold_stop_steps": 1, "temperature": 3.0}
    found = []
    with EvalServer(model, cot=cot) as willful:
        for name, one in (("plain", server), ("willful", willful)):
            arguments = command(one.url, model, tmp_path / name, *chosen)
            table = tmp_path / "eval.toml"
            if "[setting" not in table.read_text():
                table.write_text(table.read_text() + "[setting.warm]\ncot.noise = 'none'\n")
            assert main(arguments) == 0
            found.append((tmp_path / name / "results.json").read_bytes())
    assert found[0] == found[1]


# ---- what stays ----------------------------------------------------------------------------------


def test_results_say_what_made_them(
    server: EvalServer, model: Path, other: Path, tmp_path: Path
) -> None:
    points = ("--checkpoints", "none=served", f"soft:1={other}", "--api-key", "secret")
    assert main(command(server.url, model, tmp_path / "eval", *points)) == 0
    results = results_of(tmp_path / "eval")
    assert results["server"] == {"dtype": "float32", "softvllm": "1", "vllm": "2"}
    assert results["recipe"] == {"end_strings": []}
    assert [c["folder"] for c in results["checkpoints"]] == [None, str(other)]
    assert results["configuration"]["max_think_tokens"] == 6
    assert results["configuration"]["task"]["sums"]["reward"] == "eval_scorers:by_hash"
    assert "secret" not in json.dumps(results)


def test_every_session_leaves_its_beginning_and_its_end(
    server: EvalServer, model: Path, other: Path, tmp_path: Path
) -> None:
    arguments = command(server.url, model, tmp_path / "eval", "--checkpoints", f"soft={other}")
    server.trouble.refuse_weights = "bad shape"
    assert main(arguments) == 1
    assert main(arguments) == 0
    lines = (tmp_path / "eval" / "sessions.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["event"] for line in found] == ["begin", "end"] * 2
    assert [line["outcome"] for line in found[1::2]] == ["ServerRefused", "done"]
    assert [line["samples"] for line in found[1::2]] == [0, 24]
    assert all(line["server"]["dtype"] == "float32" for line in found)


def test_a_finished_evaluation_still_puts_other_weights_back(
    server: EvalServer, model: Path, other: Path, tmp_path: Path
) -> None:
    arguments = command(server.url, model, tmp_path / "eval", "--checkpoints", f"soft={other}")
    assert main(arguments) == 0
    sent = len(server.samples_sent)
    assert main([*arguments, "--restore", str(model)]) == 0
    assert [version.split("-")[1] for version in server.versions] == ["soft", "restore"]
    assert len(server.samples_sent) == sent
