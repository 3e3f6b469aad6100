"""The state of a terminal chat and what its commands do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from clients.chat_screen import Screen
from clients.chat_settings import Settings
from clients.client import SoftClient
from clients.errors import SoftClientError
from clients.types import ContentDelta, ReasoningDelta, SoftReply

DEFAULT_STEPS = 20


class Quit(Exception):
    """The user is done."""


class Session:
    """One conversation. `handle` takes a line: a command if it starts with a slash."""

    def __init__(
        self, client: SoftClient, settings: Settings, screen: Screen, system: str | None = None
    ) -> None:
        self.settings = settings
        self.screen = screen
        self.failed = False
        """Whether any line ended in an error."""
        self._client = client
        self._first: list[Mapping[str, Any]] = (
            [{"role": "system", "content": system}] if system else []
        )
        self._messages = list(self._first)
        self._last: SoftReply | None = None
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/mode": (self._mode, "soft|hard|fuzzy|mixed|off", "how the next answers think"),
            "/set": (self._set, "FIELD VALUE", "a field of CoTParams, max_tokens or "
                     "answer_temperature; without arguments: show what is set"),
            "/unset": (self._unset, "FIELD", "leave a field to the server again"),
            "/seed": (self._seed, "[N|off]", "show the last seed; use N from now on; or random"),
            "/again": (self._again, "", "repeat the last answer exactly, by its seed"),
            "/steps": (self._steps, "[N|all]", "the last answer's think steps with top tokens"),
            "/reset": (self._reset, "", "forget the conversation"),
            "/help": (self._help, "", "this list"),
            "/quit": (self._quit, "", "leave (also Ctrl-D); Ctrl-C stops a running answer"),
        }  # fmt: skip

    @property
    def commands(self) -> tuple[str, ...]:
        return tuple(self._commands)

    def handle(self, line: str) -> None:
        """Answer a question or run a command. Errors are shown, only `Quit` is raised."""
        line = line.strip()
        if not line:
            return
        try:
            if not line.startswith("/"):
                self._ask(line)
                return
            name, _, rest = line.partition(" ")
            if name not in self._commands:
                raise ValueError(f"unknown command {name}; /help lists them")
            self._commands[name][0](rest.strip())
        except (SoftClientError, ValueError) as error:
            self.failed = True
            self.screen.end_line()
            self.screen.error(str(error))

    # ---- asking -----------------------------------------------------------------------------

    def _ask(self, question: str) -> None:
        messages = [*self._messages, {"role": "user", "content": question}]
        reply = self._show({"messages": messages, **self.settings.request()})
        if reply is not None:
            # Only the answer side: the model was not trained to read its soft thoughts' shadow.
            self._messages = [*messages, {"role": "assistant", "content": reply.content}]
            self._last = reply

    def _show(self, request: dict[str, Any]) -> SoftReply | None:
        """Stream one answer; None if the user stopped it."""
        try:
            with self._client.stream(**request) as stream:
                for event in stream:
                    if isinstance(event, ReasoningDelta):
                        self.screen.think(event.text)
                    elif isinstance(event, ContentDelta):
                        self.screen.answer(event.text)
        except KeyboardInterrupt:
            self.screen.end_line()
            self.screen.note("(stopped; this turn is not part of the conversation)")
            return None
        self.screen.end_line()
        assert stream.reply is not None, "a stream that ended without its reply"
        self.screen.summary(stream.reply)
        return stream.reply

    # ---- commands ---------------------------------------------------------------------------

    def _mode(self, mode: str) -> None:
        note = self.settings.choose(mode)
        self.screen.note(f"{self.settings.describe()}{f' ({note})' if note else ''}")

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = (part.strip() for part in re.split(r"([\s=])", rest + " ", maxsplit=1))
            if not value:
                raise ValueError(f"/set {name} needs a value, e.g. /set temperature 0.5")
            self.settings.set(name, value)
        self.screen.note(self.settings.describe())

    def _unset(self, name: str) -> None:
        self.settings.unset(name)
        self.screen.note(self.settings.describe())

    def _seed(self, rest: str) -> None:
        if rest == "off":
            self.settings.cot.pop("seed", None)
        elif rest:
            self.settings.set("seed", rest)
        fixed = self.settings.cot.get("seed")
        last = self._last.cot.seed if self._last and self._last.cot else None
        now = "a fresh one for each answer" if fixed is None else str(fixed)
        self.screen.note(f"seed: {now}" + ("" if last is None else f"; the last answer had {last}"))

    def _again(self, _: str) -> None:
        if self._last is None:
            raise ValueError("there is no answer to repeat yet")
        reply = self._show(self._last.again())
        if reply is None:
            return
        before = (self._last.reasoning, self._last.content)
        if (reply.reasoning, reply.content) == before:
            self.screen.note("(the same text as before)")
        else:
            self.screen.note(
                "(not the same text: the weights changed, or other requests in the batch changed "
                "the rounding)"
            )

    def _steps(self, rest: str) -> None:
        cot = self._last.cot if self._last else None
        if cot is None or not cot.steps:
            raise ValueError("the last answer has no think steps")
        if rest not in ("", "all") and not rest.isdecimal():
            raise ValueError(f"/steps takes a number or all, got {rest!r}")
        count = len(cot.steps) if rest == "all" else int(rest or DEFAULT_STEPS)
        self.screen.steps(cot, cot.steps[-count:] if count else ())

    def _reset(self, _: str) -> None:
        self._messages = list(self._first)
        self._last = None
        self.screen.note("(new conversation)")

    def _help(self, _: str) -> None:
        for name, (_run, arguments, text) in self._commands.items():
            self.screen.note(f"  {f'{name} {arguments}':<32} {text}")

    def _quit(self, _: str) -> None:
        raise Quit
