"""Packing keeps sequences apart, and batches of bounded size hold every sequence once."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama
from trainer_rollouts import ASKED, MODES, episodes_of, roll, single_thread

from softvllm.core.oracle import Oracle
from trainer.attention import Boundaries, _per_sequence
from trainer.forward import Policy
from trainer.packing import group_batches, micro_batches, pack
from trainer.reading import episode_of_trace


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    yield from single_thread()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> Oracle:
    return Oracle.load(str(tiny_llama(tmp_path_factory.mktemp("llama"))))


@pytest.fixture(scope="module")
def episodes(oracle):
    return episodes_of(oracle, tuple(MODES))


def test_positions_restart_and_boundaries_add_up(episodes):
    batch = pack(episodes)
    assert batch.cu_seqlens.tolist()[0] == 0
    assert batch.cu_seqlens.diff().tolist() == list(batch.lengths)
    assert batch.num_rows == sum(e.num_inputs for e in episodes) == batch.cu_seqlens[-1]
    for start, length in zip(batch.cu_seqlens.tolist(), batch.lengths):
        assert batch.position_ids[start : start + length].tolist() == list(range(length))
    assert batch.num_decisions.tolist() == [e.num_decisions for e in episodes]


def test_terms_stay_within_their_sequence(episodes):
    batch = pack(episodes)
    for terms in (batch.soft, batch.hard):
        start = batch.cu_seqlens.long()[terms.sequence]
        stop = batch.cu_seqlens.long()[terms.sequence + 1]
        assert bool(((terms.row >= start) & (terms.row < stop)).all())


def test_soft_rows_carry_the_recorded_input_of_their_step(episodes):
    batch = pack(episodes)
    values = {int(r): v for r, v in zip(batch.soft_rows, batch.soft_values)}
    for row, value in zip(batch.soft.row, batch.soft.value):
        if int(row) + 1 in values:
            assert torch.equal(values[int(row) + 1], value)
    read = {int(r) + 1 for r in batch.soft.row} & set(values)
    assert len(read) == len(values) > 10


def test_a_sequence_does_not_see_its_neighbours(oracle, episodes):
    policy = Policy(copy.deepcopy(oracle.model))
    with torch.no_grad():
        together = policy(pack(episodes))
        alone = [policy(pack([e])) for e in episodes]
    torch.testing.assert_close(
        together.soft, torch.cat([d.soft for d in alone]), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        together.hard, torch.cat([d.hard for d in alone]), rtol=1e-5, atol=1e-5
    )


def test_what_does_not_belong_together_is_not_packed(oracle, episodes):
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([])
    other = dataclasses.replace(episodes[0], soft_input=episodes[0].soft_input.bfloat16())
    with pytest.raises(ValueError, match="different models"):
        pack([episodes[0], other])
    support = episodes[0].hard_support
    stops = dataclasses.replace(support, stop_ids=torch.tensor([4]))
    with pytest.raises(ValueError, match="different stop tokens"):
        pack([episodes[0], dataclasses.replace(episodes[0], hard_support=stops)])


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=30),
    budget=st.integers(50, 120),
    at_least=st.integers(1, 6),
)
def test_micro_batches_hold_every_sequence_once_within_the_budget(lengths, budget, at_least):
    batches = micro_batches(lengths, budget, at_least)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget for b in batches)
    assert len(batches) >= at_least
    filled = [b for b in batches if b]
    assert len(filled) >= min(at_least, len(lengths))
    if len(filled) > at_least:  # no batch was opened while another had room for its first
        loads = sorted(sum(lengths[i] for i in b) for b in filled)
        assert loads[0] + loads[1] > budget


def test_a_sequence_larger_than_the_budget_is_an_error():
    with pytest.raises(ValueError, match="51 tokens does not fit micro_batch_tokens = 50"):
        micro_batches([3, 51], 50)


def test_the_trainer_never_imports_vllm():
    code = (
        "import sys, importlib\n"
        "for name in CORE: importlib.import_module(name)\n"
        "assert 'vllm' not in sys.modules, 'vllm was imported'\n"
        "assert 'trainer.forward' in sys.modules"
    )
    names = ["advantages", "diagnostics", "forward", "head", "objective", "packing", "reading"]
    core = {f"trainer.{name}" for name in names}
    subprocess.run([sys.executable, "-c", f"CORE = {core!r}\n{code}"], check=True)


@pytest.fixture(scope="module")
def siblings(oracle):
    """Two groups of different prompts, with a sample of every mode in each."""
    runs = [
        roll(oracle, length, seed=length, tokens=14 + i, **cot)
        for i, cot in enumerate(MODES.values())
        for length in (7, 5)
    ]
    return [episode_of_trace(ids, trace, ASKED) for ids, trace in runs]


def test_a_shared_prompt_gives_the_same_densities_and_gradients(oracle, siblings):
    results = []
    for share in (False, True):
        policy = Policy(copy.deepcopy(oracle.model))
        batch = pack(siblings, share_prompts=share)
        found = policy(batch)
        weight = torch.linspace(-1, 1, len(found.hard))
        (found.soft.sum() / 64 + (weight * found.hard).sum()).backward()
        results.append((batch.num_rows, found, [p.grad for p in policy.parameters()]))
    (rows, one, grads), (fewer, two, shared) = results
    prompts = [len(e.prompt_ids) for e in siblings]
    assert rows - fewer == sum(prompts) - sum({5, 7})
    torch.testing.assert_close(two.soft, one.soft, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two.hard, one.hard, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, shared):
        assert float((a - b).norm()) <= 1e-4 * float(a.norm())


@pytest.mark.parametrize("window", [None, 4])
def test_attention_from_a_shared_prompt_is_that_of_the_whole_sequence(window):
    g = torch.Generator().manual_seed(0)
    prompt, owns = 6, (3, 5)
    rows = prompt + sum(owns)
    q, k, v = (torch.randn(1, heads, rows, 8, generator=g) for heads in (4, 2, 2))
    cu = torch.tensor([0, prompt, prompt + owns[0], rows], dtype=torch.int32)
    shared = Boundaries((prompt, *owns), cu, (-1, 0, 0))
    out, _ = _per_sequence(None, q, k, v, None, sliding_window=window, boundaries=shared)
    start = prompt
    for own in owns:
        rows = [*range(prompt), *range(start, start + own)]
        whole = Boundaries((prompt + own,), cu)
        parts = (x[:, :, rows] for x in (q, k, v))
        want, _ = _per_sequence(None, *parts, None, sliding_window=window, boundaries=whole)
        torch.testing.assert_close(out[:, start : start + own], want[:, prompt:])
        torch.testing.assert_close(out[:, :prompt], want[:, :prompt])
        start += own


@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 20)), max_size=5),
    budget=st.integers(30, 90),
    at_least=st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_batches_of_groups_count_a_prompt_once_and_stay_within_the_budget(sizes, budget, at_least):
    groups = [g for g, (members, _) in enumerate(sizes) for _ in range(members)]
    prompts = [sizes[g][1] for g in groups]
    owns = [1 + i % 9 for i in range(len(groups))]
    batches = group_batches(groups, prompts, owns, budget, at_least)
    assert sorted(i for b in batches for i in b) == list(range(len(groups)))
    for members in batches:
        once = sum(dict((groups[i], prompts[i]) for i in members).values())
        assert once + sum(owns[i] for i in members) <= budget
    assert sum(map(bool, batches)) >= min(at_least, len(groups))
