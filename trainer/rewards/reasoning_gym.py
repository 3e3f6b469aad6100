"""reasoning-gym's own scorers, on the paper's scale: 100 x score, 10 for a wrong boxed answer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from trainer.rewards.base import CORRECT, EXTRACTABLE, NOTHING, Verdict, boxed

SOLVED = 1.0
"""Score of a full solution; tasks give less for partial ones (and 0.01 for any answer at all)."""


def score(answer: str, gold: str, metadata: Mapping[str, Any]) -> Verdict:
    """Ask the task that made the item; `metadata` holds `task`, its `entry` and `parameters`."""
    found = boxed(answer)
    if found is None:
        return Verdict(NOTHING, False)
    value = float(_task(str(metadata["task"])).score_answer(found, dict(metadata["entry"])))
    return Verdict(max(EXTRACTABLE, CORRECT * value), value >= SOLVED, found)


def verifiable(gold: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the task's own answer scores full marks."""
    return float(_task(str(metadata["task"])).score_answer(gold, dict(metadata["entry"]))) >= SOLVED


@lru_cache(maxsize=64)
def _task(name: str) -> Any:
    from reasoning_gym import create_dataset

    # Scorers read the entry, not the data set: the smallest one will do.
    return create_dataset(name, size=1, seed=0)
