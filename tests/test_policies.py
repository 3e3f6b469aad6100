"""Step policies: what a think step shows, feeds and counts, through the one `think_step`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softvllm.core import mixture, noise, policies
from softvllm.core.params import CoTParams, CoTParamsError
from softvllm.core.phases import SlotState
from softvllm.core.policies import Decision, StepContext
from softvllm.core.resolve import ResolvedCoT, resolve
from softvllm.core.think import Group, ThinkStep, sample_answer, think_step

fast = settings(max_examples=20, deadline=None)  # a deadline would only measure load

VOCAB, DIM = 61, 16
TABLE = torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(0))
NO_TEXTS: dict[str, Any] = {"end_strings": [], "force_after_end": [], "force_after_cut": []}


def resolved(stop_ids: tuple[int, ...] = (2,), **params: Any) -> ResolvedCoT:
    return resolve(
        CoTParams(**{"seed": 1, **NO_TEXTS, **params}),
        None,
        stop_ids=stop_ids,
        vocab_size=VOCAB,
        greedy_answer=False,
    )


def logits_of(seed: int, rows: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def step(
    cots: list[ResolvedCoT],
    logits: torch.Tensor,
    position: int | torch.Tensor = 0,
    state: SlotState | None = None,
    **group: Any,
) -> ThinkStep:
    """One think step of requests that share a policy, in slots 1, 2, ..."""
    if state is None:
        state = SlotState(len(cots) + 1, "cpu")
        for slot, cot in enumerate(cots, 1):
            state.set_request(slot, cot)
    slots = torch.arange(1, len(cots) + 1)
    if isinstance(position, int):
        position = torch.full_like(slots, position)
    top_k = max(c.top_k for c in cots)
    settings = {
        "max_top_k": top_k,
        "uses_top_p": any(c.top_p < 1 for c in cots),
        "uses_min_p": any(c.min_p > 0 for c in cots),
    }
    return think_step(
        Group(cots[0].policy, top_k > 0, **(settings | group)),
        logits,
        state,
        slots,
        position,
        expect=lambda dist: dist.expect(TABLE),
        gather=partial(mixture.sparse_expect, table=TABLE),
    )


def many(rows: int, **params: Any) -> list[ResolvedCoT]:
    return [resolved(**params, seed=s) for s in range(rows)]


# ---- the pure modes --------------------------------------------------------------------------


@fast
@given(seed=st.integers(0, 10**6), mode=st.sampled_from(["soft", "fuzzy"]))
def test_soft_feeds_the_mixture_and_shows_the_shadow(seed, mode):
    logits = logits_of(seed, 3)
    cots = many(3, mode=mode)
    got = step(cots, logits)
    tau = {"soft": 0.5, "fuzzy": 1e-4}[mode]
    want = torch.softmax(logits.double() / tau, -1) @ TABLE.double()
    torch.testing.assert_close(
        got.mean, want.float(), atol=1e-3 if mode == "fuzzy" else 1e-5, rtol=0
    )
    assert got.token.tolist() == logits.argmax(-1).tolist()
    assert got.soft.all() and not got.sampled.any() and (got.log_prob == 0).all()
    torch.testing.assert_close(got.entropy, mixture.entropy(logits))


def test_fuzzy_feeds_nearly_the_embedding_of_the_shadow():
    logits = logits_of(0, 4)
    got = step(many(4, mode="fuzzy"), logits)
    torch.testing.assert_close(got.mean, TABLE[logits.argmax(-1)], atol=1e-4, rtol=0)


def test_the_shadow_ignores_temperature_and_support():
    logits = logits_of(1, 2)
    got = step(many(2, temperature=7.0, top_k=3, top_p=0.1), logits)
    assert got.token.tolist() == logits.argmax(-1).tolist()


def test_hard_samples_at_its_temperature_and_feeds_no_mixture():
    rows = 4000
    logits = logits_of(2, 1).expand(rows, -1)
    got = step(many(rows, mode="hard", temperature=0.7), logits)
    p = torch.softmax(logits[0] / 0.7, -1)
    counts = torch.bincount(got.token, minlength=VOCAB).float()
    common = p * rows >= 5
    chi2 = ((counts - p * rows) ** 2 / (p * rows))[common].sum()
    degrees = int(common.sum())
    assert abs(float(chi2) - degrees) < 4 * math.sqrt(2 * degrees)
    torch.testing.assert_close(got.log_prob, p.log()[got.token])
    assert got.sampled.all() and not got.soft.any() and got.mean.numel() == 0


def test_a_step_repeats_with_the_seed_and_changes_with_seed_and_position():
    logits = logits_of(3, 1, scale=0.1).expand(64, -1)
    base = step([resolved(mode="hard")] * 64, logits).token
    assert len(set(base.tolist())) == 1
    assert len(set(step(many(64, mode="hard"), logits).token.tolist())) > 20
    moved = step([resolved(mode="hard")] * 64, logits, position=torch.arange(64)).token
    assert len(set(moved.tolist())) > 20
    assert moved[0] == base[0]


# ---- blend -----------------------------------------------------------------------------------


@fast
@given(seed=st.integers(0, 10**6), weight=st.floats(0, 1), top_k=st.sampled_from([0, 5]))
def test_blend_feeds_the_convex_combination_of_mixture_and_sampled_token(seed, weight, top_k):
    logits = logits_of(seed, 3)
    cots = many(3, mode="mixed", policy="blend", policy_params={"weight": weight}, top_k=top_k)
    got = step(cots, logits)
    p = torch.softmax(logits.double() / 0.5, -1)
    if top_k:
        p = torch.where(p >= p.topk(top_k).values[:, -1:], p, 0.0)
        p /= p.sum(1, keepdim=True)
    want = weight * (p @ TABLE.double()) + (1 - weight) * TABLE[got.token].double()
    torch.testing.assert_close(got.mean, want.float(), atol=1e-5, rtol=0)
    assert got.soft.all() and got.sampled.all()
    log_p = p.log()[torch.arange(3), got.token]
    torch.testing.assert_close(got.log_prob.double(), log_p, atol=1e-4, rtol=1e-4)


def test_blend_shows_the_token_that_hard_would_sample():
    logits = logits_of(4, 50)
    blend = step(many(50, mode="mixed", policy="blend"), logits)
    hard = step(many(50, mode="hard", temperature=0.5), logits)
    assert torch.equal(blend.token, hard.token)
    assert not torch.equal(blend.token, logits.argmax(-1)), "really sampled"


# ---- interleave ------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_interleave_is_soft_with_its_probability(p):
    rows = 2048
    logits = logits_of(5, 1).expand(rows, -1)
    cots = many(rows, mode="mixed", policy="interleave", policy_params={"p": p})
    got = step(cots, logits)
    share = float(got.soft.float().mean())
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / rows)
    assert torch.equal(got.sampled, ~got.soft)
    hard = step(many(rows, mode="hard", temperature=0.5), logits)
    assert torch.equal(got.token, torch.where(got.soft, logits.argmax(-1), hard.token))
    assert torch.equal(got.log_prob, torch.where(got.soft, 0.0, hard.log_prob))


def test_the_choice_of_interleave_is_independent_of_the_token_and_of_the_last_step():
    rows = 2048
    logits = torch.zeros(rows, VOCAB)  # uniform: the token is the uniform that drew it
    cots = [resolved(mode="mixed", policy="interleave", policy_params={"p": 0.5})] * rows
    got = step(cots, logits, position=torch.arange(rows))
    hard = step([resolved(mode="hard")] * rows, logits, position=torch.arange(rows))
    choice = got.soft.float() - 0.5
    middle = (VOCAB - 1) / 2
    spread = float(hard.token.float().std())
    for other in ((hard.token - middle) / spread, 2 * choice.roll(1)):
        assert abs(float((2 * choice * other).mean())) < 4 / math.sqrt(rows)


# ---- entropy ---------------------------------------------------------------------------------


def logits_with_entropy(value: float) -> torch.Tensor:
    """One row of logits with about the given entropy; NaN gives NaN."""
    if math.isnan(value):
        return torch.full((1, VOCAB), torch.nan)
    low, high = 0.0, 50.0
    ramp = -torch.arange(VOCAB).float()
    for _ in range(60):
        middle = (low + high) / 2
        if float(mixture.entropy(middle * ramp[None])) > value:
            low = middle
        else:
            high = middle
    return middle * ramp[None]


@fast
@given(
    entropies=st.lists(
        st.sampled_from([0.1, 0.9, 1.5, 2.1, 3.5, math.nan]), min_size=1, max_size=8
    ),
    above=st.sampled_from([0, 1]),
)
def test_the_entropy_policy_switches_with_hysteresis(entropies, above):
    low, high = 1.0, 2.0
    params = {"low": low, "high": high, "soft_above": above}
    state = SlotState(2, "cpu")
    state.set_request(1, resolved(mode="mixed", policy="entropy", policy_params=params))
    soft = True  # the first step starts soft
    for position, value in enumerate(entropies):
        got = step(
            [resolved(mode="mixed", policy="entropy", policy_params=params)],
            logits_with_entropy(value),
            position,
            state,
        )
        state.policy_state[1] = got.state[0]
        if value >= high:
            soft = bool(above)
        elif value < low:
            soft = not above
        assert bool(got.soft[0]) is soft, (position, value)
        assert bool(got.sampled[0]) is not soft
        if not math.isnan(value):
            assert abs(float(got.entropy[0]) - value) < 0.01


def test_entropy_rows_do_not_share_their_memory():
    params = {"low": 1.0, "high": 2.0}
    cots = many(2, mode="mixed", policy="entropy", policy_params=params)
    state = SlotState(3, "cpu")
    for slot, cot in enumerate(cots, 1):
        state.set_request(slot, cot)
    sure, unsure, between = map(logits_with_entropy, (0.1, 3.5, 1.5))
    got = step(cots, torch.cat((sure, unsure)), 0, state)
    assert got.soft.tolist() == [False, True]
    state.policy_state[1:] = got.state
    assert step(cots, torch.cat((between, between)), 1, state).soft.tolist() == [False, True]


# ---- records and masks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"mode": "soft"},
        {"mode": "mixed", "policy": "blend", "policy_params": {"weight": 0.3}},
        {"mode": "mixed", "policy": "interleave"},
    ],
    ids=lambda p: p.get("policy", "soft"),
)
def test_the_sparse_record_rebuilds_the_mixture(params):
    """Also where a neighbour's top_k is larger: the leading columns are the row's own."""
    logits = logits_of(6, 3)
    cots = [resolved(**params, seed=s, top_k=k) for s, k in enumerate((3, 9, 1))]
    got = step(cots, logits, record_sparse=True)
    assert got.sparse_ids is not None and got.sparse_weights is not None
    extra = policies.get(cots[0].policy).num_extra
    assert got.sparse_ids.shape == (3, 9 + extra)
    for i, cot in enumerate(cots):
        width = cot.top_k + extra
        assert (got.sparse_weights[i, width:] == 0).all()
        if got.soft[i]:
            rebuilt = got.sparse_weights[i, :width] @ TABLE[got.sparse_ids[i, :width]]
            torch.testing.assert_close(rebuilt, got.mean[i], atol=1e-6, rtol=0)


def test_the_top_record_holds_the_most_likely_tokens_at_tau():
    logits = logits_of(7, 2)
    got = step(many(2), logits, record_top=4)
    p = torch.softmax(logits / 0.5, -1)
    assert got.top_ids is not None and got.top_probs is not None
    torch.testing.assert_close(got.top_probs, p.topk(4).values)
    torch.testing.assert_close(p.gather(1, got.top_ids), got.top_probs)


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_stop_tokens_are_masked_until_min_think_tokens(mode):
    logits = logits_of(8, 4)
    logits[:, [0, 2]] = 50.0  # both stops, token id 0 among them
    cots = [resolved((0, 2), mode=mode, min_think_tokens=m, seed=1) for m in (0, 5, 6, 5)]
    cots[3] = resolved((2,), mode=mode, min_think_tokens=6, seed=1)  # id 0 is no stop of this one
    got = step(cots, logits, 5, masks_stop=True)
    assert got.token[0] in (0, 2) and got.token[1] in (0, 2), "5 tokens were thought already"
    assert got.token[2] not in (0, 2)
    assert got.token[3] == 0
    assert got.entropy.isfinite().all() and (got.entropy >= 0).all()
    assert float(got.entropy[0]) == pytest.approx(math.log(2), abs=1e-4)
    if mode == "soft":
        rest = [v for v in range(VOCAB) if v not in (0, 2)]
        want = torch.softmax(logits[2, rest] / 0.5, -1) @ TABLE[rest]
        torch.testing.assert_close(got.mean[2], want, atol=1e-5, rtol=0)


# ---- answers ---------------------------------------------------------------------------------


def test_answers_are_drawn_from_the_shaped_logits_and_greedy_rows_take_the_argmax():
    rows = 3000
    state = SlotState(rows, "cpu")
    state.ints[:, state.SEED] = torch.arange(rows)
    state.ints[rows // 2 :, state.GREEDY] = 1
    logits = logits_of(9, 1).expand(rows, -1).clone()
    logits[:, 30:] = -torch.inf
    slots = torch.arange(rows)
    token, log_prob = sample_answer(logits, state, slots, torch.full_like(slots, 4))
    greedy = state.ints[:, state.GREEDY] > 0
    assert (token[greedy] == logits[0].argmax()).all() and (log_prob[greedy] == 0).all()
    drawn = token[~greedy]
    p = torch.softmax(logits[0], -1)
    assert (drawn < 30).all()
    torch.testing.assert_close(log_prob[~greedy], p.log()[drawn])
    counts = torch.bincount(drawn, minlength=VOCAB).float()
    common = p * len(drawn) >= 5
    chi2 = float(((counts - p * len(drawn)) ** 2 / (p * len(drawn)))[common].sum())
    assert abs(chi2 - int(common.sum())) < 4 * math.sqrt(2 * int(common.sum()))


def test_nan_logits_show_in_the_log_prob_of_greedy_answers_too():
    state = SlotState(2, "cpu")
    state.ints[:, state.GREEDY] = 1
    logits = logits_of(9, 2)
    logits[1, 3] = torch.nan
    _, log_prob = sample_answer(logits, state, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    assert log_prob[0] == 0 and log_prob[1].isnan()


def test_an_answer_is_not_tied_to_the_think_token_of_the_same_position():
    """Both at temperature 1 from the same logits, as when EOS ends thinking and no text is
    forced: with one uniform for both, the answer would always repeat the think token."""
    rows = 2000
    logits = torch.zeros(rows, VOCAB)
    think = step(many(rows, mode="hard"), logits).token
    state = SlotState(rows, "cpu")
    state.ints[:, state.SEED] = torch.arange(rows)
    slots = torch.arange(rows)
    answer, _ = sample_answer(logits, state, slots, torch.zeros_like(slots))
    same = float((think == answer).float().mean())
    assert abs(same - 1 / VOCAB) < 4 * math.sqrt(1 / VOCAB / rows)


# ---- new policies without touching anything ----------------------------------------------------


@dataclass(frozen=True)
class KSampleMerge:
    """Multiplex: the mean of k sampled tokens' embeddings."""

    params: Mapping[str, tuple[float, float, float | None]] = field(
        default_factory=lambda: {"k": (1.0, 4.0, 3.0)}
    )
    num_extra: int = 4

    def decide(self, ctx: StepContext) -> Decision:
        ids = torch.stack([ctx.dist.sample(ctx.uniform(i)) for i in range(self.num_extra)], dim=1)
        k = ctx.params[:, :1]
        weights = (torch.arange(self.num_extra)[None] < k) / k
        on = torch.ones_like(ctx.shadow, dtype=torch.bool)
        return Decision(ids[:, 0], on, on, torch.zeros_like(ctx.entropy), ids, weights)


@dataclass(frozen=True)
class GumbelTop:
    """Gumbel-softmax over the five most likely tokens; counts its steps in the state."""

    params: Mapping[str, tuple[float, float, float | None]] = field(
        default_factory=lambda: {"tau": (0.01, 10.0, None)}
    )
    num_extra: int = 5

    def decide(self, ctx: StepContext) -> Decision:
        ids, probs = ctx.dist.top(self.num_extra)
        u = torch.stack([ctx.uniform(i) for i in range(self.num_extra)], dim=1)
        gumbel = -(-u.log()).log()
        weights = torch.softmax((probs.log() + gumbel.float()) / ctx.params[:, :1], -1)
        on = torch.ones_like(ctx.shadow, dtype=torch.bool)
        token = ids.gather(1, weights.argmax(1, keepdim=True))[:, 0]
        zero = torch.zeros_like(ctx.entropy)
        return Decision(token, on, ~on, zero, ids, weights, state=ctx.state + 1)


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    policies.register("k-merge", KSampleMerge())
    policies.register("gumbel", GumbelTop())
    yield
    del policies._REGISTRY["k-merge"], policies._REGISTRY["gumbel"]


@pytest.mark.parametrize("top_k", [0, 6])
@pytest.mark.parametrize(("name", "params"), [("k-merge", {"k": 2}), ("gumbel", {"tau": 0.5})])
def test_a_registered_policy_runs_through_the_think_step(registered, name, params, top_k):
    logits = logits_of(10, 4)
    given_params = {"mode": "mixed", "policy": name, "policy_params": params, "top_k": top_k}
    got = step(many(4, **given_params), logits, record_sparse=top_k > 0)
    assert got.soft.all() and got.mean.shape == (4, DIM)
    if name == "k-merge":
        p = torch.softmax(logits / 0.5, -1)
        ids = torch.stack(
            [mixture.inverse_cdf(p, noise.uniform(torch.arange(4), torch.zeros(4).long(), 2, i))
             for i in range(2)], dim=1,
        )  # fmt: skip
        if not top_k:
            torch.testing.assert_close(got.mean, TABLE[ids].mean(1), atol=1e-6, rtol=0)
            assert torch.equal(got.token, ids[:, 0]) and got.sampled.all()
    else:
        assert (got.state == 1).all(), "its memory comes back"
        # On the segment hull of the five most likely: weights are positive and add up to one.
        near = torch.linalg.lstsq(
            torch.cat((TABLE[logits[0].topk(5).indices], torch.ones(5, 1)), 1).T,
            torch.cat((got.mean[0], torch.ones(1))),
        )
        assert (near.solution > -1e-4).all() and near.solution.sum() == pytest.approx(1, abs=1e-4)
    if top_k:
        assert got.sparse_ids is not None and got.sparse_weights is not None
        rebuilt = mixture.sparse_expect(got.sparse_ids, got.sparse_weights, TABLE)
        torch.testing.assert_close(rebuilt, got.mean, atol=1e-6, rtol=0)


def test_a_merge_of_samples_has_the_mixture_as_its_mean(registered):
    rows = 3000
    logits = logits_of(11, 1).expand(rows, -1)
    merged = step(
        many(rows, mode="mixed", policy="k-merge", policy_params={"k": 4}), logits
    ).mean.double()
    want = step(many(1, mode="soft"), logits[:1]).mean.double()
    error = (merged.mean(0) - want[0]) / (merged.std(0) / math.sqrt(rows))
    assert (error.abs() < 5).all()


def test_a_registered_policy_is_offered_and_its_numbers_are_checked(registered):
    assert {"k-merge", "gumbel", "blend", "interleave", "entropy"} <= set(policies.names())
    assert resolved(mode="mixed", policy="k-merge").policy_values == [3.0, 0.0, 0.0, 0.0]
    with pytest.raises(CoTParamsError, match=r"policy_params: k must be a number in \[1, 4\]"):
        CoTParams(mode="mixed", policy="k-merge", policy_params={"k": 5})
    with pytest.raises(CoTParamsError, match="gumbel needs 'tau'"):
        CoTParams(mode="mixed", policy="gumbel")


def test_a_policy_that_does_not_fit_is_not_registered():
    with pytest.raises(ValueError, match="exists already"):
        policies.register("blend", KSampleMerge())
    many_params = {f"p{i}": (0.0, 1.0, 0.5) for i in range(policies.NUM_PARAMS + 1)}
    with pytest.raises(ValueError, match="5 parameters, 4 fit"):
        policies.register("greedy-for-numbers", KSampleMerge(params=many_params))
    assert "greedy-for-numbers" not in policies.names()


@pytest.mark.parametrize(
    ("policy", "params", "field", "words"),
    [
        (None, {}, "policy", ["blend", "interleave", "entropy", "None"]),
        ("nearest", {}, "policy", ["blend", "interleave", "entropy", "nearest"]),
        ("soft", {}, "policy", ["blend"]),
        (["blend"], {}, "policy", ["blend"]),
        ("blend", {"wieght": 0.5}, "policy_params", ["weight", "wieght"]),
        ("blend", {"weight": 1.5}, "policy_params", ["weight", "[0, 1]", "1.5"]),
        ("blend", {"weight": -0.1}, "policy_params", ["weight", "[0, 1]"]),
        ("blend", {"weight": math.nan}, "policy_params", ["weight", "[0, 1]", "nan"]),
        ("blend", {"weight": True}, "policy_params", ["weight", "[0, 1]"]),
        ("blend", {"weight": "0.5"}, "policy_params", ["weight", "[0, 1]"]),
        ("blend", {"weight": 10**400}, "policy_params", ["weight", "[0, 1]"]),
        ("interleave", {"p": 2}, "policy_params", ["p", "[0, 1]"]),
        ("entropy", {}, "policy_params", ["low"]),
        ("entropy", {"low": 1.0}, "policy_params", ["high"]),
        ("entropy", {"low": 2.0, "high": 1.0}, "policy_params", ["low", "high"]),
        ("entropy", {"low": 0, "high": 1001}, "policy_params", ["high", "[0, 1000]"]),
    ],
)
def test_wrong_policies_and_numbers_are_refused(policy, params, field, words):
    with pytest.raises(CoTParamsError) as caught:
        CoTParams(mode="mixed", policy=policy, policy_params=params)
    assert caught.value.field == field
    for word in [f"cot.{field}", *words]:
        assert word in str(caught.value)


def test_values_come_in_declared_order_with_defaults():
    assert policies.values("blend", {}) == [0.5, 0, 0, 0]
    assert policies.values("entropy", {"high": 2, "low": 1}) == [1, 2, 1, 0]
    assert policies.values("soft", {}) == [0, 0, 0, 0]
