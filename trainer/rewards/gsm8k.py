"""GSM8K: the number in the box, compared as a number first, by `math-verify` where that fails."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from trainer.rewards import math
from trainer.rewards.base import CORRECT, EXTRACTABLE, NOTHING, Verdict, boxed

_NOISE = str.maketrans("", "", "$, \\%")


def score(answer: str, gold: str, metadata: Mapping[str, Any]) -> Verdict:
    """100 for the gold number, 10 for anything else that is boxed, 0 without a box."""
    found = boxed(answer)
    if found is None:
        return Verdict(NOTHING, False)
    left, right = number(found), number(gold)
    correct = (left is not None and left == right) or math.equal(found, gold.replace(",", ""))
    return Verdict(CORRECT if correct else EXTRACTABLE, correct, found)


def verifiable(gold: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the gold is a number."""
    return number(gold) is not None


def number(text: str) -> Decimal | None:
    """A plain decimal number, with or without $, % and thousands separators."""
    try:
        value = Decimal(text.translate(_NOISE).removesuffix("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
