"""Finished samples of one rollout request that wait for its reader, and how many more may start."""

from __future__ import annotations

import asyncio
from collections import deque

WAITING_BYTES = 256 * 2**20
"""Frames that may wait for one reader before no further sample starts."""


class Backlog:
    """Decides when a sample starts, and keeps what is finished until it is read.

    As many samples as the engine has slots are under way while less than `limit` bytes wait, so a
    reader that keeps pace never leaves a slot empty. As many again may queue in the engine, as far
    as they would fit into what is left of `limit`: those end and wait, too, once reading stops. So
    never more than `limit` and one frame per slot wait; the records behind that one frame per slot
    are what `trace_memory_gib` bounds.
    """

    def __init__(self, slots: int, limit: int = WAITING_BYTES) -> None:
        self.slots = slots
        self.limit = limit
        self.running = 0
        """Samples started and not finished."""
        self.waiting = 0
        """Bytes of the frames that nobody has taken yet."""
        self._largest: int | None = None
        """Bytes of the largest frame so far: the guess for those to come."""
        self._frames: deque[tuple[bytes, bool]] = deque()
        self._changed = asyncio.Event()
        self._filled = asyncio.Event()

    def _has_room(self) -> bool:
        ahead = self.running + 1 - self.slots
        if ahead <= 0:
            return self.waiting < self.limit
        if self._largest is None or ahead > self.slots:
            return False
        return self.waiting + ahead * self._largest <= self.limit

    async def admit(self) -> None:
        """Wait until another sample may start, and count it; one caller at a time."""
        while not self._has_room():
            self._changed.clear()
            await self._changed.wait()
        self.running += 1

    def put(self, frame: bytes, *, failed: bool) -> None:
        """A sample is finished; its frame waits."""
        self.running -= 1
        self.waiting += len(frame)
        self._largest = max(self._largest or 0, len(frame))
        self._frames.append((frame, failed))
        self._changed.set()
        self._filled.set()

    async def take(self) -> tuple[bytes, bool]:
        """The next frame and whether it is a failure; one caller at a time."""
        while not self._frames:
            self._filled.clear()
            await self._filled.wait()
        frame, failed = self._frames.popleft()
        self.waiting -= len(frame)
        self._changed.set()
        return frame, failed
