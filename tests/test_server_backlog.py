"""What waits for a slow reader of rollouts is bounded, and the engine never starves for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from server.backlog import Backlog


async def idle(rounds: int = 20) -> None:
    """Let every task run until it waits."""
    for _ in range(rounds):
        await asyncio.sleep(0)


class Engine:
    """Samples of given sizes, started as the backlog lets them, finished when a test says so."""

    def __init__(self, slots: int, limit: int, sizes: list[int]) -> None:
        self.backlog = Backlog(slots, limit)
        self.sizes = sizes
        self.started = self.finished = self.peak = 0

    async def feed(self) -> None:
        for _ in self.sizes:
            await self.backlog.admit()
            self.started += 1

    def finish(self) -> bool:
        """The oldest unfinished sample ends."""
        if self.finished == self.started:
            return False
        self.backlog.put(bytes(self.sizes[self.finished]), failed=False)
        self.finished += 1
        self.peak = max(self.peak, self.backlog.waiting)
        return True


def run(job: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(job, 30))


async def stall(engine: Engine) -> None:
    """Finish everything that may start while nobody reads."""
    await idle()
    while engine.finish():
        await idle(3)


def test_a_reader_that_stalls_stops_new_samples() -> None:
    async def job() -> None:
        engine = Engine(slots=4, limit=100, sizes=[30] * 50)
        feeder = asyncio.create_task(engine.feed())
        await stall(engine)
        assert engine.started == engine.finished < 50
        assert 100 <= engine.backlog.waiting <= 100 + 4 * 30
        held = engine.started
        while engine.backlog.waiting >= 100:
            await engine.backlog.take()
        await idle()
        assert engine.started > held, "reading makes room again"
        feeder.cancel()

    run(job())


def test_every_slot_is_taken_while_little_waits_even_if_samples_are_large() -> None:
    async def job() -> None:
        engine = Engine(slots=4, limit=100, sizes=[1000] * 40)
        feeder = asyncio.create_task(engine.feed())
        for _ in range(40):
            await idle()
            left = len(engine.sizes) - engine.finished
            assert engine.backlog.running == min(4, left)
            assert engine.finish()
            await engine.backlog.take()
        await feeder

    run(job())


def test_small_samples_queue_ahead_of_the_engine() -> None:
    async def job() -> None:
        engine = Engine(slots=8, limit=10**6, sizes=[10] * 100)
        feeder = asyncio.create_task(engine.feed())
        await idle()
        assert engine.backlog.running == 8, "how large they are is not known yet"
        engine.finish()
        await idle()
        assert engine.backlog.running == 16, "as many again, not more"
        feeder.cancel()

    run(job())


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 6),
    limit=st.integers(1, 200),
    size=st.integers(1, 120),
    total=st.integers(1, 60),
    reads=st.lists(st.booleans(), max_size=150),
)
def test_what_waits_is_bounded_and_everything_arrives(
    slots: int, limit: int, size: int, total: int, reads: list[bool]
) -> None:
    """Whatever the order in which samples finish and are read."""

    async def job() -> None:
        engine = Engine(slots, limit, [size] * total)
        feeder = asyncio.create_task(engine.feed())
        taken = 0
        for read in reads:
            await idle(3)
            if read and engine.finished > taken:
                await engine.backlog.take()
                taken += 1
            elif not read:
                engine.finish()
        await stall(engine)
        assert engine.peak <= limit + slots * size
        while taken < total:
            if engine.finished == taken:
                assert engine.finish(), "neither a frame nor a sample under way: stuck"
            await engine.backlog.take()
            taken += 1
            await idle(3)
        assert engine.started == engine.finished == total and engine.backlog.waiting == 0
        await feeder

    run(job())


def test_frames_keep_their_order_and_their_kind() -> None:
    async def job() -> None:
        backlog = Backlog(2)
        for frame, failed in ((b"a", False), (b"bc", True)):
            await backlog.admit()
            backlog.put(frame, failed=failed)
        assert [await backlog.take() for _ in range(2)] == [(b"a", False), (b"bc", True)]

    run(job())
