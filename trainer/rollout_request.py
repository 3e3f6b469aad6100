"""What is asked of the rollout server, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from softvllm.core.rollout import Failure, Sample

Key = tuple[int, int]
"""(prompt, sample)."""


@dataclass
class Rollouts:
    """What came of one request."""

    samples: dict[Key, Sample] = field(default_factory=dict)
    failures: dict[Key, Failure] = field(default_factory=dict)
    attempts: int = 0
    """HTTP requests made; healthy: 1."""
    seconds: float = 0.0
    bytes: int = 0


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
