"""How much is asked of the server at once."""

from __future__ import annotations

import threading

AHEAD = 2
"""Samples awaited for each slot of the server: while those in the slots finish, others queue."""
LEAST_REQUESTS = 2
"""Under way whatever their size: while the last samples of one finish, the other has the slots."""
MOST_REQUESTS = 64
"""Each has a thread and a connection here."""
UNJUDGED = 32
"""Samples for each slot that may wait for their verdict: a slow scorer must not fill the memory."""


class Window:
    """Says when the next request may begin.

    Samples count, not requests: greedy settings and transcripts ask for a few at a time, and a
    fixed number of such requests would leave the server empty, while as many large ones would
    queue for hours and look like a server that hangs.

    Args:
        slots: samples that the server computes at a time.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._changed = threading.Condition()
        self._requests = 0
        """Begun and not ended."""
        self._sampling = 0
        """Of these, the ones that still await samples."""
        self._awaited = 0
        """Samples asked for that have not come."""
        self._unjudged = 0
        """Samples that came and are not in the files."""
        self._error: BaseException | None = None

    def has_room(self) -> bool:
        """Whether another request may begin now."""
        return (
            self._requests < MOST_REQUESTS
            and self._unjudged < UNJUDGED * self._slots
            and (self._awaited < AHEAD * self._slots or self._sampling < LEAST_REQUESTS)
        )

    def begin(self, samples: int) -> None:
        """Wait for room, and count a request for so many samples.

        Raises:
            BaseException: what a request ended with.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self.has_room())
            self._raise()
            self._requests += 1
            self._sampling += 1
            self._awaited += samples

    def came(self) -> None:
        """A sample is here; `judged` follows."""
        with self._changed:
            self._awaited -= 1
            self._unjudged += 1
            self._changed.notify_all()

    def judged(self) -> None:
        """Nothing is left to do about a sample."""
        with self._changed:
            self._unjudged -= 1
            self._changed.notify_all()

    def sampled(self, failures: int) -> None:
        """A request awaits nothing more; so many of its samples will never come."""
        with self._changed:
            self._sampling -= 1
            self._awaited -= failures
            self._changed.notify_all()

    def end(self, error: BaseException | None) -> None:
        """A request is done; after an error no other begins."""
        with self._changed:
            self._requests -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait for the last request.

        Raises:
            BaseException: what a request ended with.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._requests)
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
