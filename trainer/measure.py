"""A step's numbers about samples, speed and memory (docs/trainer.md: what is healthy)."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from softvllm.core.phases import EndCause, Phase
from trainer.collect import Collected
from trainer.learn import Prepared
from trainer.rewards.pool import Tally


def of_samples(collected: Collected, prepared: Prepared, tally: Tally) -> dict[str, float]:
    """reward/..., rollout/..., group/... of one step."""
    samples, scored = collected.samples, collected.scored
    n = len(samples)
    rewards = np.array([s.reward for s in scored])
    by_prompt: dict[int, list[bool]] = {}
    for sample, score in zip(samples, scored):
        by_prompt.setdefault(sample.prompt, []).append(score.correct)
    traces = [sample.trace for sample in samples]
    phases = [trace.phase for trace in traces]
    entropies = np.concatenate([t.entropy[p == Phase.THINK] for t, p in zip(traces, phases)])
    ends = Counter(trace.end_cause for trace in traces)
    out = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/correct": sum(s.correct for s in scored) / n,
        "reward/any_correct": sum(map(any, by_prompt.values())) / len(by_prompt),
        "reward/extractable": sum(s.extracted is not None for s in scored) / n,
        "reward/failed": sum(s.failure is not None for s in scored) / n,
        "reward/failed_so_far": float(tally.failed),
        "group/zero_advantage": prepared.zero_groups / prepared.groups,
        "group/advantage_std": float(prepared.advantages.std()),
        "rollout/think_tokens": float(np.mean([(p == Phase.THINK).sum() for p in phases])),
        "rollout/answer_tokens": float(np.mean([(p == Phase.ANSWER).sum() for p in phases])),
        "rollout/entropy": float(entropies.mean()) if len(entropies) else 0.0,
        "rollout/missing": float(collected.record.dropped),
        "rollout/unreadable": float(len(prepared.unreadable)),
        "rollout/attempts": float(collected.attempts),
        "rollout/mib": collected.bytes / 2**20,
    }
    for cause in EndCause:
        out[f"rollout/ended_{cause.name.lower()}"] = ends[cause] / n
    for quarter, value in enumerate(_profile(traces)):
        out[f"rollout/entropy_q{quarter + 1}"] = value
    return out


def _profile(traces: list) -> list[float]:
    """Mean entropy of the four quarters of each chain: paper figure 4 in four numbers."""
    quarters: list[list[float]] = [[], [], [], []]
    for trace in traces:
        entropy = trace.entropy[trace.phase == Phase.THINK]
        if len(entropy) >= 4:
            for quarter, part in zip(quarters, np.array_split(entropy, 4)):
                quarter.append(float(part.mean()))
    return [float(np.mean(q)) if q else 0.0 for q in quarters]


def of_speed(collected: Collected, prepared: Prepared, times: dict[str, float]) -> dict[str, float]:
    """time/..., speed/..., memory/... of one step."""
    generated = sum(len(sample.trace) for sample in collected.samples)
    out = {f"time/{name}": value for name, value in times.items()}
    out["time/reward_wait"] = collected.reward_wait
    out["speed/rollout_tokens"] = generated / max(1e-9, collected.seconds)
    out["speed/train_tokens"] = prepared.tokens / max(1e-9, times["train"])
    out["speed/tokens"] = generated / max(1e-9, times["step"])
    out["memory/peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        out["memory/cuda_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return out


def of_update(found: dict[str, float], before: dict[str, float], update: int) -> dict[str, float]:
    """Metrics of a step after one more update on its batch.

    Later updates change the ratios; losses and agreement stay those of the first, when trainer
    and rollout had the same weights.
    """
    if update == 0:
        return found | before
    return before | {name: value for name, value in found.items() if name.startswith("policy/")}


PHASES = ("rollout", "prepare", "parts", "train", "sync", "keep")
"""What a step spends its time on. parts: gradient norms by part, in steps that measure them; keep:
validation, checkpoint and best model of the step before, whose line was written by then."""


class Clock:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._times = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._times[phase] += time.monotonic() - start

    def times(self) -> dict[str, float]:
        """By phase, and `step`: all of it."""
        return {**self._times, "step": time.monotonic() - self._start}
