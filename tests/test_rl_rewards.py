"""Rewards: verdicts of the built-in scorers; workers that hang, crash or raise."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.rewards.base import boxed, find
from trainer.rewards.gsm8k import score as gsm8k
from trainer.rewards.pool import RewardFailure, RewardPool


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (" \\boxed{42}", "42"),
        (" The final answer is: \\boxed{\\frac{1}{2}} User: \\boxed{7}", "\\frac{1}{2}"),
        (" \\boxed{ {1, 2} }.", "{1, 2}"),
        (" \\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        (" \\boxed{never closed", None),
        (" \\boxed{}", None),
        ("42", None),
    ],
)
def test_the_first_closed_box_is_the_answer(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@given(st.text())
def test_reading_a_box_takes_any_text(text: str) -> None:
    inside = boxed(text)
    assert inside is None or inside in text


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        (" \\boxed{1,200}", 100.0),
        (" \\boxed{\\$1200.00}", 100.0),
        (" \\boxed{\\frac{2400}{2}}", 100.0),
        (" \\boxed{1201}", 10.0),
        (" \\boxed{no idea}", 10.0),
        (" 1200", 0.0),
        (" \\boxed{1200", 0.0),
    ],
)
def test_a_gsm8k_answer_is_worth_100_10_or_0(answer: str, reward: float) -> None:
    verdict = gsm8k(answer, "1200", {})
    assert verdict.reward == reward
    assert verdict.correct == (reward == 100.0)


def test_mathematics_is_compared_as_such() -> None:
    score, verifiable = find("math")
    assert verifiable is not None
    assert score(" \\boxed{\\frac{\\sqrt{2}}{2}}", "\\frac{1}{\\sqrt2}", {}).correct
    assert score(" \\boxed{(x-1)(x+1)}", "x^2-1", {}).reward == 100.0
    assert score(" \\boxed{(x-1)(x-1)}", "x^2-1", {}).reward == 10.0
    assert verifiable("\\frac{3}{4}", {})
    assert not verifiable("", {})


def test_a_reasoning_gym_task_scores_its_own_items() -> None:
    from reasoning_gym import create_dataset

    score, verifiable = find("reasoning_gym")
    assert verifiable is not None
    entry = create_dataset("chain_sum", size=1, seed=3, min_terms=2, max_terms=2)[0]
    metadata = {"task": "chain_sum", "entry": entry}
    assert verifiable(entry["answer"], metadata)
    assert score(f" \\boxed{{{entry['answer']}}}", entry["answer"], metadata).reward == 100.0
    assert score(" \\boxed{-1}", entry["answer"], metadata).reward == 10.0
    assert score(" -1", entry["answer"], metadata).reward == 0.0


def test_an_unknown_reward_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="gsm8k, math, reasoning_gym"):
        find("maths")
    with pytest.raises(ValueError, match="no function 'nothing'"):
        find("reward_functions:nothing")
    with pytest.raises(ValueError, match="cannot import"):
        find("no_such_module:score")


# ---- worker processes ----------------------------------------------------------------------------


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find the misbehaving scorers."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((here, os.environ.get("PYTHONPATH", ""))))


@pytest.fixture
def pool(path: None) -> Iterator[RewardPool]:
    with RewardPool("reward_functions:score", workers=1, timeout=2.0) as pool:
        yield pool


def test_a_hung_scorer_is_killed_counted_and_replaced(pool: RewardPool) -> None:
    results = [pool.submit(a, "x", {}) for a in ("x", "hang", "x")]
    assert [r.result().failure for r in results] == [None, "timeout", None]
    assert [r.result().reward for r in results] == [1.0, 0.0, 1.0]
    assert dict(pool.tally.failures) == {"timeout": 1}


def test_what_a_hung_scorer_started_dies_with_it(pool: RewardPool, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    assert pool.submit("child", "x", {"pid_file": str(pid_file)}).result().failure == "timeout"
    assert_dies(int(pid_file.read_text()))


def assert_dies(pid: int) -> None:
    for _ in range(200):  # the kernel takes a moment to reap an orphan
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail("the scorer's child is still running")


def test_a_pool_closes_at_once_and_cancels_what_has_no_result(path: None, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    pool = RewardPool("reward_functions:score", workers=1, timeout=20.0)
    done = pool.submit("x", "x", {})
    waiting = [pool.submit(a, "x", {"pid_file": str(pid_file)}) for a in ("child", "x", "hang")]
    while not pid_file.exists() or not pid_file.read_text():
        time.sleep(0.01)
    pool.close()
    assert done.result().reward == 1.0
    assert all(future.cancelled() for future in waiting)
    assert pool.submit("x", "x", {}).cancelled()
    assert (pool.tally.scored, pool.tally.failed) == (1, 0)
    assert_dies(int(pid_file.read_text()))


def test_a_worker_that_is_still_starting_does_not_hold_up_the_end(
    path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def slow(command: list[str], **given: Any) -> subprocess.Popen[bytes]:
        started.append(plain(["sleep", "600"], **given))
        return started[-1]

    plain = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", slow)
    with RewardPool("reward_functions:score", workers=1) as pool:
        future = pool.submit("x", "x", {})
        while not started:
            time.sleep(0.01)
    assert future.cancelled()
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("answer", "failure", "message"),
    [
        ("crash", "crash", "status 3"),
        ("raise", "error", "KeyError"),
        ("base", "error", "SystemExit"),
        ("nan", "error", "finite"),
        ("print", None, ""),
    ],
)
def test_a_failing_scorer_gives_zero_and_its_reason(
    pool: RewardPool, answer: str, failure: str | None, message: str
) -> None:
    result = pool.submit(answer, "x", {}).result()
    assert (result.reward, result.failure) == (0.0, failure)
    assert message in result.message
    assert pool.submit("x", "x", {}).result().reward == 1.0


def test_too_many_failures_stop_the_run_with_an_example(path: None) -> None:
    with RewardPool("reward_functions:score", workers=1, max_failure_rate=0.3) as pool:
        pool.submit("x", "x", {}).result()
        pool.check()
        pool.submit("raise", "x", {}).result()
        with pytest.raises(RewardFailure, match=r"1 of the last 2 .*no such thing"):
            pool.check()


def test_golds_that_cannot_be_scored_are_named_and_not_counted_as_failures(
    pool: RewardPool,
) -> None:
    assert pool.verifiable([("1", {}), ("?", {})]) == [True, False]
    assert pool.tally.failed == 0
    pool.check()


def test_a_gold_whose_check_fails_once_is_checked_again(pool: RewardPool, tmp_path: Path) -> None:
    golds = [("1", {}), ("2", {"mark": str(tmp_path / "asked")}), ("?", {})]
    assert pool.verifiable(golds) == [True, True, False]
    assert (tmp_path / "asked").exists()


def test_a_scorer_that_fails_on_every_gold_is_reported_at_once(path: None) -> None:
    with (
        RewardPool("reward_functions:absent", workers=1) as pool,
        pytest.raises(RewardFailure, match="absent"),
    ):
        pool.verifiable([("1", {}), ("2", {})])


def test_a_single_bad_gold_is_dropped_and_does_not_stop_the_run(pool: RewardPool) -> None:
    assert pool.verifiable([("bad", {})]) == [False]  # the only one of a task
    assert pool.verifiable([("1", {}), ("?", {})]) == [True, False]
    assert pool.verifiable([("bad", {})]) == [False]  # the last one of another
    assert pool.verifiable([("bad", {}), ("bad", {})]) == [False, False]
    pool.check()


def test_a_last_gold_whose_check_fails_once_is_checked_again_too(
    pool: RewardPool, tmp_path: Path
) -> None:
    assert pool.verifiable([("1", {})]) == [True]
    assert pool.verifiable([("2", {"mark": str(tmp_path / "asked")})]) == [True]


def test_a_scorer_that_fails_on_one_gold_after_the_other_is_reported(pool: RewardPool) -> None:
    assert pool.verifiable([("bad", {})]) == [False]
    with pytest.raises(RewardFailure, match="a bad row"):
        pool.verifiable([("bad", {})])


@pytest.mark.parametrize(
    "value",
    [2**100, -(2**70), 1e300, float("inf"), "\ud800", "é", [None, {"a": [True, 1.5]}]],
    ids=repr,
)
def test_a_scorer_gets_every_json_value_of_its_item(pool: RewardPool, value: Any) -> None:
    metadata = {"value": value}
    result = pool.submit("ascii", ascii(metadata), metadata).result()
    assert (result.failure, result.correct) == (None, True)
    assert pool.verifiable([("1", metadata)]) == [True]


def test_workers_do_not_see_the_trainers_ranks_and_devices(
    pool: RewardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.rewards.pool import _Worker

    monkeypatch.setenv("RANK", "3")
    worker = _Worker()
    worker.greet()
    environment = Path(f"/proc/{worker.process.pid}/environ").read_bytes().split(b"\0")
    worker.bury()
    assert b"RANK=3" not in environment
    assert b"CUDA_VISIBLE_DEVICES=" in environment
