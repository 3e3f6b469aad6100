"""What the terminal chat shows: think phase dimmed, answer plain, the table of think steps."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from typing import TextIO

from clients.types import CoTBlock, SoftReply, ThinkStep

DIM, BOLD, RED, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but tab and line feed: a model must not steer the user's terminal."""


def clean(text: str) -> str:
    """Model text, safe to print."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def wants_colour(out: TextIO) -> bool:
    """A terminal that understands colours, and a user who did not decline (NO_COLOR)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") != "dumb"


class Screen:
    """Writes to one stream. Without colours, labels tell the think phase from the answer."""

    def __init__(self, out: TextIO, err: TextIO, *, colour: bool) -> None:
        self._out = out
        self._err = err
        self._colour = colour
        self._part: str | None = None  # of the running answer: "think" or "answer"

    def paint(self, text: str, style: str) -> str:
        return f"{style}{text}{PLAIN}" if self._colour else text

    def note(self, text: str) -> None:
        """A line of the chat's own."""
        print(self.paint(clean(text), DIM), file=self._out, flush=True)

    def error(self, text: str) -> None:
        """A line about what went wrong."""
        self._out.flush()
        print(self.paint(clean(text), RED), file=self._err, flush=True)

    def think(self, text: str) -> None:
        """More of the think phase."""
        self._write("think", text, DIM)

    def answer(self, text: str) -> None:
        """More of the answer."""
        self._write("answer", text, "")

    def _write(self, part: str, text: str, style: str) -> None:
        if self._part != part:
            text = text.lstrip()
            if not text:
                return
            self.end_line()
            if not self._colour:
                self._out.write(f"[{part}] ")
            self._part = part
        text = clean(text)
        self._out.write(self.paint(text, style) if style else text)
        self._out.flush()

    def end_line(self) -> None:
        """Finish the running answer's last line, if there is one."""
        if self._part is not None:
            self._out.write("\n")
            self._out.flush()
        self._part = None

    def summary(self, reply: SoftReply) -> None:
        """One line below an answer."""
        cot = reply.cot
        if cot is None:
            tokens = reply.usage.completion_tokens if reply.usage else 0
            self.note(f"({tokens} tokens without a think phase)")
            return
        entropy = "" if cot.mean_entropy is None else f", entropy {cot.mean_entropy:.2f}"
        cut = ", answer cut off" if reply.finish_reason == "length" else ""
        self.note(
            f"({cot.mode}: {cot.think_tokens} think tokens, ended by {cot.end_cause}{entropy}; "
            f"{cot.answer_tokens} answer tokens{cut}; seed {cot.seed})"
        )

    def steps(self, cot: CoTBlock, steps: Sequence[ThinkStep]) -> None:
        """The last think steps as a table."""
        width = max(60, shutil.get_terminal_size((120, 24)).columns)
        head = f"{'step':>5}  {'fed':<4} {'entropy':>7}  {'token':<16} top tokens"
        print(self.paint(head, BOLD), file=self._out)
        first = cot.think_tokens - len(steps)
        for number, step in enumerate(steps, first):
            fed = "soft" if step.soft else "hard"
            top = "  ".join(f"{t.token!r} {t.weight:.2f}" for t in step.top if t.weight >= 0.005)
            line = f"{number:>5}  {fed:<4} {step.entropy:>7.2f}  {step.token!r:<16} {top}"
            print(clean(line)[:width], file=self._out)
        self._out.flush()
