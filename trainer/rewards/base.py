"""What a scorer is, and how one is found by name.

A scorer is a function `score(answer, gold, metadata)`:

- `answer`: the text after the think phase, forced text included (it holds the `\\boxed{`);
- `gold`: the reference answer of the data;
- `metadata`: whatever else the data source knows of the item (JSON).

It returns a number (the reward, `correct` if above 0) or a `Verdict`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

CORRECT, EXTRACTABLE, NOTHING = 100.0, 10.0, 0.0
"""The rewards of the paper (section 4): verified; wrong, but a boxed answer can be read; else."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a scorer says about one answer."""

    reward: float
    correct: bool
    extracted: str | None = None
    """The answer as it was read; None: there is none."""


Scorer = Callable[[str, str, Mapping[str, Any]], "Verdict | float"]
GoldCheck = Callable[[str, Mapping[str, Any]], bool]

BUILT_IN = {
    "gsm8k": "trainer.rewards.gsm8k",
    "math": "trainer.rewards.math",
    "reasoning_gym": "trainer.rewards.reasoning_gym",
}


def find(name: str) -> tuple[Scorer, GoldCheck | None]:
    """The scorer called `name` and its check of golds, if it has one.

    Args:
        name: a built-in one, or `package.module:function` on the Python path. A module's function
            `verifiable(gold, metadata) -> bool`, if there is one, tells which items can be scored.

    Raises:
        ValueError: there is no such scorer; the message says what was tried.
    """
    module_name, _, function = name.partition(":")
    if not function:
        if name not in BUILT_IN:
            known = ", ".join(sorted(BUILT_IN))
            raise ValueError(
                f"unknown reward {name!r}: name one of {known}, or a function as module:function"
            )
        module_name, function = BUILT_IN[name], "score"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"reward {name!r}: cannot import {module_name}: {error}") from error
    scorer = getattr(module, function, None)
    if not callable(scorer):
        raise ValueError(f"reward {name!r}: {module_name} has no function {function!r}")
    return scorer, getattr(module, "verifiable", None)


def as_verdict(value: Any) -> Verdict:
    """A scorer's result as a `Verdict`.

    Raises:
        ValueError: it is neither a finite number nor a `Verdict` with one.
    """
    if isinstance(value, Verdict):
        verdict = value
    elif isinstance(value, (int, float)):
        verdict = Verdict(float(value), value > 0)
    else:
        raise ValueError(f"a scorer must return a number or a Verdict, got {type(value).__name__}")
    if not math.isfinite(verdict.reward):
        raise ValueError(f"a reward must be finite, got {verdict.reward}")
    return verdict


def boxed(text: str) -> str | None:
    """What stands in the first `\\boxed{...}` with balanced braces; None if there is none.

    The first one: the forced text opens it, and after the answer a model may start a new turn.
    An answer cut before the closing brace cannot be read.
    """
    start = text.find("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":
            at += 2  # \{ and \} are literal braces
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at].strip() or None
        at += 1
    return None
