"""Densities and advantages to the loss (paper eq. 7-15), exactly additive over micro-batches.

    L = -(1 / N) sum_i A_i sum_t log pi(step t of sample i)

over the N = B x G samples of the *global* batch: sums over steps and dimensions, no length
normalisation, no KL, no clipping, no entropy bonus, no weight between think and answer. Everything
else here is a named option that defaults to the paper. docs/objective.md has the derivations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from trainer.episodes import Episode
from trainer.forward import Densities
from trainer.packing import Batch

Ratio = Literal["none", "plain", "clip"]
DimNorm = Literal["sum", "root", "mean"]
LengthNorm = Literal["none", "sequence", "batch"]
Correction = Literal["none", "truncate", "mask"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What is maximised. Defaults: the paper's loss."""

    ratio: Ratio = "none"
    """none: score function A log pi, for one strictly on-policy update per batch. plain: A r with
    r = pi / pi_old of each step. clip: PPO's min(A r, A clip(r)), the other half of GRPO."""
    clip_low: float = 0.2
    """clip: r is kept above 1 - clip_low."""
    clip_high: float = 0.2
    """clip: r is kept below 1 + clip_high."""
    max_log_ratio: float = 5.0
    """plain and clip: |log r| of a step is cut here (beyond, the step gets no gradient). A soft
    step's log ratio grows with the dimension, so an exponential without a bound overflows."""
    soft_dims: DimNorm = "sum"
    """sum: a soft step's log-density is the sum over the d coordinates, as in the paper. root: that
    sum / sqrt(d): the score z / sigma is then as long as that of one coordinate, whatever d. mean:
    the sum / d, which puts soft steps on the scale of hard tokens; ratios and KL follow."""
    lengths: LengthNorm = "none"
    """none: sum over a sample's steps (paper). sequence: mean over them (GRPO). batch: sum over all
    steps / all steps of the global batch (DAPO)."""
    correction: Correction = "none"
    """Importance weight pi_train / pi_rollout on hard tokens, against engine mismatch. truncate:
    min(w, correction_cap). mask: tokens with w outside [1 / cap, cap] do not count."""
    correction_cap: float = 2.0
    """Cap of `correction`, > 1."""
    kl_coef: float = 0.0
    """Weight of the KL to a reference model that reads the same soft inputs."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus on hard steps (their own temperature and support)."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("ratio", Ratio),
            ("soft_dims", DimNorm),
            ("lengths", LengthNorm),
            ("correction", Correction),
        ):
            if getattr(self, name) not in get_args(allowed):
                known = ", ".join(get_args(allowed))
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not 0.0 < self.clip_low < 1.0 or not self.clip_high > 0.0:
            raise ValueError("clip_low must be in (0, 1) and clip_high above 0")
        if not self.max_log_ratio > 0.0 or not self.correction_cap > 1.0:
            raise ValueError("max_log_ratio must be above 0 and correction_cap above 1")


@dataclass(frozen=True, slots=True)
class Normaliser:
    """Sizes of the global batch: all micro-batches of all ranks, also samples with advantage 0
    that are not computed. A per-rank count would give ranks with fewer samples more weight."""

    samples: float
    decisions: float
    """Positions with a term, of all samples."""

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Normaliser:
        """Of one rank's episodes; add the ranks' numbers before use."""
        return cls(len(episodes), sum(e.num_decisions for e in episodes))


@dataclass(frozen=True, slots=True)
class Loss:
    """A micro-batch's share of the loss; shares add up, no mean over micro-batches or ranks.

    FSDP and DDP average gradients over ranks: multiply `total` by the number of ranks.
    """

    total: torch.Tensor
    """What to differentiate: the sum of the parts."""
    soft: torch.Tensor
    """Gaussian terms."""
    think: torch.Tensor
    """Hard tokens of the think phase."""
    answer: torch.Tensor
    """Hard tokens of the answer."""
    kl: torch.Tensor
    """kl_coef x KL."""
    entropy: torch.Tensor
    """-entropy_coef x entropy."""
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Metric name to (sum, count); add both over micro-batches and ranks, then divide:

    - ratio_soft, ratio_hard: mean pi / pi_old; healthy 0.9 to 1.1 (0.5 to 2 for soft).
    - clipped_soft, clipped_hard: share of steps whose gradient the clip cut; healthy below 0.2.
    - correction: mean weight; healthy 0.95 to 1.05. corrected: share cut; healthy below 0.02.
    - kl: nats per decision; healthy below 0.1 with soft_dims="mean", and any slowly rising value
      with "sum".
    - entropy: nats per hard step; healthy: falling slowly, not to 0.
    """


def loss(
    batch: Batch,
    now: Densities,
    advantages: torch.Tensor,
    normaliser: Normaliser,
    config: ObjectiveConfig,
    *,
    old: Densities | None = None,
    reference: Densities | None = None,
) -> Loss:
    """Loss share of a micro-batch.

    Args:
        batch: S episodes.
        now: densities of the weights being trained, with gradients.
        advantages: float [S], constants.
        old: densities of the weights that sampled, *recomputed by the trainer* (detached), for
            `ratio` and `correction`. Rollout densities would not do for soft steps: a relative
            error of 0.5 % in mu is a log ratio of about 1 at d = 4096.
        reference: densities of the reference model, for the KL.

    Raises:
        ValueError: a part that the options need is missing.
    """
    _check(now, config, old, reference)
    soft, hard, dim = batch.soft, batch.hard, max(1, now.mean.shape[1])
    per_dim = {"sum": 1.0, "root": dim**-0.5, "mean": 1.0 / dim}[config.soft_dims]
    weights = _sequence_weights(batch, normaliser, config)
    gains = advantages.to(weights) * weights
    sums: dict[str, tuple[float, float]] = {}

    def surrogate(
        log_pi: torch.Tensor, log_old: torch.Tensor | None, a: torch.Tensor, name: str
    ) -> torch.Tensor:
        if config.ratio == "none" or log_old is None:
            return a * log_pi
        limit = config.max_log_ratio
        ratio = (log_pi - log_old).clamp(-limit, limit).exp()
        value = a * ratio
        if config.ratio == "clip":
            bounded = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
            value = torch.minimum(value, a * bounded)
            cut = (a * bounded < a * ratio).float()
            sums[f"clipped_{name}"] = _sum(cut)
        sums[f"ratio_{name}"] = _sum(ratio)
        return value

    soft_old = None if old is None else old.soft * per_dim
    soft_gain = gains[soft.sequence]
    soft_values = surrogate(now.soft * per_dim, soft_old, soft_gain, "soft")
    hard_gain = gains[hard.sequence]
    if config.correction != "none":
        weight = _correction(batch, now if old is None else old, config, sums)
        hard_gain = hard_gain * weight
    hard_values = surrogate(now.hard, None if old is None else old.hard, hard_gain, "hard")

    zero = now.hard.sum() * 0.0
    kl, entropy = zero, zero
    if config.kl_coef and reference is not None:
        soft_kl, hard_kl = kl_terms(batch, now, reference)
        soft_kl = soft_kl * per_dim
        both = (soft_kl * weights[soft.sequence]).sum() + (hard_kl * weights[hard.sequence]).sum()
        kl = config.kl_coef * both
        total, _ = _sum(torch.cat((soft_kl, hard_kl)))
        sums["kl"] = (total, float(batch.num_decisions.sum()))
    if now.entropy is not None:
        sums["entropy"] = _sum(now.entropy)
    if config.entropy_coef and now.entropy is not None:
        entropy = -config.entropy_coef * (now.entropy * weights[hard.sequence]).sum()

    soft_part = -soft_values.sum()
    think = -hard_values.where(hard.think, 0.0).sum()
    answer = -hard_values.where(~hard.think, 0.0).sum()
    total_loss = soft_part + think + answer + kl + entropy
    return Loss(total_loss, soft_part, think, answer, kl, entropy, sums)


def kl_terms(
    batch: Batch, now: Densities, reference: Densities
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(pi || reference) of every term on the visited chain: soft [Ns], hard [Nh], nats.

    Soft: exact, |mu - mu_ref|^2 / (2 sigma^2) of two Gaussians of equal covariance. Hard: the
    non-negative estimate exp(-x) - 1 + x of x = log pi - log ref at the drawn token (k3).
    """
    sigma = batch.soft.sigma.to(now.mean.dtype)
    soft = (now.mean - reference.mean).square().sum(-1) / (2.0 * sigma**2)
    x = now.hard - reference.hard
    return soft, torch.expm1(-x) + x


def _check(
    now: Densities, config: ObjectiveConfig, old: Densities | None, reference: Densities | None
) -> None:
    if config.ratio != "none" and old is None:
        raise ValueError(
            f'ratio="{config.ratio}" needs `old`, the densities at the sampling weights; with one '
            'on-policy update per batch use ratio="none"'
        )
    if config.kl_coef and reference is None:
        raise ValueError("kl_coef needs `reference`, the densities of a reference model")
    if config.entropy_coef and now.entropy is None:
        raise ValueError("entropy_coef needs densities computed with_entropy=True")


def _sequence_weights(
    batch: Batch, normaliser: Normaliser, config: ObjectiveConfig
) -> torch.Tensor:
    """Weight of each sample's steps, float32 [S]."""
    count = batch.num_decisions.to(batch.soft.tau)
    if config.lengths == "batch":
        return torch.full_like(count, 1.0 / max(1.0, normaliser.decisions))
    even = torch.full_like(count, 1.0 / normaliser.samples)
    return even / count.clamp(min=1) if config.lengths == "sequence" else even


def _correction(
    batch: Batch, at_rollout: Densities, config: ObjectiveConfig, sums: dict
) -> torch.Tensor:
    """Weight of each hard term, constants [Nh]; 1 where the rollout gave no log-prob."""
    gap = (at_rollout.hard.detach() - batch.hard.rollout_log_prob).nan_to_num(nan=0.0)
    weight = gap.clamp(-20.0, 20.0).exp()
    cap = config.correction_cap
    if config.correction == "truncate":
        out, cut = weight.clamp(max=cap), weight > cap
    else:
        cut = (weight > cap) | (weight < 1.0 / cap)
        out = weight.masked_fill(cut, 0.0)
    sums["correction"], sums["corrected"] = _sum(weight), _sum(cut.float())
    return out


def _sum(values: torch.Tensor) -> tuple[float, float]:
    return float(values.detach().sum()), float(values.numel())
