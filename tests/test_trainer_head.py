"""The fused head against plain torch, autograd in float64 and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer_rollouts import single_thread

from softvllm.core import mixture
from softvllm.core.oracle import shaped
from trainer import head, head_reference
from trainer.head_chunks import Logits
from trainer.head_sparse import sparse_soft_mean
from trainer.support import Support, outside

N, V, D = 5, 11, 3
FORMS = {"plain": None, "scaled and capped": Logits(scale=0.7, softcap=2.0)}
TARGETS = torch.tensor([[1, -1], [2, 5], [0, -1], [10, 0], [3, -1]])
SMALL_CHUNKS = 2 * V * 8  # two rows at a time: the last chunk is a part


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    yield from single_thread()


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [t.requires_grad_() for t in made]


def supports(n: int = N, vocab: int = V) -> Support:
    """All kinds of restriction, one row each, the first row free."""
    top_k = torch.zeros(n, dtype=torch.int64)
    top_p, min_p = torch.ones(n), torch.zeros(n)
    hides = torch.zeros(n, dtype=torch.bool)
    top_k[1], top_p[2], min_p[3], hides[4] = 4, 0.7, 0.2, True
    top_k[4], top_p[1] = 6, 0.8
    return Support(top_k, top_p, min_p, hides, torch.tensor([2, 7]))


TAU = torch.tensor([0.5, 1.0, 0.3, 2.0, 0.7])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("restricted", [False, True])
def test_gradients_pass_gradcheck_untied_with_bias(form, restricted):
    hidden, weight, table, bias = tensors((N, D), (V, D), (V, 4), (V,))
    options = {
        "form": form,
        "support": supports() if restricted else None,
        "with_entropy": True,
        "chunk_bytes": SMALL_CHUNKS,
    }

    def soft(h, w, e, b):
        return head.soft_mean(h, w, e, TAU, bias=b, **options)

    def hard(h, w, b):
        return head.token_log_prob(h, w, TARGETS, TAU, bias=b, **options)

    # Random directions; entry by entry in the tied test below.
    assert torch.autograd.gradcheck(soft, (hidden, weight, table, bias), fast_mode=True)
    assert torch.autograd.gradcheck(hard, (hidden, weight, bias), fast_mode=True)


def test_gradients_pass_gradcheck_with_tied_weights():
    hidden, table = tensors((N, D), (V, D))
    assert torch.autograd.gradcheck(lambda h, e: head.soft_mean(h, e, e, TAU)[0], (hidden, table))
    ids = torch.tensor([[0, 3, 5]] * N)
    assert torch.autograd.gradcheck(
        lambda h, e: sparse_soft_mean(h, e, e, ids, TAU), (hidden, table)
    )


def test_the_tied_gradient_is_the_sum_of_the_untied_ones():
    hidden, tied = tensors((N, D), (V, D))
    direction = tensors((N, D), seed=1)[0].detach()
    (head.soft_mean(hidden, tied, tied, TAU)[0] * direction).sum().backward()
    weight, table = (tied.detach().clone().requires_grad_() for _ in range(2))
    (head.soft_mean(hidden, weight, table, TAU)[0] * direction).sum().backward()
    torch.testing.assert_close(tied.grad, weight.grad + table.grad)
    frozen = tied.detach().clone().requires_grad_()
    (head.soft_mean(hidden, frozen, frozen.detach(), TAU)[0] * direction).sum().backward()
    torch.testing.assert_close(frozen.grad, weight.grad)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9),
    rows=st.integers(1, 10),
    restricted=st.booleans(),
    tau=st.sampled_from([1e-4, 0.5, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_match_plain_torch_for_any_chunk(n, rows, restricted, tau, seed):
    weights = tensors((n, D), (V, D), (V, D), seed=seed)
    taus = torch.full((n,), tau)
    support = None
    if restricted:
        base = supports(5)
        support = base[torch.arange(n) % 5]
    targets = torch.arange(n) % V
    grads = []
    for module in (head, head_reference):
        leaves = [w.detach().clone().requires_grad_() for w in weights]
        options = {"support": support}
        if module is head:
            options["chunk_bytes"] = rows * V * 8
        mean, entropy = module.soft_mean(*leaves, taus, with_entropy=True, **options)
        log_prob, other = module.token_log_prob(
            leaves[0], leaves[1], targets, taus, with_entropy=True, **options
        )
        total = (mean * torch.arange(1, D + 1)).sum() + 0.3 * entropy.sum()
        (total + log_prob.sum() + 0.7 * other.sum()).backward()
        grads.append([mean, entropy, log_prob, other, *(leaf.grad for leaf in leaves)])
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7 / min(tau, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_float32_and_close_to_float64_whatever_the_weights_are(dtype):
    vocab, dim, n = 5000, 64, 6
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, dim, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, dim, generator=generator) / 4).to(dtype).requires_grad_()
    tau = torch.full((n,), 0.5)
    mean, _ = head.soft_mean(hidden, weight, weight, tau)
    assert mean.dtype == torch.float32
    exact_h, exact_w = hidden.detach().double(), weight.detach().double()
    exact, _ = head_reference.soft_mean(exact_h, exact_w, exact_w, tau)
    # sigma is 0.33 RMS(E): the gap in its units.
    gap = (mean - exact).norm(dim=-1) / (0.33 * exact_w.pow(2).mean().sqrt())
    assert gap.max() < 1e-3
    mean.sum().backward()
    assert weight.grad.dtype == dtype and hidden.grad.dtype == dtype


def test_autocast_around_the_head_changes_nothing():
    hidden, weight = (t.detach().float().requires_grad_() for t in tensors((N, D), (V, D)))
    plain, _ = head.soft_mean(hidden, weight, weight, TAU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = head.soft_mean(hidden, weight, weight, TAU)
        inside.sum().backward()
    assert torch.equal(plain, inside)
    got, weight.grad = weight.grad.clone(), None
    plain.sum().backward()
    assert torch.equal(got, weight.grad)


def test_no_gradient_is_computed_for_what_needs_none():
    hidden, weight = tensors((N, D), (V, D))
    head.soft_mean(hidden.detach(), weight, weight.detach(), TAU)[0].sum().backward()
    assert hidden.grad is None and weight.grad is not None


def test_any_of_several_targets_is_the_sum_of_their_probabilities():
    hidden, weight = (t.detach() for t in tensors((2, D), (V, D)))
    either = torch.tensor([[1, 4, -1], [0, 2, 9]])
    got, _ = head.token_log_prob(hidden, weight, either, TAU[:2])
    p = torch.softmax(hidden @ weight.t() / TAU[:2, None], -1)
    torch.testing.assert_close(got, torch.stack((p[0, [1, 4]].sum(), p[1, [0, 2, 9]].sum())).log())


def test_the_support_is_the_oracles():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 60, generator=generator) * 3
    kinds = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (9, 0.7, 0.05)]
    for i, row in enumerate(logits):
        top_k, top_p, min_p = kinds[i % len(kinds)]
        one = Support(
            torch.tensor([top_k]),
            torch.tensor([top_p]),
            torch.tensor([min_p]),
            torch.tensor([False]),
            torch.tensor([], dtype=torch.int64),
        )
        got = ~outside(row[None] / 0.5, one)[0]
        assert torch.equal(got, shaped(row, 0.5, top_k, top_p, min_p) > 0), kinds[i % len(kinds)]


def test_a_drawn_token_is_inside_its_support_and_hidden_stop_tokens_are_not():
    scaled = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(2, -1)
    support = Support(
        torch.tensor([2, 0]),
        torch.ones(2),
        torch.zeros(2),
        torch.tensor([False, True]),
        torch.tensor([0]),
    )
    got = outside(scaled, support, keep=torch.tensor([[2, -1], [1, 3]]))
    assert got.tolist() == [[False, False, False, True], [True, False, False, False]]
    union = outside(scaled[:1], support[:1], keep=torch.tensor([[1, 3]]))
    assert union.tolist() == [[False, False, True, True]]  # 3 was not the one that was drawn


def test_the_sparse_mean_is_the_dense_one_on_the_recorded_support():
    hidden, weight, table = (t.detach() for t in tensors((N, D), (V, D), (V, D)))
    logits = (hidden @ weight.t()).float()
    dist = mixture.distribution(logits, TAU, top_k=torch.full((N,), 4), max_top_k=4)
    assert isinstance(dist, mixture.Sparse)
    support = supports()
    support = Support(torch.full((N,), 4), torch.ones(N), torch.zeros(N), support.hides_stop, TAU)
    support.hides_stop[:], support.stop_ids = False, torch.tensor([], dtype=torch.int64)
    runs = []
    for sparse in (True, False):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, table)]
        if sparse:
            mean = sparse_soft_mean(*leaves, dist.ids, TAU)
        else:
            mean, _ = head.soft_mean(*leaves, TAU, support=support)
        mean.square().sum().backward()
        runs.append([mean, *(leaf.grad for leaf in leaves)])
    for got, want in zip(*runs):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(runs[0][0].float(), dist.expect(table), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    hidden, weight, table = tensors((N, D), (V, D), (V + 1, D))
    with pytest.raises(ValueError, match="cut both to V"):
        head.soft_mean(hidden, weight, table, TAU)
    with pytest.raises(ValueError, match="do not fit"):
        head.soft_mean(hidden, weight, weight, TAU[:2])
    with pytest.raises(ValueError, match="outside the 11 rows"):
        head.token_log_prob(hidden, weight, torch.full((N,), V), TAU)
    with pytest.raises(ValueError, match="no recorded token"):
        sparse_soft_mean(hidden, weight, weight, torch.full((N, 2), -1), TAU)


def test_no_rows_give_no_values_and_zero_gradients():
    hidden, weight = tensors((0, D), (V, D))
    mean, _ = head.soft_mean(hidden, weight, weight, torch.zeros(0))
    log_prob, _ = head.token_log_prob(
        hidden, weight, torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0)
    )
    (mean.sum() + log_prob.sum()).backward()
    assert mean.shape == (0, D) and np.count_nonzero(weight.grad.numpy()) == 0
