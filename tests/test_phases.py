"""The phase machine against a plain-Python simulation, written from its description alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from softvllm.core import phases
from softvllm.core.params import (
    MAX_END_LENGTH,
    MAX_END_SEQUENCES,
    MAX_FORCED_LENGTH,
    MAX_STOP_IDS,
)
from softvllm.core.phases import EndCause, Phase, SlotState
from softvllm.core.policies import NUM_PARAMS, NUM_STATES
from softvllm.core.resolve import ResolvedCoT
from softvllm.core.trace import STEP
from softvllm.engine.replay import next_phase

fast = settings(max_examples=60, deadline=None)  # a deadline would only measure load

STEPS = 14
ANSWER_BASE = 100  # answer tokens are 100, 101, ...: never mixed up with thoughts


def cot(**changes: Any) -> ResolvedCoT:
    facts: dict[str, Any] = {
        "policy": "soft",
        "policy_values": [0.0] * NUM_PARAMS,
        "tau": 0.5,
        "gamma": 0.33,
        "num_extra": 0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 1,
        "max_think": 8,
        "min_think": 0,
        "cold_entropy": 0.0,
        "cold_steps": 256,
        "end_sequences": [],
        "after_end": [],
        "after_cut": [],
        "stop_ids": [],
        "greedy_answer": True,
        "answer_max": 0,
        "record": "steps",
        "record_top": 8,
        "mode": "soft",
        "nonce": 0,
    }
    return ResolvedCoT(**(facts | changes))


@dataclass
class Row:
    """One position as the simulation sees it."""

    token: int
    phase: Phase
    cause: EndCause


def simulate(c: ResolvedCoT, thoughts: list[int], entropy: list[float]) -> list[Row]:
    """What T positions show, one rule after the other."""
    rows: list[Row] = []
    said: list[int] = []
    queue: list[int] = []
    cause = EndCause.UNFINISHED
    cold = 0
    if c.max_think == 0:
        cause, queue = EndCause.BUDGET, list(c.after_cut)
    for t, thought in enumerate(thoughts):
        if cause is EndCause.UNFINISHED and thought in c.stop_ids and len(said) >= c.min_think:
            cause, queue = EndCause.EOS, list(c.after_cut)
        if cause is EndCause.UNFINISHED:
            said.append(thought)
            cold = cold + 1 if entropy[t] < c.cold_entropy else 0
            early = len(said) < c.min_think
            if not early and any(said[-len(s) :] == s for s in c.end_sequences):
                cause, queue = EndCause.END_SEQUENCE, list(c.after_end)
            elif len(said) >= c.max_think:
                cause, queue = EndCause.BUDGET, list(c.after_cut)
            elif not early and cold >= c.cold_steps:
                cause, queue = EndCause.COLD_STOP, list(c.after_cut)
            rows.append(Row(thought, Phase.THINK, cause))
        elif queue:
            rows.append(Row(queue.pop(0), Phase.FORCED, cause))
        else:
            rows.append(Row(ANSWER_BASE + t, Phase.ANSWER, cause))
    return rows


TOKENS = st.integers(0, 4)  # 0 is an ordinary token here, as it may be in any vocabulary


@st.composite
def requests(draw: st.DrawFn) -> tuple[ResolvedCoT, list[int], list[float]]:
    max_think = draw(st.integers(0, STEPS - 2))
    forced = st.lists(st.integers(50, 60), max_size=3)
    c = cot(
        max_think=max_think,
        min_think=draw(st.integers(0, max_think)),
        end_sequences=draw(st.lists(st.lists(TOKENS, min_size=1, max_size=4), max_size=3)),
        after_end=draw(forced),
        after_cut=draw(forced),
        stop_ids=draw(st.lists(TOKENS, max_size=2, unique=True)),
        cold_entropy=draw(st.sampled_from([0.0, 0.5])),
        cold_steps=draw(st.integers(1, 4)),
    )
    thoughts = draw(st.lists(TOKENS, min_size=STEPS, max_size=STEPS))
    entropy = draw(
        st.lists(st.sampled_from([0.1, 0.1, 0.9, math.nan]), min_size=STEPS, max_size=STEPS)
    )
    return c, thoughts, entropy


def advance(
    state: SlotState,
    slots: list[int],
    position: list[int],
    thoughts: list[int],
    entropy: list[float],
) -> phases.Emitted:
    return phases.advance(
        state,
        torch.tensor(slots),
        torch.tensor(position),
        torch.tensor(thoughts),
        torch.tensor([ANSWER_BASE + p for p in position]),
        torch.tensor(entropy, dtype=torch.float32),
    )


def run(
    c: ResolvedCoT,
    thoughts: list[int],
    entropy: list[float],
    state: SlotState,
    slot: int,
    start: int,
) -> list[Row]:
    rows = []
    for t in range(start, len(thoughts)):
        out = advance(state, [slot], [t], [thoughts[t]], [entropy[t]])
        row = Row(int(out.token), Phase(int(out.phase)), EndCause(int(out.cause)))
        assert bool(out.is_think) == (row.phase == Phase.THINK)
        assert bool(out.is_answer) == (row.phase == Phase.ANSWER)
        rows.append(row)
    return rows


@fast
@given(request=requests())
def test_the_machine_does_what_its_description_says(request):
    c, thoughts, entropy = request
    state = SlotState(3, "cpu")
    state.set_request(1, c)
    assert run(c, thoughts, entropy, state, 1, 0) == simulate(c, thoughts, entropy)


@fast
@given(batch=st.lists(requests(), min_size=2, max_size=5), data=st.data())
def test_rows_of_a_batch_do_not_disturb_each_other(batch, data):
    """Requests of different ages in changing rows, some skipping a step."""
    state = SlotState(8, "cpu")
    slots = data.draw(st.permutations(range(8)))[: len(batch)]
    for slot, (c, _, _) in zip(slots, batch):
        state.set_request(slot, c)
    got: list[list[Row]] = [[] for _ in batch]
    for _ in range(STEPS):
        members = data.draw(st.lists(st.integers(0, len(batch) - 1), unique=True))
        if not members:
            continue
        at = [len(got[m]) for m in members]
        out = advance(
            state,
            [slots[m] for m in members],
            at,
            [batch[m][1][t] for m, t in zip(members, at)],
            [batch[m][2][t] for m, t in zip(members, at)],
        )
        for i, m in enumerate(members):
            phase, cause = Phase(int(out.phase[i])), EndCause(int(out.cause[i]))
            got[m].append(Row(int(out.token[i]), phase, cause))
    for rows, (c, thoughts, entropy) in zip(got, batch):
        assert rows == simulate(c, thoughts, entropy)[: len(rows)]


@given(request=requests(), policy_state=st.lists(st.floats(0, 9, width=32), min_size=2, max_size=2))
@settings(max_examples=40, deadline=None)
def test_a_restored_slot_goes_on_as_if_it_had_never_stopped(request, policy_state):
    """At every cut point, in a slot that held another request: this is how preemption resumes."""
    c, thoughts, entropy = request
    rows = simulate(c, thoughts, entropy)
    steps = np.zeros(STEPS, STEP)
    for name in ("token", "phase", "cause"):
        steps[name] = [int(getattr(row, name)) for row in rows]
    steps["entropy"] = entropy
    memory = np.array(policy_state, np.float32)
    state = SlotState(4, "cpu")
    state.set_request(2, cot(end_sequences=[[1]], stop_ids=[3]))
    run(c, thoughts, entropy, state, 2, 0)
    for cut in range(1, STEPS):
        state.set_request(2, c)
        assert (state.policy_state[2] == 0).all()
        done = steps[:cut]
        phases.restore(
            state,
            2,
            c,
            done["token"],
            done["phase"],
            done["entropy"],
            int(done["cause"][-1]),
            memory,
        )
        assert state.policy_state[2].tolist() == memory.tolist()
        assert next_phase(
            c, int(done["cause"][-1]), int((done["phase"] == Phase.FORCED).sum())
        ) == Phase(int(state.dyn[2, state.PHASE]))
        assert run(c, thoughts, entropy, state, 2, cut) == rows[cut:], cut


@fast
@given(request=requests())
def test_a_slot_forgets_its_former_request(request):
    c, thoughts, entropy = request
    state = SlotState(2, "cpu")
    state.set_request(0, cot(end_sequences=[[1, 2], [3]], stop_ids=[4], after_end=[50, 51]))
    advance(state, [0], [0], [1], [0.0])
    state.clear(0)
    assert state.dyn[0, state.PHASE] == Phase.OFF
    state.set_request(0, c)
    assert run(c, thoughts, entropy, state, 0, 0) == simulate(c, thoughts, entropy)


# ---- the rules one by one --------------------------------------------------------------------


def play(c: ResolvedCoT, thoughts: list[int], entropy: float = 9.0) -> list[Row]:
    state = SlotState(1, "cpu")
    state.set_request(0, c)
    return run(c, thoughts, [entropy] * len(thoughts), state, 0, 0)


def story(rows: list[Row]) -> list[tuple[str, int]]:
    return [(row.phase.name[0], row.token) for row in rows]


def test_an_end_sequence_is_shown_and_the_forced_text_follows():
    c = cot(end_sequences=[[1, 2]], after_end=[50, 51], after_cut=[60])
    rows = play(c, [1, 1, 2, 3, 3, 3])
    assert story(rows) == [("T", 1), ("T", 1), ("T", 2), ("F", 50), ("F", 51), ("A", 105)]
    assert [r.cause for r in rows] == [EndCause.UNFINISHED] * 2 + [EndCause.END_SEQUENCE] * 4


def test_end_of_sequence_in_the_shadow_is_never_shown():
    rows = play(cot(stop_ids=[4], after_cut=[60, 61]), [1, 4, 4, 4])
    assert story(rows) == [("T", 1), ("F", 60), ("F", 61), ("A", 103)]
    assert rows[1].cause == EndCause.EOS


def test_end_of_sequence_without_forced_text_goes_straight_to_the_answer():
    rows = play(cot(stop_ids=[4]), [1, 4, 4])
    assert story(rows) == [("T", 1), ("A", 101), ("A", 102)]
    assert rows[1].cause == EndCause.EOS


def test_end_of_sequence_as_the_very_first_token_leaves_no_thought():
    assert story(play(cot(stop_ids=[0], after_cut=[60]), [0, 0])) == [("F", 60), ("A", 101)]


def test_a_stop_token_that_is_forced_or_answered_is_left_alone():
    """Only think tokens are looked at: an answer's EOS must reach the scheduler."""
    c = cot(stop_ids=[101], max_think=1)
    assert story(play(c, [1, 1])) == [("T", 1), ("A", 101)]


def test_the_budget_counts_think_tokens():
    rows = play(cot(max_think=2, after_cut=[60]), [1, 1, 1, 1])
    assert story(rows) == [("T", 1), ("T", 1), ("F", 60), ("A", 103)]
    assert rows[1].cause == EndCause.BUDGET


@pytest.mark.parametrize("after_cut", [[], [60, 61]])
def test_a_budget_of_zero_starts_with_the_forced_text(after_cut):
    rows = play(cot(max_think=0, after_cut=after_cut, after_end=[50]), [1, 1, 1])
    forced = [("F", token) for token in after_cut]
    assert story(rows) == (forced + [("A", 100 + t) for t in range(len(forced), 3)])
    assert {row.cause for row in rows} == {EndCause.BUDGET}


def test_an_end_sequence_on_the_last_think_token_counts_as_an_end():
    rows = play(cot(max_think=2, end_sequences=[[2]], after_end=[50], after_cut=[60]), [1, 2, 3])
    assert story(rows)[2] == ("F", 50) and rows[1].cause == EndCause.END_SEQUENCE


def test_nothing_ends_thinking_before_the_minimum():
    c = cot(min_think=3, end_sequences=[[1]], stop_ids=[4], cold_entropy=1.0, cold_steps=1)
    rows = play(c, [1, 4, 1, 1], entropy=0.0)
    assert [row.phase for row in rows] == [Phase.THINK] * 3 + [Phase.ANSWER]
    assert rows[2].cause == EndCause.END_SEQUENCE


def test_a_match_must_end_at_the_current_token():
    """An end sequence that was complete before min_think does not fire afterwards."""
    c = cot(min_think=3, end_sequences=[[1, 2]])
    assert all(row.phase == Phase.THINK for row in play(c, [1, 2, 3, 3, 1]))


def test_the_cold_stop_needs_consecutive_steps():
    c = cot(cold_entropy=0.5, cold_steps=3, max_think=20, after_cut=[60])
    state = SlotState(1, "cpu")
    state.set_request(0, c)
    entropy = [0.1, 0.1, 0.7, 0.1, 0.1, math.nan, 0.1, 0.1, 0.1, 0.1]
    rows = run(c, [1] * 10, entropy, state, 0, 0)
    assert [row.phase for row in rows] == [Phase.THINK] * 9 + [Phase.FORCED]
    assert rows[8].cause == EndCause.COLD_STOP


def test_the_threshold_of_the_cold_stop_is_not_cold():
    c = cot(cold_entropy=0.5, cold_steps=1)
    assert all(row.phase == Phase.THINK for row in play(c, [1] * 5, entropy=0.5))


def test_no_cold_stop_without_a_threshold():
    c = cot(cold_entropy=0.0, cold_steps=1)
    assert all(row.phase == Phase.THINK for row in play(c, [1] * 5, entropy=0.0))


def test_the_longest_lists_fit():
    longest = list(range(1, MAX_END_LENGTH + 1))
    other = [[200 + i] for i in range(MAX_END_SEQUENCES - 1)]
    forced = list(range(300, 300 + MAX_FORCED_LENGTH))
    c = cot(
        max_think=40,
        end_sequences=[*other, longest],
        after_end=forced,
        after_cut=forced[::-1],
        stop_ids=list(range(400, 400 + MAX_STOP_IDS)),
    )
    thoughts = [*longest[1:], *longest, *[0] * (MAX_FORCED_LENGTH + 1)]
    rows = play(c, thoughts)
    thought = len(longest) * 2 - 1
    assert [row.phase for row in rows[:thought]] == [Phase.THINK] * thought
    assert [row.token for row in rows[thought:-1]] == forced
    assert rows[-1].phase == Phase.ANSWER
    cut = play(c, [5, 400 + MAX_STOP_IDS - 1, *[0] * MAX_FORCED_LENGTH])
    assert [row.token for row in cut[1:-1]] == forced[::-1]
    assert cut[-1].phase == Phase.ANSWER


@fast
@example(tokens=[0, 0])
@given(tokens=st.lists(st.integers(0, 2), min_size=2, max_size=12))
def test_padding_matches_nothing_and_token_0_is_an_ordinary_token(tokens):
    """Unused end sequences, stop entries and the empty history are not token 0."""
    c = cot(end_sequences=[[0, 0]], max_think=50)
    rows = play(c, tokens)
    assert rows == simulate(c, tokens, [9.0] * len(tokens))
    assert all(row.phase == Phase.THINK for row in play(cot(max_think=50), tokens))


def test_a_row_that_is_off_takes_the_other_sampler_s_token():
    out = advance(SlotState(2, "cpu"), [1], [3], [7], [0.0])
    assert int(out.token) == ANSWER_BASE + 3
    assert int(out.phase) == Phase.OFF and not bool(out.is_think) and not bool(out.is_answer)


def test_a_request_s_numbers_reach_their_columns():
    state = SlotState(3, "cpu")
    c = cot(
        seed=2**53 - 1,
        tau=1e-4,
        gamma=0.25,
        top_k=7,
        top_p=0.75,
        min_p=0.125,
        greedy_answer=False,
        policy_values=[1.0, 2.0, 3.0, 4.0],
        cold_entropy=0.5,
        cold_steps=9,
    )
    state.set_request(1, c)
    ints, floats = state.ints[1], state.floats[1]
    assert int(ints[state.SEED]) == 2**53 - 1
    assert int(ints[state.TOP_K]) == 7 and int(ints[state.GREEDY]) == 0
    assert int(ints[state.COLD_STEPS]) == 9
    assert float(floats[state.TAU]) == pytest.approx(1e-4)
    assert floats[[state.GAMMA, state.TOP_P, state.MIN_P, state.COLD_ENTROPY]].tolist() == [
        0.25,
        0.75,
        0.125,
        0.5,
    ]
    assert floats[state.POLICY :].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert state.policy_state.shape[1] == NUM_STATES
    for other in (0, 2):
        assert (state.dyn[other] == 0).all() and (state.ints[other] == 0).all()
