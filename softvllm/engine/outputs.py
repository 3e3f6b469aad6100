"""What the front end hands out: `CompletionOutput.cot`."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from softvllm.core.resolve import ResolvedCoT
from softvllm.core.trace import Trace, TraceBuilder
from softvllm.engine.ledger import Delta


@dataclass(slots=True)
class CoTStream:
    """Everything received so far of one sample; lives with vLLM's `RequestState`."""

    cot: ResolvedCoT
    builder: TraceBuilder = field(default_factory=TraceBuilder)
    sigmas: list[list[float]] = field(default_factory=list)  # [[sigma, first position], ...]
    offsets: array[int] = field(default_factory=lambda: array("i"))
    """Characters of visible text before each position, so that a server can tell whose text a
    character is: detokenizers hold bytes back and stop strings hold text back."""

    def receive(self, delta: Delta, offset: int) -> None:
        """Append one position; `offset`: characters of text the positions before it gave."""
        position = len(self.builder)
        self.offsets.append(offset)
        if not self.sigmas or self.sigmas[-1][0] != delta["sigma"]:
            self.sigmas.append([delta["sigma"], position])
        facts = delta.get("facts")
        if facts:
            self.builder.meta.update(facts)
        self.builder.append(delta["step"], delta["top"], delta["sparse"], delta["dense"])

    def meta(self, weight_versions: list[Any] | None) -> dict[str, Any]:
        """The trace's unchanging facts."""
        cot = self.cot
        spans = [[v.version, v.start, v.end] for v in weight_versions or ()]
        return {
            **self.builder.meta,
            "mode": cot.mode,
            "policy": cot.policy,
            "policy_values": cot.policy_values,
            "tau": cot.tau,
            "gamma": cot.gamma,
            "top_k": cot.top_k,
            "top_p": cot.top_p,
            "min_p": cot.min_p,
            "seed": cot.seed,
            "max_think": cot.max_think,
            "record": cot.record,
            "sigma": self.sigmas[0][0] if self.sigmas else 0.0,
            "sigmas": self.sigmas,
            "weight_versions": spans,
        }


@dataclass(slots=True)
class CoTOutput:
    """The chain-of-thought side of one completion.

    `steps` holds the positions this output adds (streaming in DELTA mode) or all so far.
    """

    stream: CoTStream
    start: int
    completion: Any = None
    """The `CompletionOutput` this belongs to; vLLM may merge several stream chunks into it."""

    @property
    def trace(self) -> Trace:
        """All positions received so far; complete once the request has finished."""
        trace = self.stream.builder.build()
        trace.meta = self.stream.meta(getattr(self.completion, "weight_versions", None))
        return trace

    @property
    def steps(self) -> Trace:
        """The positions of this output alone."""
        stop = self.start + len(self.completion.token_ids)
        trace = self.stream.builder.build(self.start, stop)
        trace.meta = {**self.stream.meta(None), "start": self.start}
        return trace

    @property
    def summary(self) -> dict[str, Any]:
        """Counts, causes, seed and sigma of what was received so far."""
        return self.trace.summary()

    @property
    def seed(self) -> int:
        """The seed that repeats this sample exactly (with n = 1)."""
        return self.stream.cot.seed

    @property
    def has_nan(self) -> bool:
        """Whether the model produced NaN logits somewhere: then no number here means anything."""
        return bool(np.isnan(self.trace.entropy).any())
