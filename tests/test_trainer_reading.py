"""Which positions of a trace become terms of the loss, and which samples are refused."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama
from trainer_rollouts import ASKED, EOS, FORCED, MODES, prompt, roll, single_thread

from softvllm import CoTParams
from softvllm.core.oracle import Oracle
from softvllm.core.phases import EndCause, Phase
from softvllm.core.rollout import Sample
from softvllm.core.trace import STEP, Kind, Trace, encode
from trainer import diagnostics
from trainer.episodes import Asked
from trainer.forward import Policy
from trainer.packing import pack
from trainer.reading import episode, episode_of_trace


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    yield from single_thread()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> Oracle:
    return Oracle.load(str(tiny_llama(tmp_path_factory.mktemp("llama"), tied=False)))


def made_up(kinds: list[int], phases: list[int], **meta) -> Trace:
    """A trace with these kinds and phases, d = 4, and easily recognised numbers."""
    steps = np.zeros(len(kinds), STEP)
    steps["kind"], steps["phase"] = kinds, phases
    steps["token"] = np.arange(10, 10 + len(kinds))
    sampled = np.isin(kinds, (Kind.SAMPLED, Kind.SOFT_SAMPLED))
    steps["log_prob"] = np.where(sampled, -1.0 - 0.1 * np.arange(len(kinds)), 0.0)
    soft = int(np.isin(kinds, (Kind.SOFT, Kind.SOFT_SAMPLED)).sum())
    defaults = {
        "mode": "soft", "policy": "soft", "policy_values": [0.0] * 4, "tau": 0.5, "top_k": 0,
        "top_p": 1.0, "min_p": 0.0, "seed": 3, "dim": 4, "dtype": "float32", "sigma": 0.25,
        "sigmas": [[0.25, 0]],
    }  # fmt: skip
    dense = np.arange(soft * 4, dtype=np.float32).reshape(soft, 4)
    return Trace({**defaults, **meta}, steps, dense=dense if soft else None)


PROMPT = np.array([5, 6, 7], dtype=np.int32)
THINK, FORCE, ANSWER = int(Phase.THINK), int(Phase.FORCED), int(Phase.ANSWER)


def test_each_kind_gives_its_terms():
    trace = made_up([1, 3, 0, 2, 2, 0, 0], [THINK] * 3 + [FORCE] * 2 + [ANSWER] * 2, policy="blend",
                    policy_values=[0.6, 0, 0, 0])  # fmt: skip
    got = episode_of_trace(PROMPT, trace, Asked(temperature=0.8))
    assert got.soft_at.tolist() == [0, 1]
    assert got.hard_at.tolist() == [1, 2, 5, 6]
    assert got.hard_ids[:, 0].tolist() == [11, 12, 15, 16]
    assert got.hard_think.tolist() == [True, True, False, False]
    torch.testing.assert_close(got.hard_tau, torch.tensor([0.5, 0.5, 0.8, 0.8]))
    torch.testing.assert_close(got.hard_log_prob, torch.tensor([-1.1, -1.2, -1.5, -1.6]))
    assert got.soft_mix.tolist() == pytest.approx([0.6, 0.6])
    assert got.soft_input.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert got.num_decisions == 5 and got.num_inputs == 3 + 7 - 1
    assert len(got.entropy) == 3


def test_sigma_follows_the_weights_along_the_chain():
    trace = made_up([1, 1, 1, 0], [THINK] * 3 + [ANSWER], sigmas=[[0.25, 0], [0.5, 2]])
    got = episode_of_trace(PROMPT, trace, Asked())
    assert got.soft_sigma.tolist() == [0.25, 0.25, 0.5]


def test_greedy_answers_count_at_temperature_1_or_not_at_all():
    trace = made_up([1, 2, 0, 0], [THINK, FORCE, ANSWER, ANSWER])
    trace.steps["log_prob"] = 0.0
    counted = episode_of_trace(PROMPT, trace, Asked(temperature=0.0, top_k=5))
    assert counted.hard_at.tolist() == [2, 3] and counted.hard_tau.tolist() == [1.0, 1.0]
    assert bool(counted.hard_log_prob.isnan().all()) and counted.hard_support.is_full
    masked = episode_of_trace(PROMPT, trace, Asked(temperature=0.0, greedy_answer="mask"))
    assert masked.hard_at.tolist() == [] and masked.soft_at.tolist() == [0]


def test_the_answer_has_its_own_support_and_the_start_of_thinking_no_stop_tokens():
    trace = made_up([0, 0, 0, 0], [THINK] * 3 + [ANSWER], policy="hard", mode="hard", top_k=4)
    asked = Asked(top_p=0.9, min_think=2, stop_ids=(9, 1))
    support = episode_of_trace(PROMPT, trace, asked).hard_support
    assert support.top_k.tolist() == [4, 4, 4, 0]
    assert support.top_p.tolist() == pytest.approx([1, 1, 1, 0.9])
    assert support.hides_stop.tolist() == [True, True, False, False]
    assert support.stop_ids.tolist() == [1, 9]


BAD = {
    "no noise": ({"sigmas": [[0.0, 0]], "sigma": 0.0}, "noise_scale > 0"),
    "part": ({"start": 4}, "a part cannot be trained on"),
    "policy": ({"policy": "gumbel"}, "does not know its mean"),
}


@pytest.mark.parametrize("meta,message", BAD.values(), ids=BAD)
def test_traces_that_cannot_be_trained_on_are_refused(meta, message):
    with pytest.raises(ValueError, match=message):
        episode_of_trace(PROMPT, made_up([1, 0], [THINK, ANSWER], **meta), Asked())


def test_broken_samples_are_refused():
    good = made_up([1, 0], [THINK, ANSWER])
    with pytest.raises(ValueError, match="prompt is empty"):
        episode_of_trace(PROMPT[:0], good, Asked())
    with pytest.raises(ValueError, match="no generated position"):
        episode_of_trace(PROMPT, Trace(good.meta, good.steps[:0]), Asked())
    with pytest.raises(ValueError, match='record="dense"'):
        episode_of_trace(PROMPT, dataclasses.replace(good, dense=None), Asked())
    with pytest.raises(ValueError, match="answers should be greedy"):
        episode_of_trace(PROMPT, good, Asked(temperature=0.0))
    nan = made_up([1, 0], [THINK, ANSWER])
    nan.steps["entropy"][0] = np.nan
    with pytest.raises(ValueError, match="holds NaN"):
        episode_of_trace(PROMPT, nan, Asked())
    sparse = dataclasses.replace(
        good,
        dense=None,
        sparse_ids=np.array([[1, 2]], np.int32),
        sparse_weights=np.array([[0.5, 0.5]], np.float32),
    )
    with pytest.raises(ValueError, match="need the embedding table"):
        episode_of_trace(PROMPT, sparse, Asked())
    with pytest.raises(ValueError, match=r"was float32, this one is torch\.bfloat16"):
        episode_of_trace(PROMPT, sparse, Asked(), torch.zeros(20, 4, dtype=torch.bfloat16))


def test_recorded_columns_without_weight_belong_only_to_plain_top_k():
    """Fuzzy weights underflow to 0 and still are in the support; top-p leaves real zeros."""
    ids = np.array([[7, 3, 9]], np.int32)
    weights = np.array([[1.0, 0.0, 0.0]], np.float32)
    table = torch.zeros(20, 4)
    for top_p, want in ((1.0, [7, 3, 9]), (0.9, [7, -1, -1])):
        trace = made_up([1, 0], [THINK, ANSWER], top_k=3, top_p=top_p)
        trace = dataclasses.replace(trace, dense=None, sparse_ids=ids, sparse_weights=weights)
        got = episode_of_trace(PROMPT, trace, Asked(), table).soft_ids
        assert got is not None and got.tolist() == [want]


def test_a_blend_record_starts_with_the_sampled_token():
    ids = np.array([[10, 7, 3]], np.int32)
    weights = np.array([[0.4, 0.35, 0.25]], np.float32)
    for w, column in ((0.6, weights), (0.0, np.array([[1.0, 0.0, 0.0]], np.float32))):
        trace = made_up([3, 0], [THINK, ANSWER], policy="blend", policy_values=[w, 0, 0, 0],
                        top_k=2, top_p=0.99)  # fmt: skip
        trace = dataclasses.replace(trace, dense=None, sparse_ids=ids, sparse_weights=column)
        got = episode_of_trace(PROMPT, trace, Asked(), torch.zeros(20, 4)).soft_ids
        if w:
            assert got is not None and got.tolist() == [[7, 3]]
        else:
            assert got is None  # its support is found from the logits


def test_a_sample_from_the_wire_is_the_trace_it_carries(oracle):
    ids, trace = roll(oracle, **MODES["soft"])
    sample = Sample(
        prompt=0,
        sample=0,
        prompt_ids=ids.astype("<i4").tobytes(),
        trace_bytes=encode(trace),
        text="",
        answer_start=0,
        finish_reason="length",
    )
    a, b = episode(sample, ASKED, None), episode_of_trace(ids, trace, ASKED)
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), f.name


def stopped(oracle: Oracle, forced: tuple[int, ...], **cot) -> tuple[np.ndarray, Trace, int]:
    """A chain that a drawn stop token ended, and that token: one likely at some later step."""
    bare = {"force_after_cut": forced, "force_after_end": (), "end_strings": ()}
    for seed in range(40):
        ids = prompt(6, seed)
        params = CoTParams(seed=seed, max_think_tokens=12, **bare, **cot)
        free = oracle.decode(ids, params, max_tokens=16, temperature=1.0)
        token = int(free.trace.token[5])
        result = oracle.decode(ids, params, max_tokens=16, temperature=1.0, stop_token_ids=(token,))
        trace = result.trace
        if token not in (EOS, *ids, *FORCED) and trace.end_cause == EndCause.EOS:
            return np.array(ids, np.int32), trace, token
    raise AssertionError("no chain was ended by a stop token")


@pytest.mark.parametrize("forced", [FORCED, ()])
@pytest.mark.parametrize("mode", ["hard", "blend"])
def test_a_drawn_stop_token_counts_although_it_is_hidden(oracle, mode, forced):
    ids, trace, stop = stopped(oracle, forced, **MODES[mode])
    asked = Asked(stop_ids=(EOS, stop))
    got = episode_of_trace(ids, trace, asked)
    at = int((trace.phase == Phase.THINK).sum())
    assert got.hard_at[-1] == at and sorted(got.hard_ids[-1].tolist()) == [EOS, stop]
    assert bool(got.hard_think[-1]) and bool(got.hard_log_prob[-1].isnan())
    # Its log-prob is that of drawing either stop token from the logits of that row, at tau.
    batch = pack([got])
    policy = Policy(copy.deepcopy(oracle.model))
    with torch.no_grad():
        densities = policy(batch)
        hidden = policy.hidden(batch, policy.table)[len(ids) - 1 + at]
        p = torch.softmax(policy.model.lm_head(hidden) / trace.meta["tau"], -1)
    assert float(densities.hard[-1]) == pytest.approx(float(p[[EOS, stop]].sum().log()), abs=1e-4)
    assert float(diagnostics.hard_mismatch(batch, densities).max()) < 1e-6
    with pytest.raises(ValueError, match=r"Asked\.stop_ids"):
        episode_of_trace(ids, trace, Asked())


def test_a_stop_token_as_the_shadow_of_a_mixture_is_no_decision(oracle):
    ids, trace, stop = stopped(oracle, FORCED, mode="soft")
    got = episode_of_trace(ids, trace, Asked(stop_ids=(EOS, stop)))
    assert not bool(got.hard_think.any())


def test_interleave_knows_from_its_coin_whether_the_stop_token_was_drawn(oracle):
    ids, trace, stop = stopped(oracle, FORCED, **MODES["interleave"])
    asked = Asked(stop_ids=(EOS, stop))
    at = int((trace.phase == Phase.THINK).sum())
    drawn = {}
    for p in (0.0, 1.0):  # never and always soft
        trace.meta["policy_values"] = [p, 0.0, 0.0, 0.0]
        drawn[p] = at in episode_of_trace(ids, trace, asked).hard_at.tolist()
    assert drawn == {0.0: True, 1.0: False}
