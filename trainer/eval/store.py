"""Files of results that survive a kill: JSON lines under a first line that says what made them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from trainer.files import write_whole

Key = tuple[str, int]
"""(problem, sample)."""


class Step(msgspec.Struct, array_like=True):
    """One think step as the report shows it."""

    token: str
    """The shadow token, or the sampled one."""
    soft: bool
    entropy: float
    top: list[tuple[str, float]] = []
    """Likely tokens and their probabilities at the CoT temperature."""


class Row(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One sample."""

    problem: str
    sample: int
    seed: int
    prompt: str
    """`plan.prompt_digest`."""
    gold: str = ""
    """`plan.gold_digest`."""
    think: str = ""
    answer: str = ""
    """Forced text and answer."""
    correct: bool = False
    extracted: str | None = None
    """What stood in the box; None: nothing could be read."""
    judge: str | None = None
    """How verification failed: timeout, crash, error. The sample counts as wrong until the next
    run of the command judges it again."""
    end: str = ""
    """end_sequence, budget, eos, cold_stop or unfinished."""
    finish: str = ""
    """stop or length."""
    think_tokens: int = 0
    soft_steps: int = 0
    answer_tokens: int = 0
    entropy: list[float] = []
    """Of every think step, nats, unscaled distribution."""
    steps: list[Step] | None = None
    error: str | None = None
    """Why there is no sample (NaN, engine); counts as wrong."""

    @property
    def failed(self) -> bool:
        """Whether there is no sample, or no verdict on it."""
        return self.error is not None or self.judge is not None

    @property
    def key(self) -> Key:
        return self.problem, self.sample


class ChoiceRow(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One multiple-choice item."""

    item: str
    gold: int
    log_likelihood: list[float]
    """Of every choice, nats."""
    tokens: list[int]
    """Of every choice."""
    bytes: list[int]
    """Of every choice, UTF-8."""

    @property
    def key(self) -> Key:
        return self.item, 0


class KlRow(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One held-out text."""

    text: str
    """Its number."""
    tokens: int
    """Predicted ones."""
    forward: float
    """Sum over tokens of KL(base || checkpoint), nats."""
    reverse: float
    """Sum of KL(checkpoint || base)."""
    nll: float
    """Sum of the checkpoint's NLL."""
    base_nll: float

    @property
    def key(self) -> Key:
        return self.text, 0


R = TypeVar("R", Row, ChoiceRow, KlRow)


class Store(Generic[R]):
    """One file, open from the first row that is written to `close`.

    Args:
        path: a JSONL file, made if absent. One without rows becomes that of this header.
        header: what made the rows; plain JSON.
        kind: type of the rows.

    Raises:
        ValueError: the rows were made by something else, or are damaged beyond the last line.
    """

    def __init__(self, path: Path, header: dict[str, Any], kind: type[R]) -> None:
        self.path, self.header = path, msgspec.json.decode(msgspec.json.encode(header))
        self.done: set[Key] = set()
        self._decoder: msgspec.json.Decoder[R] = msgspec.json.Decoder(kind)
        self._lock = threading.Lock()
        self._encoder = msgspec.json.Encoder()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: FileIO | None = None
        self._failed_at: int | None = None
        if not (path.exists() and self._check()):
            write_whole(path, self._encoder.encode(self.header) + b"\n")

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        return [key for key in keys if key not in self.done]

    def append(self, row: R) -> None:
        """Write one row; it survives the death of this process from here on.

        Raises:
            OSError: it is not in the file, e.g. as the disk is full; others may follow.
        """
        with self._lock:
            if row.key not in self.done:
                self._write(row)

    def replace(self, row: R) -> None:
        """Write a row in place of the one there is: of two with one key the later counts."""
        with self._lock:
            self._write(row)
        self.close()  # such rows are few, and of any file of the evaluation

    def _write(self, row: R) -> None:
        # Unbuffered: a buffer would keep what did not fit on the disk, a whole row or half of one,
        # and put it behind whatever came in between.
        if self._file is None:
            self._file = FileIO(self.path, "a")
        self._cut_failed()
        start = os.fstat(self._file.fileno()).st_size
        left = memoryview(self._encoder.encode(row) + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._failed_at = start
            with suppress(OSError):
                self._cut_failed()
            raise
        self.done.add(row.key)

    def _cut_failed(self) -> None:
        """Cut off the part of a row whose write failed: the next would be glued to it."""
        if self._failed_at is not None and self._file is not None:
            self._file.truncate(self._failed_at)
            self._failed_at = None

    def ordered(self, keys: Sequence[Key]) -> list[R]:
        """The rows of these keys, whatever order they came in. Rows live in the file, not here: a
        large evaluation has gigabytes of them."""
        wanted = set(keys)
        found = {row.key: row for row in self.rows() if row.key in wanted}
        return [found[key] for key in keys]

    def close(self) -> None:
        """Give the file's handle back until another row is written."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def rows(self) -> Iterator[R]:
        """All lines, in the order in which they were written."""
        with self.path.open("rb") as file:
            next(file)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # cut by a kill
                yield self._decoder.decode(line)

    def _check(self) -> bool:
        """Whether the rows go on under their header; not so where there are none, as after a run
        that was refused before its first sample: then the header binds nothing."""
        with self.path.open("rb") as file:
            first = file.readline()
        try:
            header = msgspec.json.decode(first)
            self.done = {row.key for row in self.rows()}
        except msgspec.MsgspecError as error:
            raise ValueError(
                f"{self.path} is damaged ({error}); mend or delete it, what is missing is made anew"
            ) from None
        changed = [
            f"{name}: {_short(header.get(name))} -> {_short(self.header.get(name))}"
            for name in sorted(header.keys() | self.header.keys())
            if header.get(name) != self.header.get(name)
        ]
        if changed and not self.done:
            return False
        if changed:
            raise ValueError(
                f"{self.path} was made with other settings ({'; '.join(changed)}); take those "
                "back, choose another --out, or delete the file"
            )
        self._cut_torn_line()
        return True

    def _cut_torn_line(self) -> None:
        with self.path.open("r+b") as file:
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
