"""The end of a sampling step for all rows: phase machine, tokens, record. Plain torch.

This is what a CPU runs and the reference for the one-launch Triton kernel that CUDA runs
(`triton_finish.py`); sixty small launches would cost a GPU more than the mixture itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from softvllm.core import phases
from softvllm.core.phases import Phase, SlotState
from softvllm.core.think import ThinkStep
from softvllm.core.trace import Kind


@dataclass(slots=True)
class FinishInputs:
    """R rows of ours among the batch's N; everything on the device, written in place."""

    state: SlotState
    rows: torch.Tensor  # int64 [R]: our rows of the batch
    slots: torch.Tensor  # int64 [R]
    position: torch.Tensor  # int64 [R]
    think_at: torch.Tensor  # int64 [R]: row in `think`, -1 = cannot be a think step
    think: ThinkStep | None
    answer_at: torch.Tensor  # int64 [R]: row in the answer arrays, -1 = cannot be an answer
    answer_token: torch.Tensor  # int64 [Ra]
    answer_log_prob: torch.Tensor  # float32 [Ra]
    tokens: torch.Tensor  # int64 [N]: the stock sampler's tokens; ours are replaced in place
    is_soft: torch.Tensor  # bool [S + ..]: overlay flags, written at our slots


@dataclass(slots=True)
class Finished:
    """The record's small columns."""

    ints: torch.Tensor  # int64 [4, R]: phase, kind, cause, token
    floats: torch.Tensor  # float32 [2, R]: log-prob, entropy
    policy_state: torch.Tensor  # float32 [R, NUM_STATES]


def _take(source: torch.Tensor | None, at: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """source[at], and zero where at is -1."""
    if source is None or source.shape[0] == 0:
        return torch.zeros(at.shape, dtype=dtype, device=at.device)
    return torch.where(at >= 0, source[at.clamp(min=0)], torch.zeros((), dtype=dtype))


def finish(x: FinishInputs) -> Finished:
    """Emit one position per row and move on; see `FinishInputs` for what is written."""
    think, state = x.think, x.state

    def thought(name: str, dtype: torch.dtype) -> torch.Tensor:
        return _take(getattr(think, name) if think else None, x.think_at, dtype)

    soft, drawn = thought("soft", torch.bool), thought("sampled", torch.bool)
    entropy = thought("entropy", torch.float32)
    emitted = phases.advance(
        state,
        x.slots,
        x.position,
        thought("token", torch.int64),
        _take(x.answer_token, x.answer_at, torch.int64),
        entropy,
    )
    soft &= emitted.is_think
    kind = torch.where(
        soft,
        torch.where(drawn, int(Kind.SOFT_SAMPLED), int(Kind.SOFT)),
        torch.where(emitted.phase == Phase.FORCED, int(Kind.FORCED), int(Kind.SAMPLED)),
    )
    log_prob = torch.where(
        emitted.is_think,
        thought("log_prob", torch.float32),
        torch.where(emitted.is_answer, _take(x.answer_log_prob, x.answer_at, torch.float32), 0.0),
    )
    entropy = torch.where(emitted.is_think, entropy, 0.0)
    x.tokens[x.rows] = emitted.token
    x.is_soft[x.slots] = soft
    policy = state.policy_state[x.slots]
    if think is not None:
        chosen = torch.where(
            (x.think_at >= 0)[:, None], think.state[x.think_at.clamp(min=0)], policy
        )
        policy = torch.where(emitted.is_think[:, None], chosen, policy)
        state.policy_state[x.slots] = policy
    return Finished(
        torch.stack((emitted.phase, kind, emitted.cause, emitted.token)),
        torch.stack((log_prob, entropy)),
        policy,
    )
