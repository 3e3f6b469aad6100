"""What is asked of the rollout server, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from softvllm.core.rollout import MAX_PROMPTS, MAX_SAMPLES, MAX_TOTAL, Failure, Sample

Key = tuple[int, int]
"""(prompt, sample)."""


@dataclass
class Rollouts:
    """What came of one request."""

    samples: dict[Key, Sample] = field(default_factory=dict)
    failures: dict[Key, Failure] = field(default_factory=dict)
    attempts: int = 0
    """HTTP requests made; healthy: 1, and more only where one cannot hold so many samples."""
    seconds: float = 0.0
    bytes: int = 0

    @property
    def finished(self) -> int:
        """Samples that need not be asked for again."""
        return len(self.samples) + len(self.failures)


@dataclass(frozen=True)
class Request:
    """A batch of rollouts."""

    prompts: list[list[int]]
    """Token ids."""
    seeds: list[list[int]]
    """One per sample, [prompts][n]."""
    body: dict[str, Any]
    """Everything else: cot_mode, cot, sampling."""
    version: str | None = None
    """Weights that every sample must come from; None: any."""


@dataclass(frozen=True)
class Piece:
    """What goes out as one HTTP request."""

    prompts: list[list[int]]
    seeds: list[list[int]]
    """[prompts][n]"""
    keys: dict[Key, Key]
    """Place in the whole request, by place in this one."""


def pieces(request: Request, missing: list[Key]) -> Iterator[Piece]:
    """The missing samples in as few HTTP requests as the server's limits allow.

    Args:
        missing: sorted.
    """
    widths = {len(row) for row in request.seeds}
    whole = len(missing) == sum(map(len, request.seeds))
    if whole and len(widths) == 1 and (n := widths.pop()) <= MAX_SAMPLES:
        step = min(MAX_PROMPTS, MAX_TOTAL // n)
        for at in range(0, len(request.prompts), step):
            seeds = request.seeds[at : at + step]
            keys = {(i, k): (at + i, k) for i in range(len(seeds)) for k in range(n)}
            yield Piece(request.prompts[at : at + step], seeds, keys)
        return
    # What is missing has no rectangular shape: each sample is a prompt of its own.
    for at in range(0, len(missing), MAX_PROMPTS):
        part = missing[at : at + MAX_PROMPTS]
        prompts = [request.prompts[i] for i, _ in part]
        seeds = [[request.seeds[i][k]] for i, k in part]
        yield Piece(prompts, seeds, {(j, 0): key for j, key in enumerate(part)})
