"""How the terminal chat asks: mode, fields of `CoTParams`, limits of the answer."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from softvllm.core import policies
from softvllm.core.params import CoTParams, CoTParamsError

OFF = "off"
"""No think phase: stock vLLM."""
MODES = ("soft", "hard", "fuzzy", "mixed", OFF)
ANSWER_FIELDS = {"max_tokens": "max_tokens", "answer_temperature": "temperature"}
"""Settings outside the think phase and their names in the request."""
COT_FIELDS = tuple(f.name for f in dataclasses.fields(CoTParams))
OWN_FIELDS = {"mode": "use /mode", "record": "the chat always records the top tokens, for /steps"}


@dataclass(slots=True)
class Settings:
    """What the next question is asked with; every change is checked at once."""

    mode: str = "soft"
    cot: dict[str, Any] = field(default_factory=dict)
    """Fields of `CoTParams` that were set; the server decides the others."""
    answer: dict[str, Any] = field(default_factory=dict)
    """Arguments of the request, by their names there."""
    thinks: bool = True
    """Whether the server can think at all; a stock one is not sent `cot_mode`."""

    def request(self) -> dict[str, Any]:
        """Arguments of `SoftClient.stream`."""
        if self.mode == OFF:
            # Without an object, hard means stock vLLM even where the server has a default mode.
            return {**self.answer, "cot": "hard" if self.thinks else None}
        return {**self.answer, "cot": {"mode": self.mode, **self.cot, "record": "top"}}

    def choose(self, mode: str) -> str | None:
        """Change the mode; returns what else changed, if anything.

        Raises:
            ValueError: unknown, impossible on this server, or in conflict with a field.
        """
        if mode not in MODES:
            raise ValueError(f"the mode must be one of {', '.join(MODES)}, got {mode!r}")
        if mode != OFF and not self.thinks:
            raise ValueError("this server is stock vLLM and only knows mode off")
        fields = dict(self.cot)
        dropped = []
        if mode not in ("mixed", OFF):
            dropped = [name for name in ("policy", "policy_params") if fields.pop(name, None)]
        _check(mode, fields)
        self.mode, self.cot = mode, fields
        return f"dropped {' and '.join(dropped)}, which only mode mixed takes" if dropped else None

    def set(self, name: str, text: str) -> None:
        """Change a field from what was typed: JSON, or else a text. Raises ValueError."""
        value = _value(text)
        if name in ANSWER_FIELDS:
            self._set_answer(name, value)
            return
        if name in OWN_FIELDS:
            raise ValueError(f"{name} cannot be set: {OWN_FIELDS[name]}")
        fields = {**self.cot, name: value}
        _check(self.mode, fields)
        self.cot = fields

    def unset(self, name: str) -> None:
        """Leave a field to the server again. Raises ValueError if it is not set."""
        place = self.answer if name in ANSWER_FIELDS else self.cot
        key = ANSWER_FIELDS.get(name, name)
        if key not in place:
            raise ValueError(f"{name} is not set")
        fields = {k: v for k, v in self.cot.items() if k != name}
        _check(self.mode, fields)
        self.cot = fields
        self.answer.pop(ANSWER_FIELDS.get(name, ""), None)

    def describe(self) -> str:
        """All that was set, one line."""
        names = {key: name for name, key in ANSWER_FIELDS.items()}
        items = [
            *self.cot.items(),
            *((names[key], value) for key, value in self.answer.items()),
        ]
        parts = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in items]
        return f"mode {self.mode}" + (": " + ", ".join(parts) if parts else ", nothing else set")

    def _set_answer(self, name: str, value: Any) -> None:
        whole = name == "max_tokens"
        ok = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not ok or value < whole:
            kind = "an integer >= 1" if whole else "a number >= 0"
            raise ValueError(f"{name} must be {kind}, got {value!r}")
        self.answer[ANSWER_FIELDS[name]] = value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def is_foreign(policy: Any) -> bool:
    """Whether only the server can know it: policies of packages that are not installed here."""
    return isinstance(policy, str) and bool(policy) and policy not in policies.names()


def _check(mode: str, fields: dict[str, Any]) -> None:
    """Refuse what the server would refuse, while the user still looks at it."""
    if mode == OFF:
        mode = "mixed" if {"policy", "policy_params"} & set(fields) else "soft"
    whole = {"mode": mode, **fields}
    if mode == "mixed":
        whole.setdefault("policy", "blend")
        if is_foreign(whole["policy"]):
            if not isinstance(whole.get("policy_params", {}), dict):
                raise ValueError("cot.policy_params: must be an object of numbers")
            whole = {**fields, "mode": "soft", "policy": None, "policy_params": {}}
    try:
        CoTParams.from_dict(whole)
    except CoTParamsError as error:
        raise ValueError(str(error)) from None
