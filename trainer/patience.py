"""How long to go on asking a server that does not do its work."""

from __future__ import annotations

import time
from collections.abc import Callable

from trainer.server_words import ServerGone

FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0


class Progress:
    """When a server last did something for any of the requests that share this.

    What stands in the queue of a busy server hears nothing for long: that the server works shows
    in the answers to others.
    """

    def __init__(self) -> None:
        self.last = time.monotonic()
        self._told_until = self.last

    def made(self) -> None:
        """The server did something; called from any thread."""
        self.last = time.monotonic()

    def tells(self, until: float) -> bool:
        """Whether a retry at `until` is worth a line: of many that wait together one speaks."""
        if time.monotonic() < self._told_until:
            return False
        self._told_until = until
        return True


class Patience:
    """Waits longer and longer between attempts, up to a bound.

    The bound counts from the first failure after progress, not from the request: how long a
    request waited for that failure (`timeout`) is no time in which it could have been repeated.

    Args:
        seconds: without progress, after which patience is over; 0: no second attempt.
        say: where a retry is announced.
        progress: what renews patience.
    """

    def __init__(self, seconds: float, say: Callable[[str], None], progress: Progress) -> None:
        self._seconds, self._say, self._progress = seconds, say, progress
        self._since: float | None = None
        self._pause = FIRST_WAIT

    def wait(self, trouble: Exception) -> None:
        """Sleep before the next attempt.

        Raises:
            ServerGone: patience is over; with the words of `trouble`.
        """
        now = time.monotonic()
        if self._since is None or self._progress.last > self._since:
            self._since, self._pause = now, FIRST_WAIT
        left = self._since + self._seconds - now
        if left <= 0:
            raise ServerGone(str(trouble)) from None
        pause = min(self._pause, left)
        if self._progress.tells(now + pause):
            self._say(f"{trouble}; trying again in {pause:.1f} s, for {left:.0f} s more")
        time.sleep(pause)
        self._pause = min(2 * self._pause, LONGEST_WAIT)
