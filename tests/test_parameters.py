"""Every field of `CoTParams` changes what a real engine does, in the way its docstring says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_harness import Engine, Sample
from safetensors.torch import load_file
from tiny_models import tiny_llama, tiny_tokenizer
from vllm import SamplingParams

from softvllm import CoTParams, reconstruct, soft_params
from softvllm.core import noise
from softvllm.core.embedding import embedding_rms, noise_sigma
from softvllm.core.phases import EndCause, Phase
from softvllm.core.trace import Kind, Trace

pytestmark = pytest.mark.engine

PROMPT = [5, 60, 7, 80, 9, 70, 11, 65]
AFTER_END, AFTER_CUT = (42, 43, 44), (40, 41)
THINK, ANSWER = 8, 3
# Ends only on the budget unless a test says otherwise: EOS does not stop, no end strings.
BASE: dict[str, Any] = {
    "mode": "soft",
    "seed": 1,
    "max_think_tokens": THINK,
    "end_strings": (),
    "force_after_end": AFTER_END,
    "force_after_cut": AFTER_CUT,
    "max_tokens": THINK + len(AFTER_CUT) + ANSWER,
    "ignore_eos": True,
}

SHOWN: set[str] = set()


def shows(*fields: str) -> Callable[[Any], Any]:
    """Marks the fields whose effect a test shows."""
    SHOWN.update(fields)
    return lambda function: function


def asked(**fields: Any) -> SamplingParams:
    return soft_params(**{**BASE, **fields})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model) as running:
        yield running


@pytest.fixture(scope="module")
def table(model: Path) -> torch.Tensor:
    return load_file(model / "model.safetensors")["model.embed_tokens.weight"]


def run(engine: Engine, *params: SamplingParams) -> list[Sample]:
    """All requests in one batch, same prompt."""
    return [samples[0] for samples in engine.generate([PROMPT] * len(params), list(params))]


def think_tokens(trace: Trace) -> list[int]:
    return trace.token[trace.phase == Phase.THINK].tolist()


def same(a: Sample, b: Sample) -> bool:
    """Whether two samples have the same tokens and, where recorded, the same inputs."""
    if a.token_ids != b.token_ids:
        return False
    x, y = a.trace, b.trace
    if x.dense is not None and y.dense is not None:
        return bool(np.allclose(x.dense, y.dense, atol=1e-5))
    return bool(np.allclose(x.entropy, y.entropy, atol=1e-4))


def first_mixture(sample: Sample) -> dict[int, float]:
    """Token to weight at position 0, where every request of this module has the same logits."""
    trace = sample.trace
    assert trace.top_ids is not None and trace.top_weights is not None
    return {
        int(i): float(w) for i, w in zip(trace.top_ids[0], trace.top_weights[0]) if float(w) > 0.0
    }


def first_match(tokens: Sequence[int], sequence: Sequence[int], at_least: int = 0) -> int:
    """Think tokens shown once `sequence` has matched, at or after `at_least` tokens."""
    for count in range(max(len(sequence), at_least), len(tokens) + 1):
        if list(tokens[count - len(sequence) : count]) == list(sequence):
            return count
    raise AssertionError("the sequence does not occur")


def stoppable(tokens: Sequence[int], start: int = 0) -> int:
    """The first token at or after `start` that may be a stop token: no forced text holds it."""
    return next(t for t in tokens[start:] if t not in (*AFTER_END, *AFTER_CUT))


@shows("mode")
def test_the_mode_decides_what_is_fed(engine: Engine, table: torch.Tensor) -> None:
    hard, soft, fuzzy, mixed = run(
        engine,
        asked(mode="hard"),
        asked(mode="soft", record="dense"),
        asked(mode="fuzzy", record="dense", noise="none"),
        asked(mode="mixed", policy="blend", record="dense"),
    )
    for sample, kind in (
        (hard, Kind.SAMPLED),
        (soft, Kind.SOFT),
        (fuzzy, Kind.SOFT),
        (mixed, Kind.SOFT_SAMPLED),
    ):
        trace = sample.trace
        assert (trace.kind[:THINK] == kind).all()
        assert (trace.phase == [1] * THINK + [2] * len(AFTER_CUT) + [3] * ANSWER).all()
        assert sample.token_ids == trace.token.tolist()
    assert [s.trace.meta["tau"] for s in (hard, soft, fuzzy, mixed)] == [1.0, 0.5, 1e-4, 0.5]
    # Fuzzy is almost the token itself, soft is not.
    shown = table[fuzzy.trace.token[:THINK].astype(np.int64)]
    assert (fuzzy.trace.dense_tensor() - shown).abs().max() < 1e-3
    shown = table[soft.trace.token[:THINK].astype(np.int64)]
    assert (soft.trace.dense_tensor() - shown).pow(2).mean().sqrt() > 0.3 * embedding_rms(table)


@shows("temperature")
def test_the_temperature_sharpens_the_mixture_by_its_inverse(engine: Engine) -> None:
    warm, cold = run(
        engine,
        asked(cot_temperature=2.0, record="top", record_top=3),
        asked(cot_temperature=0.5, record="top", record_top=3),
    )
    a, b = first_mixture(warm), first_mixture(cold)
    assert list(a) == list(b)
    first, second = list(a)[:2]
    ratio = np.log(b[first] / b[second]) / np.log(a[first] / a[second])
    assert ratio == pytest.approx(4.0, rel=1e-3)


@shows("top_k")
def test_top_k_keeps_the_k_most_likely_tokens_renormalised(engine: Engine) -> None:
    whole, three = run(
        engine,
        asked(record="top", record_top=64),
        asked(top_k=3, record="sparse"),
    )
    full = first_mixture(whole)
    trace = three.trace
    assert trace.sparse_ids is not None and trace.sparse_weights is not None
    assert trace.sparse_ids.shape == (THINK, 3)
    assert trace.sparse_weights.sum(axis=1) == pytest.approx(np.ones(THINK), abs=1e-5)
    best = list(full)[:3]
    assert trace.sparse_ids[0].tolist() == best
    mass = sum(full[i] for i in best)
    assert trace.sparse_weights[0] == pytest.approx([full[i] / mass for i in best], rel=1e-4)


@pytest.mark.parametrize("top_k", [0, 64])
@shows("top_p")
def test_top_p_keeps_the_fewest_tokens_that_reach_its_mass(engine: Engine, top_k: int) -> None:
    options = {"cot_temperature": 1.0, "top_k": top_k, "record": "top", "record_top": 64}
    whole, nucleus = run(engine, asked(**options), asked(top_p=0.6, **options))
    full, kept = first_mixture(whole), first_mixture(nucleus)
    masses = np.cumsum(list(full.values()))
    count = int(np.searchsorted(masses, 0.6)) + 1
    assert 1 < count < 64
    assert list(kept) == list(full)[:count]
    assert sum(kept.values()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("top_k", [0, 64])
@shows("min_p")
def test_min_p_drops_tokens_far_below_the_most_likely_one(engine: Engine, top_k: int) -> None:
    options = {"cot_temperature": 1.0, "top_k": top_k, "record": "top", "record_top": 64}
    whole, cut = run(engine, asked(**options), asked(min_p=0.1, **options))
    full, kept = first_mixture(whole), first_mixture(cut)
    best = next(iter(full.values()))
    assert list(kept) == [i for i, w in full.items() if w >= 0.1 * best]
    assert 1 < len(kept) < 64
    assert sum(kept.values()) == pytest.approx(1.0, abs=1e-5)


@shows("noise")
def test_without_noise_the_seed_does_not_matter(engine: Engine) -> None:
    quiet, other, noisy, different = run(
        engine,
        asked(noise="none", seed=1, record="dense"),
        asked(noise="none", seed=2, record="dense"),
        asked(noise="gaussian", seed=1, record="dense"),
        asked(noise="gaussian", seed=2, record="dense"),
    )
    assert same(quiet, other)
    assert quiet.trace.meta["sigma"] == 0.0
    assert noisy.trace.meta["sigma"] > 0.0
    assert not same(noisy, quiet) and not same(noisy, different)


@shows("noise_scale")
def test_the_noise_scale_is_sigma_over_the_table_rms(engine: Engine, table: torch.Tensor) -> None:
    greedy, none, standard, double = run(
        engine,
        asked(noise_scale=0.0, record="dense"),
        asked(noise="none", record="dense"),
        asked(record="dense"),
        asked(noise_scale=0.66, record="dense"),
    )
    assert same(greedy, none)
    mean = none.trace.dense_tensor()[0]
    z = noise.gaussian(torch.tensor([1]), torch.tensor([0]), len(mean))[0]
    for sample, gamma in ((standard, 0.33), (double, 0.66)):
        sigma = noise_sigma(gamma, embedding_rms(table))
        assert sample.trace.meta["sigma"] == sigma
        added = sample.trace.dense_tensor()[0] - mean
        assert (added - sigma * z).abs().max() < 1e-4 * sigma


@shows("seed")
def test_a_seed_repeats_a_request_and_another_one_does_not(engine: Engine) -> None:
    first, again, other = run(engine, *(asked(seed=s, record="dense") for s in (11, 11, 12)))
    assert same(first, again) and not same(first, other)
    assert first.trace.meta["seed"] == 11


@shows("seed")
def test_a_missing_seed_is_drawn_and_the_reported_one_repeats_the_request(engine: Engine) -> None:
    drawn, also_drawn = run(engine, *(asked(seed=None, record="dense", temperature=1.0),) * 2)
    seed = drawn.trace.meta["seed"]
    assert seed != also_drawn.trace.meta["seed"]
    assert not same(drawn, also_drawn)
    (repeated,) = run(engine, asked(seed=seed, record="dense", temperature=1.0))
    assert same(drawn, repeated)


@shows("seed")
def test_the_request_s_own_sampling_seed_is_used_where_the_think_phase_has_none(
    engine: Engine,
) -> None:
    given = asked(seed=77, record="dense")
    own = asked(seed=None, record="dense")
    own.seed = 77
    a, b = run(engine, given, own)
    assert b.trace.meta["seed"] == 77
    assert same(a, b)


@shows("max_think_tokens")
def test_the_budget_ends_thinking(engine: Engine) -> None:
    samples = run(engine, *(asked(max_think_tokens=n) for n in (0, 1, 5)))
    for count, sample in zip((0, 1, 5), samples):
        trace = sample.trace
        assert len(think_tokens(trace)) == count
        assert trace.end_cause == EndCause.BUDGET
        assert trace.token[count : count + 2].tolist() == list(AFTER_CUT)


@shows("max_think_tokens")
def test_a_missing_budget_leaves_room_for_forced_text_and_an_answer(engine: Engine) -> None:
    (sample,) = run(engine, asked(max_think_tokens=None, max_tokens=60))
    # 3 forced tokens (the longer of the two texts) leave 57, of which the answer gets 28 of its 32
    assert len(think_tokens(sample.trace)) == 29
    assert len(sample.token_ids) == 60


@shows("min_think_tokens")
def test_nothing_ends_thinking_before_the_minimum(engine: Engine) -> None:
    (plain,) = run(engine, asked())
    tokens = think_tokens(plain.trace)
    options = {"end_token_ids": tuple((t,) for t in tokens)}
    early, late = run(engine, asked(**options), asked(min_think_tokens=6, **options))
    assert len(think_tokens(early.trace)) == 1
    assert think_tokens(late.trace) == tokens[:6]
    assert late.trace.end_cause == EndCause.END_SEQUENCE
    frozen, warm = run(
        engine,
        asked(cold_stop_entropy=100.0, cold_stop_steps=2),
        asked(cold_stop_entropy=100.0, cold_stop_steps=2, min_think_tokens=6),
    )
    assert len(think_tokens(frozen.trace)) == 2
    assert len(think_tokens(warm.trace)) == 6


@shows("min_think_tokens")
def test_stop_tokens_are_masked_before_the_minimum(engine: Engine) -> None:
    (plain,) = run(engine, asked(noise="none"))
    tokens = think_tokens(plain.trace)
    assert tokens[0] == stoppable(tokens)
    options = {"stop_token_ids": [tokens[0]], "noise": "none"}
    stopped, masked = run(engine, asked(**options), asked(min_think_tokens=2, **options))
    assert stopped.trace.end_cause == EndCause.EOS and think_tokens(stopped.trace) == []
    assert len(think_tokens(masked.trace)) >= 2
    assert masked.trace.token[0] != tokens[0]


def printable_pair(engine: Engine) -> tuple[SamplingParams, Sample, int]:
    """A request of whose think tokens two neighbours spell a plain text, and where.

    The two are also how the tokenizer spells that text, and the text occurs only there.
    """
    tokenizer = tiny_tokenizer()
    params = [asked(seed=s, max_think_tokens=40, max_tokens=45) for s in range(16)]
    for request, sample in zip(params, run(engine, *params)):
        tokens = think_tokens(sample.trace)
        for at in range(3, len(tokens) - 1):
            pair = tokens[at : at + 2]
            text = tokenizer.decode(pair)
            plain = text.isascii() and text.isprintable() and len(text.strip()) >= 3
            before = tokenizer.decode(tokens[: at + 1])
            spelt = tokenizer.encode(text, add_special_tokens=False)
            if plain and spelt == pair and text not in before:
                return request, sample, at
    raise AssertionError("no seed gave two tokens that spell a plain text")


@shows("end_strings")
def test_an_end_string_in_the_shadow_text_ends_thinking(engine: Engine) -> None:
    request, sample, at = printable_pair(engine)
    tokens = think_tokens(sample.trace)
    text = tiny_tokenizer().decode(tokens[at : at + 2])
    cot = {**request.extra_args["cot"], "end_strings": (text,)}
    (ended,) = run(engine, soft_params(CoTParams.from_dict(cot), max_tokens=45, ignore_eos=True))
    assert think_tokens(ended.trace) == tokens[: at + 2]
    assert ended.trace.end_cause == EndCause.END_SEQUENCE
    assert ended.trace.token[at + 2 : at + 5].tolist() == list(AFTER_END)


@shows("end_token_ids")
def test_a_multi_token_end_sequence_needs_all_its_tokens_in_order(engine: Engine) -> None:
    (plain,) = run(engine, asked())
    tokens = think_tokens(plain.trace)
    pair = tuple(tokens[2:4])
    unseen = next(i for i in range(200, 500) if i not in tokens)
    ended, unmatched = run(
        engine,
        asked(end_token_ids=(pair,)),
        # Its last token occurs, the pair does not.
        asked(end_token_ids=((unseen, pair[1]),)),
    )
    count = first_match(tokens, pair)
    assert think_tokens(ended.trace) == tokens[:count]
    assert ended.trace.end_cause == EndCause.END_SEQUENCE
    assert unmatched.trace.end_cause == EndCause.BUDGET


@shows("force_after_end", "force_after_cut")
def test_the_forced_text_depends_on_how_thinking_ended(engine: Engine) -> None:
    (plain,) = run(engine, asked())
    first = think_tokens(plain.trace)[0]
    ends: list[tuple[dict[str, Any], EndCause, int]] = [
        ({"end_token_ids": ((first,),)}, EndCause.END_SEQUENCE, 1),
        ({}, EndCause.BUDGET, THINK),
        ({"stop_token_ids": [first]}, EndCause.EOS, 0),
        ({"cold_stop_entropy": 100.0, "cold_stop_steps": 1}, EndCause.COLD_STOP, 1),
    ]
    texts = {"force_after_end": " the end", "force_after_cut": " a cut"}
    tokenizer = tiny_tokenizer()
    samples = run(engine, *(asked(**options) for options, _, _ in ends))
    spelt = run(engine, *(asked(max_tokens=30, **texts, **options) for options, _, _ in ends))
    for (_, cause, count), by_ids, by_text in zip(ends, samples, spelt):
        early = cause == EndCause.END_SEQUENCE
        text = texts["force_after_end" if early else "force_after_cut"]
        for sample, forced in (
            (by_ids, list(AFTER_END if early else AFTER_CUT)),
            (by_text, tokenizer.encode(text, add_special_tokens=False)),
        ):
            trace = sample.trace
            assert trace.end_cause == cause
            at = slice(count, count + len(forced))
            assert trace.token[at].tolist() == forced
            assert (trace.kind[at] == Kind.FORCED).all() and (trace.phase[at] == 2).all()
            assert trace.phase[at.stop] == Phase.ANSWER
        assert text in by_text.text


@shows("force_after_end", "force_after_cut")
def test_no_forced_text_leads_straight_to_the_answer(engine: Engine) -> None:
    (plain,) = run(engine, asked())
    first = think_tokens(plain.trace)[0]
    bare = {"force_after_end": "", "force_after_cut": ""}
    ended, cut, stopped = run(
        engine,
        asked(end_token_ids=((first,),), **bare),
        asked(**bare),
        asked(stop_token_ids=[first], **bare),
    )
    assert ended.trace.phase[:2].tolist() == [Phase.THINK, Phase.ANSWER]
    assert cut.trace.phase[THINK - 1 : THINK + 1].tolist() == [Phase.THINK, Phase.ANSWER]
    # The stop token is itself the answer's most likely first token: it ends the request there.
    assert stopped.trace.phase.tolist() == [Phase.ANSWER]
    assert stopped.finish_reason == "stop" and stopped.stop_reason == first


@shows("cold_stop_entropy", "cold_stop_steps")
def test_the_cold_stop_waits_for_enough_sure_steps(engine: Engine) -> None:
    (plain,) = run(engine, asked(max_think_tokens=40, max_tokens=45))
    entropy = plain.trace.entropy[:40]
    threshold = float(np.quantile(entropy, 0.7))
    run_lengths, count = [], 0
    for value in entropy:
        count = count + 1 if value < threshold else 0
        run_lengths.append(count)
    expected = run_lengths.index(2) + 1
    assert expected < 40
    long = {"max_think_tokens": 40, "max_tokens": 45}
    cold, patient, never = run(
        engine,
        asked(cold_stop_entropy=threshold, cold_stop_steps=2, **long),
        asked(cold_stop_entropy=threshold, cold_stop_steps=41, **long),
        asked(cold_stop_entropy=1e-6, cold_stop_steps=1, **long),
    )
    assert cold.trace.end_cause == EndCause.COLD_STOP
    assert len(think_tokens(cold.trace)) == expected
    assert patient.trace.end_cause == never.trace.end_cause == EndCause.BUDGET


@shows("policy", "policy_params")
def test_blend_weighs_the_mixture_against_the_sampled_token(
    engine: Engine, table: torch.Tensor
) -> None:
    quiet = {"noise": "none", "record": "dense"}
    mixture, whole, token, half = run(
        engine,
        asked(**quiet),
        *(
            asked(mode="mixed", policy="blend", policy_params={"weight": w}, **quiet)
            for w in (1.0, 0.0, 0.25)
        ),
    )
    mean = mixture.trace.dense_tensor()[0]
    assert torch.allclose(whole.trace.dense_tensor()[0], mean, atol=1e-5)
    drawn = table[token.trace.token[:THINK].astype(np.int64)]
    assert torch.allclose(token.trace.dense_tensor(), drawn, atol=1e-6)
    expected = 0.25 * mean + 0.75 * table[int(half.trace.token[0])]
    assert torch.allclose(half.trace.dense_tensor()[0], expected, atol=1e-5)
    assert (half.trace.log_prob[:THINK] < 0).all()


@shows("policy", "policy_params")
def test_interleave_is_soft_with_its_probability(engine: Engine) -> None:
    long = {"max_think_tokens": 200, "max_tokens": 210}
    never, always, often = run(
        engine,
        *(
            asked(mode="mixed", policy="interleave", policy_params={"p": p}, **long)
            for p in (0.0, 1.0, 0.75)
        ),
    )
    share = [float((s.trace.kind[:200] == Kind.SOFT).mean()) for s in (never, always, often)]
    assert share[:2] == [0.0, 1.0]
    assert abs(share[2] - 0.75) < 0.12  # four standard deviations


@pytest.mark.parametrize("soft_above", [1.0, 0.0])
@shows("policy", "policy_params")
def test_the_entropy_policy_follows_its_thresholds_with_hysteresis(
    engine: Engine, soft_above: float
) -> None:
    long = {"max_think_tokens": 100, "max_tokens": 110}
    samples = run(engine, asked(**long), asked(mode="hard", **long))
    usual = np.concatenate([s.trace.entropy[:100] for s in samples])
    low, high = (float(np.quantile(usual, q)) for q in (0.35, 0.65))
    params = {"low": low, "high": high, "soft_above": soft_above}
    (sample,) = run(engine, asked(mode="mixed", policy="entropy", policy_params=params, **long))
    trace = sample.trace
    side = "high" if soft_above else "low"
    expected, between = [], 0
    for value in trace.entropy[:100]:
        between += low <= value < high
        side = "high" if value >= high else "low" if value < low else side
        expected.append((side == "high") == bool(soft_above))
    assert (trace.kind[:100] == Kind.SOFT).tolist() == expected
    assert 0 < sum(expected) < 100 and between > 0


@shows("record", "record_top")
def test_the_trace_holds_what_record_asks_for(engine: Engine, table: torch.Tensor) -> None:
    steps, top, five, sparse, dense = run(
        engine,
        asked(top_k=4, record="steps"),
        asked(top_k=4, record="top"),
        asked(record="top", record_top=5),
        asked(top_k=4, record="sparse"),
        asked(top_k=4, record="dense"),
    )
    arrays = ("top_ids", "top_weights", "sparse_ids", "sparse_weights", "dense")
    held = [{a for a in arrays if getattr(s.trace, a) is not None} for s in (steps, top, five)]
    assert held == [set(), {"top_ids", "top_weights"}, {"top_ids", "top_weights"}]
    held = [{a for a in arrays if getattr(s.trace, a) is not None} for s in (sparse, dense)]
    assert held == [{"sparse_ids", "sparse_weights"}, {"dense"}]
    assert top.trace.top_ids is not None and top.trace.top_ids.shape == (THINK, 8)
    assert five.trace.top_ids is not None and five.trace.top_ids.shape == (THINK, 5)
    assert dense.trace.dense is not None and dense.trace.dense.shape == (THINK, table.shape[1])
    # Recording changes nothing, and both full records rebuild the same inputs.
    assert len({tuple(s.token_ids) for s in (steps, top, sparse, dense)}) == 1
    a, b = reconstruct(sparse.trace, table), reconstruct(dense.trace, table)
    assert torch.allclose(a, b, atol=1e-5)
    for sample in (steps, five, sparse):
        assert len(sample.trace) == len(sample.token_ids)
        assert sample.trace.token.tolist() == sample.token_ids


@shows("answer_max_tokens")
def test_the_answer_can_have_a_limit_of_its_own(engine: Engine) -> None:
    free, bound = run(engine, asked(max_tokens=40), asked(max_tokens=40, answer_max_tokens=5))
    assert int((free.trace.phase == Phase.ANSWER).sum()) == 40 - THINK - len(AFTER_CUT)
    assert int((bound.trace.phase == Phase.ANSWER).sum()) == 5
    assert bound.finish_reason == "length"
    assert bound.token_ids == free.token_ids[: len(bound.token_ids)]


@shows("seed")
def test_each_of_n_samples_has_a_derived_seed_that_repeats_it_alone(engine: Engine) -> None:
    options = {"record": "dense", "temperature": 1.0}
    (samples,) = engine.generate([PROMPT], [asked(seed=5, n=4, **options)])
    seeds = [s.trace.meta["seed"] for s in samples]
    assert seeds == [noise.derive_seed(5, i) for i in range(4)]
    assert len({tuple(s.token_ids) for s in samples}) == 4
    alone = run(engine, *(asked(seed=s, **options) for s in seeds))
    for a, b in zip(samples, alone):
        assert same(a, b)
    (again,) = engine.generate([PROMPT], [asked(seed=5, n=4, **options)])
    assert all(same(a, b) for a, b in zip(samples, again))
    (drawn,) = engine.generate([PROMPT], [asked(seed=None, n=3, **options)])
    assert len({s.trace.meta["seed"] for s in drawn}) == 3
    (repeated,) = run(engine, asked(seed=drawn[2].trace.meta["seed"], **options))
    assert same(drawn[2], repeated)


@pytest.mark.parametrize("mode", [{"mode": "soft"}, {"mode": "hard", "cot_temperature": 1e-4}])
def test_a_stop_token_in_the_think_phase_does_not_end_the_request(
    engine: Engine, mode: dict[str, Any]
) -> None:
    (plain,) = run(engine, asked(**mode))
    tokens = think_tokens(plain.trace)
    stop = stoppable(tokens, 3)
    at = tokens.index(stop)
    (stopped,) = run(engine, asked(stop_token_ids=[stop], **mode))
    trace = stopped.trace
    assert trace.end_cause == EndCause.EOS
    assert think_tokens(trace) == tokens[:at]
    # The stop token is never shown: the forced text starts in its place.
    assert trace.token[at : at + 2].tolist() == list(AFTER_CUT)
    assert int((trace.phase == Phase.ANSWER).sum()) >= 1


def test_every_field_has_a_test_that_shows_its_effect() -> None:
    assert {field.name for field in dataclasses.fields(CoTParams)} == SHOWN


@shows("answer_greedy")
def test_chains_of_a_group_may_differ_and_still_answer_greedily(engine: Engine) -> None:
    (samples,) = engine.generate([PROMPT], [asked(seed=5, n=3, temperature=0.0)])
    assert len({tuple(s.token_ids[:THINK]) for s in samples}) == 3
    for sample in samples:
        seed = sample.trace.meta["seed"]
        (alone,) = run(engine, asked(seed=seed, temperature=0.0))
        assert sample.token_ids == alone.token_ids
        assert (sample.trace.log_prob[sample.trace.phase == Phase.ANSWER] == 0).all()
