"""Whether trainer and rollout mean the same thing: pure functions, healthy ranges with each.

All are per step or per position, so that micro-batches and ranks can be joined before a mean.
"""

from __future__ import annotations

import torch

from softvllm.core import noise
from softvllm.core.noise import gaussian
from trainer.forward import Densities
from trainer.packing import Batch, SoftTerms

FAR = 2.0
"""A Gaussian distance above this is another mean, not chance: with d in the hundreds, chance
stays within a few tenths of 1. Healthy share of such steps: 0 in soft chains; in fuzzy ones the
argmax flips between engine and trainer at near-ties, below 0.05 in two-byte types, 0 in float32."""
_NOISE_ROWS = 256
_MANTISSA = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


def gaussian_distance(densities: Densities) -> torch.Tensor:
    """|h~ - mu|^2 / (d sigma^2) of every Gaussian term, float32 [Ns].

    Expected value 1 (d degrees of freedom), standard deviation sqrt(2 / d) a step. Healthy mean:
    0.98 to 1.02 over a few hundred steps. Above: the trainer's means are not the rollout's; a few
    steps far above 1 under fuzzy: the argmax flipped between engine and trainer. Far below 1:
    sigma is wrong.
    """
    return -2.0 * densities.soft.detach() / max(1, densities.mean.shape[1])


def rollout_mean(terms: SoftTerms, rows: torch.Tensor | None = None) -> torch.Tensor:
    """mu as the rollout had it, float32 [Ns, d]: h~ - sigma z(seed, position).

    Exact up to the rounding of h~ to the rollout's dtype, see `rounding_floor`. `rows`: only
    these terms.
    """
    rows = _spread(len(terms.value), None, terms.value.device) if rows is None else rows
    dim = terms.value.shape[1]
    parts = [terms.value.new_zeros(0, dim, dtype=torch.float32)]
    for part in rows.split(_NOISE_ROWS):
        z = gaussian(terms.seed[part], terms.position[part], dim, noise.NOISE)
        parts.append(terms.value[part].float() - terms.sigma[part, None] * z)
    return torch.cat(parts)


def mean_gap(batch: Batch, densities: Densities, limit: int | None = None) -> torch.Tensor:
    """|mu_trainer - mu_rollout| / sigma of the Gaussian terms, float32 [Ns].

    The standard deviation of the log-ratio between the two densities of a step; its square / 2 is
    their KL in nats. Healthy: mean below 0.02 in float32 and p99 below 0.05; a two-byte rollout
    cannot show less than `rounding_floor`, and two-byte layers show about 0.04 to 0.08 sqrt(d)
    (`trainer.probe.gap_limit`). Alarm: float32 above 0.05, two-byte above 0.12 sqrt(d).

    Args:
        limit: compute it for that many steps, evenly spread, at most.
    """
    rows = _spread(len(batch.soft.value), limit, batch.soft.value.device)
    gap = densities.mean.detach()[rows].float() - rollout_mean(batch.soft, rows)
    return gap.norm(dim=-1) / batch.soft.sigma[rows]


def rounding_floor(batch: Batch) -> torch.Tensor:
    """What `mean_gap` shows for equal means because h~ was rounded to its dtype, float32 [Ns].

    sqrt(sum of ulp^2 / 12) / sigma: about 0.06 at d = 576 in bfloat16, growing with sqrt(d), 0 in
    float32. A property of the measurement, not of the trainer: the density is that of the rounded
    h~, which the model really read.
    """
    terms = batch.soft
    # frexp: |x| = m 2^e with m in [1/2, 1), so that one ulp is 2^(e - mantissa bits).
    exponent = torch.frexp(terms.value.float()).exponent.float()
    ulp = torch.exp2(exponent - _MANTISSA[terms.value.dtype]) * (terms.value != 0)
    return (ulp.square().sum(-1) / 12.0).sqrt() / terms.sigma


def hard_mismatch(batch: Batch, densities: Densities) -> torch.Tensor:
    """KL(rollout || trainer) estimated at each hard token with a rollout log-prob, float32 [<= Nh].

    exp(x) - 1 - x with x = log p_trainer - log p_rollout (k3, non-negative). Healthy at the first
    micro-batch of a step, before any update: mean below 1e-6 in float32, below 1e-2 in bfloat16
    (2e-3 on SmolLM2, from the layers' rounding on both sides). Above: wrong temperature or
    support, stale weights, other weights than the server's, or a dtype gap.
    """
    rollout = batch.hard.rollout_log_prob
    known = ~rollout.isnan()
    x = densities.hard.detach()[known].float() - rollout[known]
    return torch.expm1(x) - x


def entropy_by_position(entropies: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean entropy of the unscaled next-token distribution at each think position.

    Paper figure 4. Healthy: a flat or slowly falling profile, 0.1 to 2 nats. Rising along the
    chain: it loses the thread (hard sampling at tau 1 on a base model). Collapsed to the greedy
    profile: overconfident, pass@k is being lost.

    Args:
        entropies: one float [T_i] per sample, e.g. `Episode.entropy`.

    Returns:
        mean float32 [max T] and the number of samples behind each, int64 [max T].
    """
    longest = max((len(e) for e in entropies), default=0)
    total, count = (
        torch.zeros(longest, dtype=torch.float64),
        torch.zeros(longest, dtype=torch.int64),
    )
    for e in entropies:
        total[: len(e)] += e.double()
        count[: len(e)] += 1
    return (total / count).float(), count


def summary(values: torch.Tensor) -> dict[str, float]:
    """mean, median, p99 and max of per-step values; zeros if there are none."""
    if not len(values):
        return {"mean": 0.0, "median": 0.0, "p99": 0.0, "max": 0.0}
    ordered = values.float().sort().values
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    middle = float(ordered[(len(ordered) - 1) // 2])
    return {
        "mean": float(ordered.mean()),
        "median": middle,
        "p99": float(p99),
        "max": float(ordered[-1]),
    }


def _spread(n: int, limit: int | None, device: torch.device) -> torch.Tensor:
    if limit is None or n <= limit:
        return torch.arange(n, device=device)
    return torch.linspace(0, n - 1, limit, device=device).long()
