"""The arms of the benchmark: what each one asks of every request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "hard": None,
    "cot-hard": {"mode": "hard"},
    "soft-full": {"mode": "soft"},
    "soft-sparse": {"mode": "soft", "top_k": 32},
    "fuzzy": {"mode": "fuzzy"},
    "mixed": {"mode": "mixed", "policy": "blend"},
}
"""stock: vLLM without us; hard: no CoT object in the softvllm engine; the others think."""


class Case(NamedTuple):
    """One measured cell."""

    arm: str
    batch: int
    share: int
    """Percent of the generated tokens that are think steps; 0 for arms that do not think."""


def cases(arms: Sequence[str], batches: Sequence[int], shares: Sequence[int]) -> list[Case]:
    """All cells, stock next to hard first in each batch size."""
    plan = []
    for batch in batches:
        for arm in arms:
            for share in [0] if ARMS[arm] is None else shares:
                plan.append(Case(arm, batch, share))
    return plan


def request_params(case: Case, tokens: int) -> list[Any]:
    """Sampling parameters of the batch: temperature 1, no end but the token count.

    A share of 100 % keeps one answer token, since a request must be able to answer.
    """
    from vllm import SamplingParams

    from softvllm.engine.llm import soft_params

    fields = ARMS[case.arm]
    common: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True, "max_tokens": tokens}
    if fields is None:
        return [SamplingParams(**common) for _ in range(case.batch)]
    think = min(tokens * case.share // 100, tokens - 1)
    return [
        soft_params(
            **fields,
            **common,
            seed=i,
            max_think_tokens=think,
            end_strings=(),
            force_after_cut=(),
            force_after_end=(),
        )
        for i in range(case.batch)
    ]
