"""The CoT distribution and its mixture, against naive float64 loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from softvllm.core import mixture
from softvllm.core.mixture import DROPPED_MASS, Dense, Sparse
from softvllm.engine import cpu_kernels
from softvllm.engine.embedding import SoftTable, _split_bf16

fast = settings(max_examples=30, deadline=None)  # a deadline would only measure load

SEEDS = st.integers(0, 2**31)
WIDTHS = st.sampled_from([2, 3, 17, 255, 256, 257, 509, 700])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_logits(seed: int, rows: int, columns: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def full(value: float, rows: int) -> torch.Tensor:
    return torch.full((rows,), value)


def naive(
    logits: torch.Tensor, tau: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """float64 [V] of one row: sort, keep, renormalise. Ties go to the lowest id."""
    x = logits.double().numpy() / tau
    p = np.exp(x - x.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda v: (-p[v], v))
    if min_p:
        assume(all(abs(p[v] / p[order[0]] - min_p) > 1e-5 for v in order))  # not a matter of ulps
        order = [v for v in order if p[v] >= min_p * p[order[0]]]
    if top_k:
        order = order[:top_k]
    p /= p[order].sum()
    if top_p < 1.0:
        kept, mass = [], 0.0
        for v in order:
            assume(abs(mass - top_p) > 1e-5)
            if mass >= top_p:
                break
            kept.append(v)
            mass += p[v]
        order = kept
    out = np.zeros_like(p)
    out[order] = p[order] / p[order].sum()
    return out


def as_rows(dist: mixture.Distribution, columns: int) -> np.ndarray:
    """float64 [B, V] of either representation."""
    if isinstance(dist, Dense):
        return dist.probs.double().numpy()
    out = torch.zeros(len(dist.ids), columns, dtype=torch.float64)
    return out.scatter_(1, dist.ids, dist.probs.double()).numpy()


# ---- supports --------------------------------------------------------------------------------


@fast
@given(
    seed=SEEDS,
    columns=WIDTHS,
    tau=st.sampled_from([1e-4, 0.5, 1.0, 10.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_a_dense_distribution_matches_the_naive_one(seed, columns, tau, top_p, min_p):
    logits = random_logits(seed, 3, columns)
    dist = mixture.distribution(
        logits,
        full(tau, 3),
        top_p=full(top_p, 3) if top_p < 1.0 else None,
        min_p=full(min_p, 3) if min_p else None,
    )
    assert isinstance(dist, Dense) and dist.probs.dtype == torch.float32
    for row, got in zip(logits, as_rows(dist, columns)):
        want = naive(row, tau, top_p=top_p, min_p=min_p)
        assert ((got > 0) <= (want > 0)).all(), "nothing outside the support"
        # At tau 1e-4 the scaled logits are near 1e5: one float32 ulp of them is 1e-2.
        np.testing.assert_allclose(got, want, atol=3e-6 if tau > 1e-3 else 2e-2)
        assert abs(got.sum() - 1.0) < 1e-5


@fast
@given(
    seed=SEEDS,
    columns=WIDTHS,
    tau=st.sampled_from([0.5, 1.0, 10.0]),
    top_ks=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_a_sparse_distribution_matches_the_naive_one(seed, columns, tau, top_ks, top_p, min_p):
    logits = random_logits(seed, 3, columns)
    dist = mixture.distribution(
        logits,
        full(tau, 3),
        top_k=torch.tensor(top_ks),
        top_p=full(top_p, 3),
        min_p=full(min_p, 3),
        max_top_k=max(top_ks),
    )
    assert isinstance(dist, Sparse) and dist.ids.shape[1] == min(max(top_ks), columns)
    for i, got in enumerate(as_rows(dist, columns)):
        want = naive(logits[i], tau, top_ks[i], top_p, min_p)
        assert ((got > 0) == (want > 0)).all()
        np.testing.assert_allclose(got, want, atol=3e-6)
        assert (dist.probs[i].diff() <= 0).all(), "most likely first"


@fast
@given(seed=SEEDS, columns=WIDTHS, top_k=st.integers(1, 60), more=st.integers(0, 60))
def test_equal_logits_go_by_lowest_id_whatever_the_neighbours_ask_for(seed, columns, top_k, more):
    """Two-byte logits are often equal; which token counts must not depend on the batch."""
    logits = random_logits(seed, 4, columns, scale=1.0).mul(2).round().div(2)  # many ties
    alone = mixture.top_k_in_order(logits, min(top_k, columns))
    beside = mixture.top_k_in_order(logits, min(top_k + more, columns))
    for i, row in enumerate(logits):
        expected = sorted(range(columns), key=lambda v: (-float(row[v]), v))[:top_k]
        assert alone[1][i].tolist() == expected
        assert beside[1][i, :top_k].tolist() == expected
        assert torch.equal(alone[0][i], row[expected])
    assert torch.equal(alone[1][:, 0], logits.argmax(dim=1)), "top_k 1 is the shadow"


def test_masked_and_broken_logits_do_not_disturb_the_top_k_of_others():
    logits = random_logits(0, 3, 50)
    logits[0, 2:] = -torch.inf
    logits[1] = torch.nan
    values, ids = mixture.top_k_in_order(logits, 5)
    assert sorted(ids[0, :2].tolist()) == [0, 1] and len(set(ids[0].tolist())) == 5
    assert values[1].isnan().all() and ((ids[1] >= 0) & (ids[1] < 50)).all()
    assert torch.equal(ids[2], logits[2].argsort(descending=True)[:5])


@pytest.mark.parametrize("top_k", [None, 5], ids=["dense", "sparse"])
def test_a_neighbours_filter_does_not_touch_a_row(top_k):
    logits = random_logits(3, 2, 4000, scale=1.0)
    k = None if top_k is None else torch.tensor([top_k, top_k])
    plain = mixture.distribution(logits, full(0.5, 2), top_k=k, max_top_k=top_k or 0)
    beside = mixture.distribution(
        logits,
        full(0.5, 2),
        top_k=k,
        top_p=torch.tensor([1.0, 0.5]),
        min_p=torch.tensor([0.0, 0.1]),
        max_top_k=top_k or 0,
    )
    assert torch.equal(plain.probs[0], beside.probs[0])
    assert not torch.equal(plain.probs[1], beside.probs[1])


def test_the_order_of_the_filters_is_min_p_then_top_k_then_top_p_of_what_is_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    one = full(1.0, 1)

    def support(**filters: object) -> list[float]:
        dist = mixture.distribution(logits, one, **filters)
        return [round(float(p), 4) for p in as_rows(dist, 4)[0]]

    top2 = {"top_k": torch.tensor([2]), "max_top_k": 2}
    assert support(**top2) == [0.5714, 0.4286, 0, 0]
    assert support(**top2, top_p=full(0.5, 1)) == [1, 0, 0, 0]  # 0.4 / 0.7 is enough
    assert support(top_p=full(0.5, 1)) == [0.5714, 0.4286, 0, 0]  # 0.4 alone is not
    assert support(min_p=full(0.7, 1), top_p=full(0.5, 1)) == [1, 0, 0, 0]
    assert support(min_p=full(0.4, 1)) == [0.4444, 0.3333, 0.2222, 0]


def test_rows_of_a_batch_have_their_own_temperature():
    logits = random_logits(5, 1, 300).repeat(3, 1)
    tau = torch.tensor([0.5, 1.0, 2.0])
    got = mixture.distribution(logits, tau).probs
    for i in range(3):
        torch.testing.assert_close(got[i], torch.softmax(logits[i] / tau[i], -1))


def test_dense_and_sparse_agree_on_top_log_prob_and_draw():
    logits = random_logits(6, 5, 300)
    dense = mixture.distribution(logits, full(1.0, 5))
    sparse = mixture.distribution(logits, full(1.0, 5), top_k=torch.full((5,), 300), max_top_k=1000)
    for a, b in zip(dense.top(7), sparse.top(7)):
        torch.testing.assert_close(a, b)
    ids = torch.tensor([0, 7, 299, 3, 100])
    torch.testing.assert_close(dense.log_prob(ids), sparse.log_prob(ids))
    torch.testing.assert_close(dense.log_prob(ids), logits.log_softmax(-1)[torch.arange(5), ids])
    assert dense.top(1000)[0].shape == (5, 300) and sparse.top(1000)[0].shape == (5, 300)
    narrow = mixture.distribution(logits, full(1.0, 5), top_k=torch.full((5,), 3), max_top_k=3)
    for u in (1e-9, 0.2, 0.5, 0.999):
        drawn = narrow.sample(full(u, 5).double())
        assert (narrow.ids == drawn[:, None]).any(1).all()
        assert narrow.log_prob(drawn).isfinite().all()


# ---- drawing ---------------------------------------------------------------------------------


@fast
@given(
    seed=SEEDS,
    columns=WIDTHS,
    zeros=st.floats(0, 0.99),
    u=st.one_of(
        st.floats(0, 1, exclude_min=True, exclude_max=True),
        st.sampled_from([2.0**-53, 0.5, 1 - 2.0**-53]),
    ),
)
def test_a_draw_inverts_the_distribution_function(seed, columns, zeros, u):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(columns, generator=generator) ** 8
    weights[torch.rand(columns, generator=generator) < zeros] = 0.0
    weights[seed % columns] += 1e-3
    probs = (weights / weights.sum())[None]
    column = int(mixture.inverse_cdf(probs, torch.tensor([u], dtype=torch.float64)))
    assert 0 <= column < columns
    assert probs[0, column] > 0
    cdf = probs[0].double().numpy().cumsum()
    target = u * cdf[-1]
    assert cdf[column] > target - 1e-12
    assert column == 0 or cdf[column - 1] <= target + 1e-12


def test_draws_follow_the_distribution():
    """Chi-square over 300 columns, a quarter of them impossible; 255 to 257 straddle a block."""
    columns, draws = 300, 60_000
    weights = torch.rand(columns, generator=torch.Generator().manual_seed(1)) + 0.1
    weights[::4] = 0.0
    weights[254:258] = torch.tensor([0.0, 2.0, 3.0, 0.0])
    probs = (weights / weights.sum())[None]
    generator = torch.Generator().manual_seed(2)
    counts = torch.zeros(columns)
    for _ in range(6):
        u = torch.rand(draws // 6, dtype=torch.float64, generator=generator)
        drawn = mixture.inverse_cdf(probs.expand(len(u), -1), u)
        counts += torch.bincount(drawn, minlength=columns)
    assert counts[probs[0] == 0].sum() == 0
    possible = probs[0] > 0
    expected = probs[0][possible] * draws
    chi2 = float(((counts[possible] - expected) ** 2 / expected).sum())
    degrees = int(possible.sum()) - 1
    assert abs(chi2 - degrees) < 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 1000])
def test_a_point_mass_is_drawn_wherever_it_lies_and_whatever_the_uniform(columns):
    for at in {0, columns // 2, columns - 1}:
        probs = torch.zeros(3, columns)
        probs[:, at] = 1.0
        u = torch.tensor([2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
        assert mixture.inverse_cdf(probs, u).tolist() == [at] * 3


def test_a_draw_at_the_very_end_never_hits_an_impossible_column():
    """Sum and running sum of a block may differ in the last bit, just where u is."""
    weights = torch.rand(4000, 300, generator=torch.Generator().manual_seed(0)) ** 8
    weights[:, 250:] = 0.0
    probs = weights / weights.sum(1, keepdim=True)
    for u in (1 - 2.0**-53, 1 - 2.0**-52, 2.0**-53):
        column = mixture.inverse_cdf(probs, torch.full((4000,), u, dtype=torch.float64))
        assert (probs.gather(1, column[:, None]) > 0).all()


def test_rare_tokens_of_a_large_vocabulary_keep_their_probability():
    """A float32 running sum would be off by more than 2**-24, the weight of 10 columns here."""
    columns = 150_000
    probs = torch.full((1, columns), 1.0 / columns)
    for target in (1, 74_999, 149_990):
        u = torch.tensor([(target + 0.5) / columns], dtype=torch.float64)
        assert int(mixture.inverse_cdf(probs, u)) == target


def test_a_broken_row_gives_a_valid_index():
    probs = torch.full((1, 300), torch.nan)
    assert 0 <= int(mixture.inverse_cdf(probs, torch.tensor([0.5], dtype=torch.float64))) < 300


# ---- the mixture -----------------------------------------------------------------------------


@st.composite
def distributions(draw: st.DrawFn) -> torch.Tensor:
    """float32 [B, V] from flat to peaked, with mass placed around the cuts, too."""
    columns, seed = draw(st.sampled_from([97, 509, 3000])), draw(SEEDS)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for kind in draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)):
        noise = torch.randn(columns, generator=generator)
        if kind == 0:
            logits = noise * draw(st.sampled_from([0.1, 0.5, 1.0]))  # flat
        elif kind == 1:
            logits = noise * draw(st.sampled_from([3.0, 10.0, 1e4]))  # peaked
        elif kind == 2:
            logits = -draw(st.floats(0.5, 4)) * torch.arange(1, columns + 1).log()  # a power law
        elif kind == 3:
            logits = -draw(st.floats(0.001, 1)) * torch.arange(columns)  # geometric
        else:
            # One likely token and a tail right at, above or below one of the cuts.
            cut = mixture.cuts(columns)[kind - 4]
            tail = cut * draw(st.sampled_from([0.5, 0.99, 1.0, 1.01, 2.0]))
            logits = torch.full((columns,), tail)
            logits[0] = 1 - tail * (columns - 1)
            logits = logits.log()
        rows.append(torch.softmax(logits, -1))
    return torch.stack(rows)


@fast
@given(probs=distributions())
def test_what_significant_leaves_out_is_less_than_it_promises(probs):
    ragged = mixture.significant(probs)
    assert ragged.offsets.tolist()[0] == 0 and int(ragged.offsets[-1]) == len(ragged.ids)
    for b, row in enumerate(probs):
        span = slice(int(ragged.offsets[b]), int(ragged.offsets[b + 1]))
        assert torch.equal(ragged.weights[span], row[ragged.ids[span]])
        assert len(set(ragged.ids[span].tolist())) == len(ragged.ids[span])
        left_out = row.double().clone()
        left_out[ragged.ids[span]] = 0.0
        assert float(left_out.sum()) < DROPPED_MASS


def test_significant_keeps_its_promise_over_a_large_vocabulary():
    """131,072 columns: float32 rounding of the probabilities adds up most here."""
    for scale in (0.5, 2.0, 4.0, 16.0):
        probs = torch.softmax(random_logits(1, 2, 1 << 17, scale), -1)
        ragged = mixture.significant(probs)
        kept = torch.zeros(2, dtype=torch.float64)
        rows = torch.repeat_interleave(torch.arange(2), ragged.offsets.diff())
        kept.index_add_(0, rows, ragged.weights.double())
        assert (probs.double().sum(1) - kept < DROPPED_MASS).all()
        if scale > 4:
            assert len(ragged.ids) < probs.numel() / 2, "otherwise it saves nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(probs=distributions(), seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_every_way_to_sum_the_mixture_gives_the_same(dtype, probs, seed):
    columns, dim = probs.shape[1], 24
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(columns + 3, dim, generator=generator).to(dtype)
    table[:, 0] = 1.0  # sums up the mass
    table[columns:] = torch.nan  # vocabulary padding must never enter
    exact = probs.double() @ table[:columns].double()
    largest = float(table[:columns].abs().max())
    # float32 sums of a few thousand terms; nearly equal ones repeat the same rounding error.
    flat = (probs >= mixture.cuts(columns)[0]).sum(1) > columns // 8
    rounding = torch.where(flat, 5e-5, 4e-6) * largest
    dense = mixture.dense_expect(probs, table)
    assert dense.dtype == torch.float32
    assert ((dense - exact)[:, 1:].abs().amax(1) < rounding).all()
    # Column 0: a likely token and thousands of rare ones, all of one sign. A float32 product may
    # lose the rare ones, each of which is less than the sum's last bit.
    assert float((dense - exact)[:, 0].abs().max()) < 1e-4
    ways = [mixture.ragged_expect(mixture.significant(probs), table)]
    if dtype == torch.float16:  # no compiled loop: the product itself
        assert torch.equal(cpu_kernels.dense_expect(probs, table), dense)
    else:
        # numba's view of a table: contiguous rows of the real vocabulary, as SoftTable.weight is.
        ways.append(cpu_kernels.dense_expect(probs, table[:columns]))
    for cheap in ways:
        assert cheap.dtype == torch.float32 and cheap.shape == dense.shape
        assert ((cheap - exact).abs().amax(1) < DROPPED_MASS * largest + rounding).all()
        assert ((exact - cheap)[~flat, 0] < DROPPED_MASS + 2e-6).all()


def test_equal_weights_are_the_worst_case_of_a_float32_sum():
    """The same rounding error again and again, as in any float32 product; still below 1e-4."""
    probs = torch.full((2, 3000), 1 / 3000)
    for got in (
        mixture.dense_expect(probs, torch.ones(3000, 8)),
        cpu_kernels.dense_expect(probs, torch.ones(3000, 8)),
        mixture.ragged_expect(mixture.significant(probs), torch.ones(3000, 8)),
    ):
        assert float((got - 1).abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sparse_sum_accumulates_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(512, 64, generator=generator).to(dtype)
    ids = torch.randint(0, 509, (4, 200), generator=generator)
    weights = torch.rand(4, 200, generator=generator)
    weights /= weights.sum(1, keepdim=True)
    exact = (weights.double()[..., None] * table[ids].double()).sum(1)
    got = mixture.sparse_expect(ids, weights, table)
    assert got.dtype == torch.float32
    assert float((got - exact).abs().max()) < 1e-6
    in_two_bytes = (weights.to(torch.bfloat16)[..., None] * table[ids].to(torch.bfloat16)).sum(1)
    assert float((in_two_bytes - exact).abs().max()) > 1e-4, "the test can tell the difference"


def test_weights_of_a_sparse_sum_need_not_add_up_to_one():
    table = torch.eye(5)
    got = mixture.sparse_expect(torch.tensor([[1, 3]]), torch.tensor([[0.5, 0.25]]), table)
    assert got.tolist() == [[0, 0.5, 0, 0.25, 0]]


def test_a_row_of_the_mixture_does_not_depend_on_its_neighbours():
    table = torch.randn(3000, 32, generator=torch.Generator().manual_seed(0))
    peaked = torch.softmax(random_logits(1, 3, 3000, 30.0), -1)
    flat = torch.softmax(random_logits(2, 3, 3000, 0.1), -1)
    together = cpu_kernels.dense_expect(torch.cat((peaked, flat)), table)
    assert torch.equal(together[:3], cpu_kernels.dense_expect(peaked, table))
    for i in range(3):
        assert torch.equal(together[i], cpu_kernels.dense_expect(peaked[i : i + 1], table)[0])
    torch.testing.assert_close(together[3:], flat @ table, atol=1e-5, rtol=0)


def shard(weight: torch.Tensor, vocab: int, rank: int = 0, size: int = 1) -> SimpleNamespace:
    """What SoftTable reads of vLLM's embedding layer: rank's rows, padded at the end."""
    rows = len(weight) // size
    start = rank * rows
    indices = SimpleNamespace(
        org_vocab_start_index=start, org_vocab_end_index=min(start + rows, vocab)
    )
    part = weight[start : start + rows]
    return SimpleNamespace(weight=part, shard_indices=indices, tp_size=size, tp_rank=rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_of_a_padded_table_add_up_to_the_mixture(dtype, size):
    vocab, padded, dim = 509, 512, 16
    table = torch.randn(padded, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    table[vocab:] = torch.nan
    logits = random_logits(4, 6, vocab)
    dense = mixture.distribution(logits, full(0.5, 6))
    sparse = mixture.distribution(logits, full(0.5, 6), torch.full((6,), 9), max_top_k=9)
    parts = [SoftTable(shard(table, vocab, r, size), vocab) for r in range(size)]
    for dist in (dense, sparse):
        exact = torch.from_numpy(as_rows(dist, vocab)) @ table[:vocab].double()
        total = sum(part.expect(dist) for part in parts)
        assert float((total - exact).abs().max()) < DROPPED_MASS * float(table[:vocab].abs().max())
    if size == 1:
        rms = table[:vocab].double().pow(2).mean().sqrt()
        assert parts[0].rms() == pytest.approx(float(rms), rel=1e-6)
        parts[0].layer.weight.mul_(2.0)
        assert parts[0].rms() == pytest.approx(float(rms), rel=1e-6), "cached ..."
        parts[0].refresh()
        assert parts[0].rms() == pytest.approx(2 * float(rms), rel=1e-6), "... until a refresh"


def test_a_quantised_or_odd_embedding_is_refused():
    for weight in (torch.zeros(8, 4, dtype=torch.int8), torch.zeros(8)):
        with pytest.raises(ValueError, match="embedding"):
            SoftTable(shard(weight, 8), 8)


@fast
@given(seed=SEEDS, scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]))
def test_three_bfloat16_terms_hold_a_float32(seed, scale):
    probs = torch.softmax(random_logits(seed, 3, 300, scale), -1)
    terms = _split_bf16(probs)
    assert terms.dtype == torch.bfloat16 and terms.shape == (9, 300)
    total = terms.double().view(3, 3, 300).sum(0)
    assert ((total - probs.double()).abs() <= 2.0**-24 * probs + 1e-38).all()


def test_the_split_product_is_as_good_as_float32():
    probs = torch.softmax(random_logits(0, 4, 5000, 2.0), -1)
    weight = torch.randn(5000, 32, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    exact = probs.double() @ weight.double()
    # What the tensor cores do: bfloat16 products, which are exact, summed in float32.
    split = (_split_bf16(probs).float() @ weight.float()).view(3, 4, -1).sum(0)
    assert float((split - exact).abs().max()) < 1e-6
    plain = probs.to(torch.bfloat16).float() @ weight.float()
    assert float((plain - exact).abs().max()) > 3e-5, "the test can tell the difference"


# ---- entropy ---------------------------------------------------------------------------------


@fast
@given(seed=SEEDS, columns=WIDTHS, scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1000.0]))
def test_entropy_matches_the_naive_sum(seed, columns, scale):
    logits = random_logits(seed, 2, columns, scale)
    got = mixture.entropy(logits)
    assert got.dtype == torch.float32
    for value, row in zip(got, logits):
        p = naive(row, 1.0)
        want = -sum(x * math.log(x) for x in p if x > 0)
        assert abs(float(value) - want) < 2e-5 * max(1.0, scale / 30)
        assert 0.0 <= float(value) <= math.log(columns) + 1e-4


def test_entropy_of_a_large_vocabulary_is_accurate():
    for scale in (0.1, 1.0, 4.0, 30.0):
        logits = random_logits(0, 4, 50_000, scale) + 17.0
        p = torch.softmax(logits.double(), -1)
        want = torch.special.entr(p).sum(-1)
        assert float((mixture.entropy(logits) - want).abs().max()) < 2e-4


def test_a_point_mass_has_no_entropy():
    logits = torch.full((3, 700), -torch.inf)
    logits[0, 0], logits[1, 699], logits[2, 5] = 3.0, -1e4, 0.0
    assert mixture.entropy(logits).tolist() == [0.0, 0.0, 0.0]
    peaked = torch.zeros(1, 700)
    peaked[0, 3] = 1e4
    assert mixture.entropy(peaked).tolist() == [0.0]


def test_tokens_masked_with_minus_infinity_count_for_nothing():
    """min_think_tokens masks stop tokens; 0 x -inf must not turn the entropy into NaN."""
    logits = random_logits(0, 2, 300)
    logits[:, [1, 7]] = -torch.inf
    keep = [v for v in range(300) if v not in (1, 7)]
    torch.testing.assert_close(
        mixture.entropy(logits), mixture.entropy(logits[:, keep]), atol=1e-5, rtol=0
    )


def test_a_nan_logit_gives_a_nan_entropy_in_its_row_alone():
    logits = random_logits(0, 3, 300)
    logits[1, 17] = torch.nan
    got = mixture.entropy(logits)
    assert got.isnan().tolist() == [False, True, False]
    known = mixture.entropy(logits, logits.argmax(dim=-1))
    assert torch.equal(known[[0, 2]], got[[0, 2]]) and bool(known[1].isnan())


@pytest.mark.parametrize("k", [1, 2, 31, 128])
def test_the_compiled_top_k_equals_its_reference_with_many_ties(k: int) -> None:
    from softvllm.engine import cpu_kernels

    generator = torch.Generator().manual_seed(k)
    values = torch.randn(9, 1337, generator=generator).bfloat16().float()  # two-byte logits tie
    values[0] = 0.0
    values[1, 5:] = float("-inf")
    values[2] = values[2].sort().values
    values[3] = values[3].sort(descending=True).values
    top, ids = cpu_kernels.top_k(values, k)
    want, want_ids = mixture.top_k_in_order(values, k)
    assert torch.equal(top, want)
    finite = want.isfinite()
    assert torch.equal(ids[finite], want_ids[finite])
    assert (ids >= 0).all() and (ids < 1337).all()
