"""Mathematics through `math-verify`: the paper's 100 / 10 / 0."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from trainer.rewards.base import CORRECT, EXTRACTABLE, NOTHING, Verdict, boxed


def score(answer: str, gold: str, metadata: Mapping[str, Any]) -> Verdict:
    """Compare what is boxed in the answer with the gold, as mathematics."""
    found = boxed(answer)
    if found is None:
        return Verdict(NOTHING, False)
    correct = equal(found, gold)
    return Verdict(CORRECT if correct else EXTRACTABLE, correct, found)


def verifiable(gold: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the gold can be parsed and equals itself."""
    return equal(gold, gold)


def equal(found: str, gold: str) -> bool:
    """Whether two expressions are the same. No time limit: the caller's process has one."""
    from math_verify import verify

    target = _parsed(gold)
    # timeout_seconds=None: math-verify's own timeouts use signals and swallow what they interrupt.
    return bool(target) and bool(verify(target, _parsed(found), timeout_seconds=None))


@lru_cache(maxsize=256)
def _parsed(expression: str) -> list[Any]:
    from math_verify import parse

    return parse(f"\\boxed{{{expression}}}", parsing_timeout=None)
