"""Accuracy without chance on held-out problems: what chooses the checkpoint to keep."""

from __future__ import annotations

import time

from trainer.collect import VALIDATION_STEP, Collector
from trainer.config import ValidationConfig


def validate(collector: Collector, config: ValidationConfig, version: str) -> dict[str, float]:
    """Greedy accuracy: sigma = 0 in soft and fuzzy thinking, argmax in hard, greedy answers.

    A mixed chain has no greedy form: its policy still draws (with seeds that are the same each
    time), only its noise is off; set `validation.hard` to have a number without chance beside it.

    Returns:
        `validation/accuracy` (share of held-out problems, a failed sample counts as wrong),
        `validation/extractable`, `validation/think_tokens`, and `validation/hard_accuracy` if
        configured, `time/validation`. Healthy: rising with `reward/correct`; training reward
        rising alone means overfitting.
    """
    problems = collector.problems.held_out
    modes = {"": collector.config.rollout.mode}
    if config.hard and modes[""] != "hard":
        modes["hard_"] = "hard"
    out: dict[str, float] = {}
    start = time.monotonic()
    for prefix, mode in modes.items():
        got = collector.ask(
            problems,
            1,
            VALIDATION_STEP,
            version,
            greedy=True,
            mode=mode,
            max_think_tokens=config.max_think_tokens,
        )
        think = [s.trace.summary()["think_tokens"] for s in got.samples]
        out[f"validation/{prefix}accuracy"] = sum(s.correct for s in got.scored) / len(problems)
        out[f"validation/{prefix}extractable"] = sum(
            s.extracted is not None for s in got.scored
        ) / len(problems)
        out[f"validation/{prefix}think_tokens"] = sum(think) / max(1, len(think))
    out["time/validation"] = time.monotonic() - start
    return out
