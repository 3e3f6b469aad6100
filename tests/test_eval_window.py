"""How much an evaluation asks of the server at once, and what its requests share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from softvllm.core.rollout import Failure
from trainer import patience
from trainer.data import Problem
from trainer.eval import settings, window
from trainer.eval.generate import Generator, Job
from trainer.eval.plan import Cell, parts
from trainer.eval.tasks import Task
from trainer.eval.window import MOST_REQUESTS, Window
from trainer.patience import Patience, Progress
from trainer.rollout_client import Rollouts

SLOTS = 8


def begun(room: Window, samples: int) -> int:
    """How many requests of so many samples may begin."""
    number = 0
    while room.has_room():
        room.begin(samples)
        number += 1
    return number


def sampled(room: Window, samples: int, failures: int = 0) -> None:
    """A request's samples come, but for failures, and it awaits no more."""
    for _ in range(samples - failures):
        room.came()
    room.sampled(failures)


def test_small_requests_fill_the_servers_slots_and_its_queue() -> None:
    room = Window(256)
    assert begun(room, 17) == 31  # 31 x 17 = 527 samples, 30 would be 510
    for _ in range(15):
        room.came()
    assert not room.has_room()
    room.came()
    assert begun(room, 17) == 1


def test_two_large_requests_are_under_way_and_a_third_when_one_of_them_ends() -> None:
    room = Window(SLOTS)
    assert begun(room, 8 * SLOTS) == 2
    for _ in range(8 * SLOTS - 1):
        room.came()
    assert not room.has_room()  # the other one fills the slots
    room.came()
    room.sampled(0)
    assert begun(room, 8 * SLOTS) == 1


def test_samples_that_fail_are_awaited_no_more() -> None:
    room = Window(SLOTS)
    assert begun(room, 6) == 3
    sampled(room, 6, failures=4)
    assert begun(room, 6) == 1


def test_requests_are_bounded_where_each_asks_for_little() -> None:
    room = Window(1024)
    assert begun(room, 1) == MOST_REQUESTS
    sampled(room, 1)
    assert not room.has_room()  # its sample is not judged
    room.judged()
    room.end(None)
    assert begun(room, 1) == 1


def test_a_slow_scorer_stops_new_requests_until_it_has_caught_up() -> None:
    room = Window(1)
    for _ in range(window.UNJUDGED):
        room.begin(1)
        sampled(room, 1)
    assert not room.has_room()
    room.judged()
    assert room.has_room()


def test_the_first_error_ends_the_wait_for_room_and_for_the_last() -> None:
    room = Window(SLOTS)
    begun(room, 8 * SLOTS)
    room.end(ValueError("first"))
    room.end(ValueError("second"))
    for wait in (lambda: room.begin(1), room.drain):
        with pytest.raises(ValueError, match="first"):
            wait()


# ---- the generator -------------------------------------------------------------------------------


def jobs_of(tasks: int, problems: int, size: int) -> list[Job]:
    made = [Problem(f"p{i}", f"q{i}", "1") for i in range(problems)]
    found = []
    for number in range(tasks):
        task = Task(f"t{number}", "gsm8k", 8, 4, [], {}, made, [[i] for i in range(problems)])
        cell = Cell.of(task, settings.named(["hard-greedy"], {})[0], 1, 0, 3)
        store: Any = SimpleNamespace(append=lambda row: None)
        found += [Job(part, store, None) for part in parts(cell, cell.all_keys(), size)]
    return found


def generator(generate: Callable[..., Rollouts], slots: int) -> Generator:
    """Its client answers with `generate`."""
    client: Any = SimpleNamespace(generate=generate)

    def verifiers(reward: str) -> None:
        return None

    verifiers.check = verifiers  # type: ignore[attr-defined]
    anything: Any = verifiers
    return Generator(client, anything, lambda: None, str, lambda row: None, slots)


def all_failed(request: Any) -> Rollouts:
    keys = [(i, k) for i, row in enumerate(request.seeds) for k in range(len(row))]
    lost = {key: Failure(prompt=key[0], sample=key[1], code="nan", message="") for key in keys}
    return Rollouts(failures=lost)


def test_many_small_greedy_requests_are_under_way_together_and_share_their_patience() -> None:
    jobs = jobs_of(tasks=15, problems=20, size=2048)
    assert len(jobs) == 30  # of each task three transcripts apart
    together, shared = threading.Barrier(len(jobs)), set()

    def generate(request: Any, take: Any, recover: Any, progress: Any = None) -> Rollouts:
        together.wait(timeout=20)
        shared.add(progress)
        return all_failed(request)

    generator(generate, 256).run(jobs)
    (progress,) = shared
    assert isinstance(progress, Progress)


def test_of_large_requests_two_are_under_way() -> None:
    jobs = jobs_of(tasks=1, problems=8 * SLOTS * 6 + 3, size=8 * SLOTS)[1:]
    pairs, active, most = threading.Barrier(2), [], []

    def generate(request: Any, *more: Any) -> Rollouts:
        active.append(request)
        most.append(len(active))
        pairs.wait(timeout=20)
        active.remove(request)
        return all_failed(request)

    generator(generate, SLOTS).run(jobs)
    assert len(jobs) == len(most) == 6 and max(most) == 2


def test_an_error_of_one_request_stops_the_others() -> None:
    jobs = jobs_of(tasks=10, problems=8 * SLOTS, size=8 * SLOTS)
    asked = []

    def generate(request: Any, *more: Any) -> Rollouts:
        asked.append(request)
        raise ValueError("of the server")

    with pytest.raises(ValueError, match="of the server"):
        generator(generate, SLOTS).run(jobs)
    assert len(asked) < len(jobs)


def test_of_requests_that_wait_together_one_tells_of_the_retry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(patience, "time", clock)
    said: list[str] = []
    shared = Progress()
    waiting = [Patience(300.0, said.append, shared) for _ in range(5)]
    for at in (1.0, 2.0):
        now[0] = at
        for one in waiting:
            one.wait(ConnectionError(f"away at {at}"))
    assert [line.partition(";")[0] for line in said] == ["away at 1.0", "away at 2.0"]
