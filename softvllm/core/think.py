"""One think step of a batch of rows: from logits to the next input embedding.

The single place where distribution, policy, mixture and noise meet. Engine and oracle both
call it; the engine passes a faster `expect` where one has been shown to match.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from softvllm.core import mixture, noise, policies
from softvllm.core.mixture import Distribution
from softvllm.core.phases import SlotState

Expect = Callable[[Distribution], torch.Tensor]
"""h = p E for a distribution: float32 [B, d]. Bound to a table (or a shard of it)."""
Gather = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""sum_j w_j E[id_j] for ids [B, K], weights [B, K]: float32 [B, d]."""
Uniform = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
"""uniform(seed, position, stream, index): float64 [B], as `noise.uniform`."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that share policy and kind of support, as known to the host."""

    policy: str
    sparse: bool
    max_top_k: int = 0
    """Largest top_k among the rows (sparse only)."""
    uses_top_p: bool = False
    uses_min_p: bool = False
    masks_stop: bool = False
    """Whether a row may still be below its min_think_tokens."""
    record_top: int = 0
    """Largest number of top tokens wanted for the record; 0: none."""
    record_sparse: bool = False


@dataclass(slots=True)
class ThinkStep:
    """What R rows would show and feed if the position is a think step."""

    token: torch.Tensor  # int64 [R]
    soft: torch.Tensor  # bool [R]
    sampled: torch.Tensor  # bool [R]
    log_prob: torch.Tensor  # float32 [R]; 0 where not sampled
    entropy: torch.Tensor  # float32 [R]
    mean: torch.Tensor  # float32 [R, d]: h, without noise; garbage where not soft
    state: torch.Tensor  # float32 [R, NUM_STATES]
    top_ids: torch.Tensor | None = None  # int64 [R, record_top]
    top_probs: torch.Tensor | None = None  # float32 [R, record_top]
    sparse_ids: torch.Tensor | None = None  # int64 [R, K]
    sparse_weights: torch.Tensor | None = None  # float32 [R, K], 0 = unused column


def think_step(
    group: Group,
    logits: torch.Tensor,
    state: SlotState,
    slots: torch.Tensor,
    position: torch.Tensor,
    expect: Expect,
    gather: Gather,
    uniform: Uniform = noise.uniform,
    read: mixture.Read = mixture.read,
) -> ThinkStep:
    """Compute a group's think step.

    Args:
        logits: [R, V] of any float type, real vocabulary only.
        slots, position: int64 [R].
        expect, gather: the mixture over this model's table.
        uniform, read: `noise.uniform` and `mixture.read`, or faster functions of the same values.
    """
    ints, floats = state.ints[slots], state.floats[slots]
    if group.masks_stop:
        logits = _mask_stops(logits, state, slots, position < ints[:, state.MIN_THINK])
    reading = read(
        logits,
        mixture.Support(
            tau=floats[:, state.TAU],
            top_k=ints[:, state.TOP_K] if group.sparse else None,
            top_p=floats[:, state.TOP_P] if group.uses_top_p else None,
            min_p=floats[:, state.MIN_P] if group.uses_min_p else None,
            max_top_k=group.max_top_k,
        ),
    )
    dist = reading.dist
    seeds = ints[:, state.SEED]
    ctx = policies.StepContext(
        dist=dist,
        shadow=reading.shadow,
        entropy=reading.entropy,
        params=floats[:, state.POLICY :],
        state=state.policy_state[slots],
        uniform=lambda i: uniform(seeds, position, noise.POLICY, i),
        sample_uniform=lambda: uniform(seeds, position, noise.SAMPLE, 0),
    )
    decision = policies.get(group.policy).decide(ctx)
    log_prob = torch.where(decision.sampled, dist.log_prob(decision.token), 0.0)
    step = ThinkStep(
        token=decision.token,
        soft=decision.soft,
        sampled=decision.sampled,
        log_prob=log_prob,
        entropy=reading.entropy,
        mean=_mean(group, dist, decision, expect, gather),
        state=ctx.state if decision.state is None else decision.state,
    )
    if group.record_top:
        step.top_ids, step.top_probs = dist.top(group.record_top)
    if group.record_sparse:
        step.sparse_ids, step.sparse_weights = _sparse_record(dist, decision)
    return step


def _mean(
    group: Group,
    dist: Distribution,
    decision: policies.Decision,
    expect: Expect,
    gather: Gather,
) -> torch.Tensor:
    if group.policy == "hard":
        return torch.zeros(0)
    mean = expect(dist)
    if decision.extra_ids is None or decision.extra_weights is None:
        return mean
    extra = gather(decision.extra_ids, decision.extra_weights)
    return decision.mix_weight[:, None] * mean + extra


def _sparse_record(
    dist: Distribution, decision: policies.Decision
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights whose weighted sum of rows is h."""
    assert isinstance(dist, mixture.Sparse)
    ids, weights = dist.ids, dist.probs * decision.mix_weight[:, None]
    if decision.extra_ids is not None and decision.extra_weights is not None:
        # Extras first: the leading extra + top_k columns of a row are then its own.
        ids = torch.cat((decision.extra_ids, ids), dim=1)
        weights = torch.cat((decision.extra_weights, weights), dim=1)
    return ids, weights


def _mask_stops(
    logits: torch.Tensor, state: SlotState, slots: torch.Tensor, early: torch.Tensor
) -> torch.Tensor:
    """-inf on the stop tokens of rows that may not end yet, as vLLM's min_tokens does."""
    stops = state.stops[slots]
    at = stops.clamp(min=0)
    hide = early[:, None] & (stops >= 0)
    current = logits.gather(1, at)
    # Unused entries all point at column 0: only a row whose real stop id is 0 may hide it.
    out = logits.clone()
    out.scatter_reduce_(
        1, at, torch.where(hide, float("-inf"), current), reduce="amin", include_self=True
    )
    return out


def sample_answer(
    logits: torch.Tensor,
    state: SlotState,
    slots: torch.Tensor,
    position: torch.Tensor,
    uniform: Uniform = noise.uniform,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw answer tokens from logits that the request's sampling parameters have shaped.

    Temperature, top-k/p, penalties and grammar are already in `logits` (float32 [R, V], -inf
    outside the support); rows marked greedy take the argmax. Counter-based like everything
    else, so that an answer does not depend on its neighbours or on a preemption.

    Returns:
        ids int64 [R] and their log-prob float32 [R] under exactly this distribution (0 for
        greedy rows: a point mass; NaN for any row whose logits hold one).
    """
    ints = state.ints[slots]
    greedy = ints[:, state.GREEDY] > 0
    probs = torch.softmax(logits, dim=-1)
    u = uniform(ints[:, state.SEED], position, noise.ANSWER, 0)
    drawn = mixture.inverse_cdf(probs, u)
    token = torch.where(greedy, logits.argmax(dim=-1), drawn)
    log_prob = probs.gather(1, token[:, None])[:, 0].log()
    return token, torch.where(greedy & ~log_prob.isnan(), 0.0, log_prob)
