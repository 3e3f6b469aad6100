"""Before the first step: do trainer and server mean the same thing?

A wrong temperature, support, weight, multiplier or template would train on densities of another
model and look like a run that does not learn.
"""

from __future__ import annotations

from softvllm.core.rollout import Sample
from trainer.collect import PROBE_STEP, Collected, Collector
from trainer.config import ProbeConfig
from trainer.learn import Learner


def ask(collector: Collector, config: ProbeConfig, version: str) -> Collected:
    """Fresh samples of training problems."""
    count = max(1, config.samples // 2)
    problems = [collector.problems.order(collector.config.order_seed, i) for i in range(count)]
    return collector.ask(problems, -(-config.samples // count), PROBE_STEP, version)


def gap_limit(dtypes: set[str], dim: int) -> float:
    """The mean gap, in sigmas, above which server and trainer mean different things.

    In two-byte types their layers round differently, which moves mu by a percent or two of its
    length. sigma is a third of an entry, so a share e of the length is 3 e sqrt(d) sigmas: about 1
    at d = 576. That is harmless (it adds gap^2 / d, here 0.2 %, to the expected distance, and is
    not related to the advantage), while a wrong temperature or model moves mu by half its length.
    The limit is 4 % of the length.
    """
    return 0.2 if dtypes == {"float32"} else 0.12 * dim**0.5


FUZZY_TAU = 0.01
"""Below this temperature mu is nearly one row of the table, and a near-tie is another row."""
MAX_FAR_STEPS = 0.2
"""Share of a fuzzy chain's steps that may lie on the other side of a near-tie."""


def compare(learner: Learner, config: ProbeConfig, samples: list[Sample]) -> dict[str, float]:
    """How far the trainer's densities of them are from the server's.

    Raises:
        ValueError: by more than the configured limits.
    """
    metrics = learner.compare(samples)
    complaints = []
    if "agree/gaussian_distance" in metrics:
        # One flipped argmax adds 2 / 0.33^2 = 18 to its step's distance, so that a mean over a
        # few chains says nothing about the others; the median does.
        fuzzy = samples[0].trace.meta["tau"] < FUZZY_TAU
        kind = "_median" if fuzzy else ""
        distance, far = metrics[f"agree/gaussian_distance{kind}"], metrics["agree/far_steps"]
        if not abs(distance - 1.0) <= config.max_distance_error:
            complaints.append(f"gaussian_distance{kind} is {distance:.3f}, expected 1.0")
        if fuzzy and far > MAX_FAR_STEPS:
            complaints.append(f"{far:.0%} of the steps are elsewhere, limit {MAX_FAR_STEPS:.0%}")
        beyond = metrics[f"agree/mean_gap{kind}"] - metrics["agree/rounding_floor"]
        dtypes = {samples[0].trace.meta["dtype"], learner.config.model.dtype}
        limit = config.max_mean_gap
        limit = gap_limit(dtypes, learner.policy.table.shape[1]) if limit is None else limit
        if not beyond <= limit:
            complaints.append(
                f"the mean gap is {beyond:.3f} sigmas beyond rounding, limit {limit:.2g}"
            )
    mismatch = metrics.get("agree/hard_kl")
    if mismatch is not None and not mismatch <= config.max_mismatch:
        complaints.append(
            f"hard tokens differ by a KL of {mismatch:.4f}, limit {config.max_mismatch}"
        )
    if complaints:
        raise ValueError(
            f"trainer and server disagree: {'; '.join(complaints)}. Check that both have the same "
            "model, that --sync.method is not none for a changed model, and the two dtypes (a "
            "bfloat16 server goes best with model.dtype = bfloat16); the limits are in [probe]"
        )
    return metrics
