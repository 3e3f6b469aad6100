"""`finish.finish` in one launch: a program per row (CUDA; tested under the interpreter)."""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

from softvllm.core import policies
from softvllm.core.params import (
    MAX_END_LENGTH,
    MAX_END_SEQUENCES,
    MAX_FORCED_LENGTH,
    MAX_STOP_IDS,
)
from softvllm.core.phases import EndCause, Phase, SlotState
from softvllm.core.trace import Kind
from softvllm.engine.finish import Finished, FinishInputs

_ENDS, _TAIL = tl.constexpr(MAX_END_SEQUENCES), tl.constexpr(MAX_END_LENGTH)
_FORCED, _STOPS = tl.constexpr(MAX_FORCED_LENGTH), tl.constexpr(MAX_STOP_IDS)
_STATES = tl.constexpr(policies.NUM_STATES)
_THINK, _IN_FORCED = tl.constexpr(int(Phase.THINK)), tl.constexpr(int(Phase.FORCED))
_ANSWER = tl.constexpr(int(Phase.ANSWER))
_SEQUENCE, _BUDGET = tl.constexpr(int(EndCause.END_SEQUENCE)), tl.constexpr(int(EndCause.BUDGET))
_EOS, _COLD = tl.constexpr(int(EndCause.EOS)), tl.constexpr(int(EndCause.COLD_STOP))
_K_SAMPLED, _K_SOFT = tl.constexpr(int(Kind.SAMPLED)), tl.constexpr(int(Kind.SOFT))
_K_FORCED, _K_BOTH = tl.constexpr(int(Kind.FORCED)), tl.constexpr(int(Kind.SOFT_SAMPLED))
# Columns of SlotState's matrices.
_MAX_THINK, _MIN_THINK = tl.constexpr(SlotState.MAX_THINK), tl.constexpr(SlotState.MIN_THINK)
_COLD_STEPS = tl.constexpr(SlotState.COLD_STEPS)
_LEN_END, _LEN_CUT = tl.constexpr(SlotState.LEN_END), tl.constexpr(SlotState.LEN_CUT)
_COLD_ENTROPY = tl.constexpr(SlotState.COLD_ENTROPY)
_PHASE, _SEL = tl.constexpr(SlotState.PHASE), tl.constexpr(SlotState.FORCED_SEL)
_POS, _CAUSE = tl.constexpr(SlotState.FORCED_POS), tl.constexpr(SlotState.CAUSE)
_COLD_COUNT = tl.constexpr(SlotState.COLD_COUNT)


@triton.jit
def _finish_kernel(
    ints_ptr,
    num_ints,
    floats_ptr,
    num_floats,
    forced_ptr,
    stops_ptr,
    ends_ptr,
    dyn_ptr,
    num_dyn,
    tail_ptr,
    policy_ptr,
    rows_ptr,
    slots_ptr,
    position_ptr,
    think_at_ptr,
    think_token_ptr,
    think_soft_ptr,
    think_sampled_ptr,
    think_log_prob_ptr,
    think_entropy_ptr,
    think_state_ptr,
    answer_at_ptr,
    answer_token_ptr,
    answer_log_prob_ptr,
    tokens_ptr,
    is_soft_ptr,
    out_ints_ptr,
    out_floats_ptr,
    out_policy_ptr,
    num_rows,
):
    r = tl.program_id(0)
    slot = tl.load(slots_ptr + r)
    position = tl.load(position_ptr + r)
    ti = tl.load(think_at_ptr + r)
    ai = tl.load(answer_at_ptr + r)
    has_think, has_answer = ti >= 0, ai >= 0
    think_token = tl.load(think_token_ptr + ti, mask=has_think, other=0)
    soft = tl.load(think_soft_ptr + ti, mask=has_think, other=0) != 0
    drawn = tl.load(think_sampled_ptr + ti, mask=has_think, other=0) != 0
    entropy = tl.load(think_entropy_ptr + ti, mask=has_think, other=0.0)
    ints, dyn = ints_ptr + slot * num_ints, dyn_ptr + slot * num_dyn

    # 1. A stop token as shadow ends thinking before this position is emitted.
    phase = tl.load(dyn + _PHASE)
    min_think = tl.load(ints + _MIN_THINK)
    len_cut = tl.load(ints + _LEN_CUT)
    stops = tl.load(stops_ptr + slot * _STOPS + tl.arange(0, _STOPS))
    is_stop = tl.max((stops == think_token).to(tl.int32), axis=0) > 0
    eos = (phase == _THINK) & is_stop & (position >= min_think)
    sel = tl.where(eos, 1, tl.load(dyn + _SEL))
    pos = tl.where(eos, 0, tl.load(dyn + _POS))
    cause = tl.where(eos, _EOS, tl.load(dyn + _CAUSE))
    phase = tl.where(eos, tl.where(len_cut > 0, _IN_FORCED, _ANSWER), phase)

    # 2. Emit.
    is_think, is_forced, is_answer = phase == _THINK, phase == _IN_FORCED, phase == _ANSWER
    at = tl.minimum(sel * _FORCED + pos, 2 * _FORCED - 1)
    forced_token = tl.load(forced_ptr + slot * (2 * _FORCED) + at)
    answer_token = tl.load(answer_token_ptr + ai, mask=has_answer, other=0)
    token = tl.where(is_think, think_token, tl.where(is_forced, forced_token, answer_token))

    # 3. Think steps: did this token end the think phase?
    column = tl.arange(0, _TAIL)
    tail_row = tail_ptr + slot * _TAIL
    old = tl.load(tail_row + column)
    shifted = tl.load(tail_row + column + 1, mask=column < _TAIL - 1, other=0)
    shifted = tl.where(column == _TAIL - 1, token, shifted)
    tail = tl.where(is_think, shifted, old)
    line = tl.arange(0, _ENDS)
    ends = tl.load(ends_ptr + slot * (_ENDS * _TAIL) + line[:, None] * _TAIL + column[None, :])
    fits = tl.min(((ends == -1) | (ends == tail[None, :])).to(tl.int32), axis=1)
    used = tl.max(((ends != -1) & (column[None, :] == _TAIL - 1)).to(tl.int32), axis=1)
    matches = tl.max(fits * used, axis=0) > 0
    count = position + 1
    may_end = is_think & (count >= min_think)
    matched = may_end & matches
    is_cold = entropy < tl.load(floats_ptr + slot * num_floats + _COLD_ENTROPY)
    cold = tl.where(is_think & is_cold, tl.load(dyn + _COLD_COUNT) + 1, 0)
    frozen = may_end & (matched == 0) & (cold >= tl.load(ints + _COLD_STEPS))
    spent = is_think & (matched == 0) & (count >= tl.load(ints + _MAX_THINK))
    ended = matched | spent | frozen
    why = tl.where(matched, _SEQUENCE, tl.where(spent, _BUDGET, _COLD))
    cause = tl.where(ended, why, cause)
    sel = tl.where(ended, tl.where(matched, 0, 1), sel)

    # 4. Next phase.
    pos = tl.where(is_forced, pos + 1, tl.where(ended, 0, pos))
    length = tl.where(sel == 0, tl.load(ints + _LEN_END), len_cut)
    moves = is_forced | ended
    next_phase = tl.where(moves, tl.where(pos < length, _IN_FORCED, _ANSWER), phase)
    tl.store(dyn + _PHASE, next_phase)
    tl.store(dyn + _SEL, sel)
    tl.store(dyn + _POS, pos)
    tl.store(dyn + _CAUSE, cause)
    tl.store(dyn + _COLD_COUNT, cold)
    # Every lane has read the old tail before any lane overwrites its neighbour's place.
    tl.debug_barrier()
    tl.store(tail_row + column, tail)

    # 5. Token, overlay flag, policy state and record.
    soft = soft & is_think
    kind = tl.where(soft, tl.where(drawn, _K_BOTH, _K_SOFT), _K_SAMPLED)
    kind = tl.where(is_forced, _K_FORCED, kind)
    log_prob = tl.load(think_log_prob_ptr + ti, mask=has_think & is_think, other=0.0)
    log_prob += tl.load(answer_log_prob_ptr + ai, mask=has_answer & is_answer, other=0.0)
    tl.store(tokens_ptr + tl.load(rows_ptr + r), token)
    tl.store(is_soft_ptr + slot, soft)
    state = tl.arange(0, _STATES)
    keep = tl.load(policy_ptr + slot * _STATES + state)
    takes = has_think & is_think
    new = tl.load(think_state_ptr + ti * _STATES + state, mask=takes & (state >= 0), other=0.0)
    new = tl.where(takes, new, keep)
    tl.store(policy_ptr + slot * _STATES + state, new)
    tl.store(out_policy_ptr + r * _STATES + state, new)
    tl.store(out_ints_ptr + r, phase)
    tl.store(out_ints_ptr + num_rows + r, kind)
    tl.store(out_ints_ptr + 2 * num_rows + r, cause)
    tl.store(out_ints_ptr + 3 * num_rows + r, token)
    tl.store(out_floats_ptr + r, log_prob)
    tl.store(out_floats_ptr + num_rows + r, tl.where(is_think, entropy, 0.0))


def finish(x: FinishInputs) -> Finished:
    """Reference: `softvllm.engine.finish.finish`."""
    state, count, device = x.state, x.slots.shape[0], x.slots.device
    out = Finished(
        torch.empty(4, count, dtype=torch.int64, device=device),
        torch.empty(2, count, dtype=torch.float32, device=device),
        torch.empty(count, policies.NUM_STATES, dtype=torch.float32, device=device),
    )
    t = x.think
    # Where nothing thinks, every load from the think arrays is masked off: any pointer will do.
    think = (
        (x.slots, x.is_soft, x.is_soft, out.floats, out.floats, out.policy_state)
        if t is None
        else (t.token, t.soft, t.sampled, t.log_prob, t.entropy, t.state)
    )
    _finish_kernel[(count,)](
        state.ints,
        state.ints.shape[1],
        state.floats,
        state.floats.shape[1],
        state.forced,
        state.stops,
        state.ends,
        state.dyn,
        state.dyn.shape[1],
        state.tail,
        state.policy_state,
        x.rows.contiguous(),
        x.slots.contiguous(),
        x.position.contiguous(),
        x.think_at.contiguous(),
        *(value.contiguous() for value in think),
        x.answer_at.contiguous(),
        x.answer_token.contiguous(),
        x.answer_log_prob.contiguous(),
        x.tokens,
        x.is_soft,
        out.ints,
        out.floats,
        out.policy_state,
        count,
        num_warps=1,
    )
    return out
