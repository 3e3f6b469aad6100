"""The phase machine: think -> forced tokens -> answer, resolved on the device.

One slot per running request, all state in tensors, every transition a few vectorised
operations: nothing is read back, so it runs ahead of the host under async scheduling.

What ends thinking (checked in this order at each think step, none before `min_think`):

- the shadow token is a stop token: this very position becomes the first forced token (or, with
  no forced text, the first answer token); the stop token is never shown, so the scheduler does
  not end the request;
- the shadow sequence ends with an end sequence, the budget is reached, or the entropy stayed
  low: the token is the last think token and the forced text starts at the next position.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from softvllm.core import policies
from softvllm.core.params import (
    MAX_END_LENGTH,
    MAX_END_SEQUENCES,
    MAX_FORCED_LENGTH,
    MAX_STOP_IDS,
)
from softvllm.core.resolve import ResolvedCoT


class Phase(IntEnum):
    """Phase in force at the next generated position."""

    OFF = 0
    THINK = 1
    FORCED = 2
    ANSWER = 3


class EndCause(IntEnum):
    """Why the think phase ended."""

    UNFINISHED = 0
    END_SEQUENCE = 1
    BUDGET = 2
    EOS = 3
    COLD_STOP = 4


class SlotState:
    """Device state of all slots; row s belongs to one running request.

    Integer and float columns live in two matrices, so that adding a request is three small
    copies instead of twenty.
    """

    # Columns of `ints` [S, ...] (int64) and `floats` [S, ...] (float32).
    SEED, MAX_THINK, MIN_THINK, TOP_K, COLD_STEPS, LEN_END, LEN_CUT, GREEDY = range(8)
    TAU, GAMMA, TOP_P, MIN_P, COLD_ENTROPY = range(5)
    POLICY = 5  # first of NUM_PARAMS columns
    PHASE, FORCED_SEL, FORCED_POS, CAUSE, COLD_COUNT = range(5)  # columns of `dyn`

    def __init__(self, num_slots: int, device: torch.device | str) -> None:
        def make(width: int, dtype: torch.dtype, fill: float = 0) -> torch.Tensor:
            return torch.full((num_slots, width), fill, dtype=dtype, device=device)

        self.ints = make(8, torch.int64)
        self.floats = make(self.POLICY + policies.NUM_PARAMS, torch.float32)
        self.forced = make(2 * MAX_FORCED_LENGTH, torch.int64)  # [S, after_end | after_cut]
        self.stops = make(MAX_STOP_IDS, torch.int64, -1)
        self.ends = make(MAX_END_SEQUENCES * MAX_END_LENGTH, torch.int64, -1)  # right-aligned
        self.dyn = make(5, torch.int64)
        self.tail = make(MAX_END_LENGTH, torch.int64, -2)  # last shadow ids, newest last
        self.policy_state = make(policies.NUM_STATES, torch.float32)

    def set_request(self, slot: int, cot: ResolvedCoT) -> None:
        """Load a request's constants and put it at the start of its think phase."""
        device = self.ints.device

        def put(target: torch.Tensor, values: list) -> None:
            row = torch.tensor(values, dtype=target.dtype)
            target[slot] = row.to(device, non_blocking=True)

        put(
            self.ints,
            [
                cot.seed,
                cot.max_think,
                cot.min_think,
                cot.top_k,
                cot.cold_steps,
                len(cot.after_end),
                len(cot.after_cut),
                int(cot.greedy_answer),
            ],
        )
        put(
            self.floats,
            [cot.tau, cot.gamma, cot.top_p, cot.min_p, cot.cold_entropy, *cot.policy_values],
        )
        put(
            self.forced,
            _pad(cot.after_end, MAX_FORCED_LENGTH, 0) + _pad(cot.after_cut, MAX_FORCED_LENGTH, 0),
        )
        put(self.stops, _pad(cot.stop_ids, MAX_STOP_IDS, -1))
        ends: list[int] = []
        for sequence in cot.end_sequences:
            ends += [-1] * (MAX_END_LENGTH - len(sequence)) + sequence
        put(self.ends, _pad(ends, MAX_END_SEQUENCES * MAX_END_LENGTH, -1))
        start = int(Phase.THINK)
        cause = int(EndCause.UNFINISHED)
        if cot.max_think == 0:
            start = int(Phase.FORCED if cot.after_cut else Phase.ANSWER)
            cause = int(EndCause.BUDGET)
        put(self.dyn, [start, 1, 0, cause, 0])
        self.tail[slot] = -2
        self.policy_state[slot] = 0.0

    def clear(self, slot: int) -> None:
        self.dyn[slot] = 0


def _pad(values: list[int], width: int, fill: int) -> list[int]:
    return values + [fill] * (width - len(values))


@dataclass(slots=True)
class Emitted:
    """One generated position of R rows."""

    token: torch.Tensor  # int64 [R]: what scheduler, detokenizer and client see
    phase: torch.Tensor  # int64 [R]: phase this position belongs to
    is_think: torch.Tensor  # bool [R]: a think step whose decision counts
    is_answer: torch.Tensor  # bool [R]: the token came from the answer distribution
    cause: torch.Tensor  # int64 [R]: why thinking ended, once it has


def is_stop(state: SlotState, slots: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """bool [R]: whether the token is one of the row's stop tokens."""
    return (state.stops[slots] == token[:, None]).any(dim=1)


def advance(
    state: SlotState,
    slots: torch.Tensor,
    position: torch.Tensor,
    think_token: torch.Tensor,
    answer_token: torch.Tensor,
    entropy: torch.Tensor,
) -> Emitted:
    """Emit one position per row and move every row to its next phase (in place).

    Args:
        state: all slots.
        slots: the rows' slots, int64 [R], each at most once.
        position: index of the generated token, int64 [R] (0 = first after the prompt).
        think_token: visible token if this is a think step, int64 [R].
        answer_token: token if this is an answer step, int64 [R].
        entropy: of the unscaled distribution, float32 [R].
    """
    ints, dyn = state.ints[slots], state.dyn[slots]
    phase = dyn[:, state.PHASE]
    thinking = phase == Phase.THINK

    # 1. A stop token as shadow ends thinking before this position is emitted.
    eos = thinking & is_stop(state, slots, think_token) & (position >= ints[:, state.MIN_THINK])
    has_cut = ints[:, state.LEN_CUT] > 0
    sel = torch.where(eos, 1, dyn[:, state.FORCED_SEL])  # 0: after_end, 1: after_cut
    pos = torch.where(eos, 0, dyn[:, state.FORCED_POS])
    cause = torch.where(eos, int(EndCause.EOS), dyn[:, state.CAUSE])
    after_eos = torch.where(has_cut, int(Phase.FORCED), int(Phase.ANSWER))
    phase = torch.where(eos, after_eos, phase)

    # 2. Emit.
    is_think, is_forced = phase == Phase.THINK, phase == Phase.FORCED
    is_answer = phase == Phase.ANSWER
    at = (sel * MAX_FORCED_LENGTH + pos).clamp(max=2 * MAX_FORCED_LENGTH - 1)
    forced_token = state.forced[slots].gather(1, at[:, None])[:, 0]
    token = torch.where(is_think, think_token, torch.where(is_forced, forced_token, answer_token))

    # 3. Think steps: did this token end the think phase?
    tail = state.tail[slots]
    tail = torch.where(is_think[:, None], torch.cat((tail[:, 1:], token[:, None]), dim=1), tail)
    ends = state.ends[slots].view(len(slots), MAX_END_SEQUENCES, MAX_END_LENGTH)
    matches = ((ends == -1) | (ends == tail[:, None, :])).all(dim=2) & (ends[:, :, -1] != -1)
    count = position + 1
    may_end = is_think & (count >= ints[:, state.MIN_THINK])
    matched = may_end & matches.any(dim=1)
    is_cold = entropy < state.floats[slots, state.COLD_ENTROPY]
    cold = torch.where(is_think & is_cold, dyn[:, state.COLD_COUNT] + 1, 0)
    frozen = may_end & ~matched & (cold >= ints[:, state.COLD_STEPS])
    spent = is_think & ~matched & (count >= ints[:, state.MAX_THINK])
    ended = matched | spent | frozen
    why = torch.where(
        matched,
        int(EndCause.END_SEQUENCE),
        torch.where(spent, int(EndCause.BUDGET), int(EndCause.COLD_STOP)),
    )
    cause = torch.where(ended, why, cause)
    sel = torch.where(ended, torch.where(matched, 0, 1), sel)

    # 4. Next phase.
    pos = torch.where(is_forced, pos + 1, torch.where(ended, 0, pos))
    length = torch.where(sel == 0, ints[:, state.LEN_END], ints[:, state.LEN_CUT])
    in_forced = (is_forced | ended) & (pos < length)
    leaves = (is_forced | ended) & (pos >= length)
    next_phase = torch.where(
        in_forced, int(Phase.FORCED), torch.where(leaves, int(Phase.ANSWER), phase)
    )
    state.dyn[slots] = torch.stack((next_phase, sel, pos, cause, cold), dim=1)
    state.tail[slots] = tail
    return Emitted(token, phase, is_think, is_answer, cause)


def restore(
    state: SlotState,
    slot: int,
    cot: ResolvedCoT,
    tokens: np.ndarray,
    phases: np.ndarray,
    entropy: np.ndarray,
    cause: int,
    policy_state: np.ndarray,
) -> None:
    """Bring a freshly set slot to where it was after the given positions (after preemption).

    Args:
        tokens, phases: int [T], what was emitted and in which phase, T >= 1.
        entropy: float32 [T].
        cause: `EndCause` after the last position.
        policy_state: float32 [NUM_STATES] after the last position.
    """
    sel = 0 if cause == EndCause.END_SEQUENCE else 1
    length = len(cot.after_cut if sel else cot.after_end)
    pos = int((phases == Phase.FORCED).sum())
    thinking = cause == EndCause.UNFINISHED
    phase = Phase.THINK if thinking else (Phase.FORCED if pos < length else Phase.ANSWER)
    thoughts = tokens[phases == Phase.THINK]
    cold = 0
    if thinking:
        warm = np.flatnonzero(~(entropy < np.float32(cot.cold_entropy)))  # NaN is warm
        cold = len(entropy) - (int(warm[-1]) + 1 if len(warm) else 0)
    values = [int(phase), sel, pos, cause, cold]
    state.dyn[slot] = torch.tensor(values, dtype=state.dyn.dtype).to(state.dyn.device)
    tail = np.full(MAX_END_LENGTH, -2, dtype=np.int64)
    last = thoughts[-MAX_END_LENGTH:]
    if len(last):
        tail[-len(last) :] = last
    state.tail[slot] = torch.from_numpy(tail).to(state.tail.device)
    state.policy_state[slot] = torch.from_numpy(
        np.ascontiguousarray(policy_state, dtype=np.float32)
    ).to(state.policy_state.device)
