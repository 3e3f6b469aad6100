"""Whose text is it: splitting a sample's visible text into think phase and answer side.

Exact, since the engine reports each token's phase and the front end notes how many characters
there were before it (`CoTStream.offsets`): no search for markers in the text, and nothing goes
wrong when a detokenizer holds bytes back or stop strings hold text back. One thing is put right
here: a character that the thoughts left unfinished is only shown (as U+FFFD) once the next token
is there. It stays with the thoughts, else a JSON answer would begin with it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from softvllm.core.phases import Phase
from softvllm.core.trace import STEP
from softvllm.engine.outputs import CoTStream

UNFINISHED = "\ufffd"


@dataclass(slots=True)
class Split:
    """A piece of visible text, by phase."""

    reasoning: str = ""
    content: str = ""
    content_ids: list[int] | None = None
    """Ids of the tokens of the forced text and the answer in this piece."""


class PhaseSplitter:
    """Splits one sample's text; feed it the text in order, in whatever pieces it arrives."""

    def __init__(self, markers: Collection[int]) -> None:
        """`markers`: tokens (`<think>`, `</think>`) shown neither as reasoning nor as content."""
        self._markers = markers
        self._chars = 0  # characters of the sample's text handed out so far
        self._token = 0  # token those characters end in
        self._ids = 0  # tokens whose ids were handed out
        self._content = False  # whether any text of the answer side was handed out

    def feed(self, stream: CoTStream, text: str) -> Split:
        """The next piece of the sample's text; `stream` knows at least the tokens it is from."""
        steps, offsets = stream.builder.steps, stream.offsets
        count = len(offsets)
        parts: tuple[list[str], list[str]] = ([], [])
        position, at = 0, self._token
        while position < len(text):
            end = len(text)
            if at + 1 < count:
                end = min(end, offsets[at + 1] - self._chars)
            if end > position:
                if not self._hidden(steps, at):
                    piece, answers = text[position:end], _phase(steps, at) != Phase.THINK
                    if answers and not self._content:
                        late = _unfinished(stream, piece)
                        parts[0].append(piece[:late])
                        piece = piece[late:]
                        self._content = bool(piece)
                    parts[answers].append(piece)
                position = end
            if at + 1 < count and self._chars + position >= offsets[at + 1]:
                at += 1
            elif position < len(text):  # text beyond the last known token belongs to it
                continue
        self._token = at
        self._chars += len(text)
        ids = [
            _token(steps, t)
            for t in range(self._ids, count)
            if _phase(steps, t) != Phase.THINK and not self._hidden(steps, t)
        ]
        self._ids = count
        return Split("".join(parts[0]), "".join(parts[1]), ids)

    def _hidden(self, steps: bytearray, t: int) -> bool:
        return _token(steps, t) in self._markers and _phase(steps, t) != Phase.ANSWER


def answer_start(stream: CoTStream, text: str) -> int:
    """Character of the sample's whole `text` where forced text and answer begin."""
    t = _first(stream)
    start = stream.offsets[t] if t < len(stream.offsets) else len(text)
    return min(start + _unfinished(stream, text[start:]), len(text))


def _first(stream: CoTStream) -> int:
    """Position of the first token that is no thought."""
    phases = bytes(stream.builder.steps[_PHASE_AT :: STEP.itemsize])
    return len(phases) - len(phases.lstrip(bytes([Phase.THINK])))


def _unfinished(stream: CoTStream, text: str) -> int:
    """How many characters, where the answer side's `text` begins, the thoughts left unfinished."""
    t = _first(stream)
    held = 0 < t < len(stream.offsets) and stream.offsets[t - 1] == stream.offsets[t]
    return len(text) - len(text.lstrip(UNFINISHED)) if held else 0


_TOKEN_AT = STEP.fields["token"][1] if STEP.fields else 0
_PHASE_AT = STEP.fields["phase"][1] if STEP.fields else 0


def _phase(steps: bytearray, t: int) -> int:
    return steps[t * STEP.itemsize + _PHASE_AT]


def _token(steps: bytearray, t: int) -> int:
    start = t * STEP.itemsize + _TOKEN_AT
    return int.from_bytes(steps[start : start + 4], "little", signed=True)
