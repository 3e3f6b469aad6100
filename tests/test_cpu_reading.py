"""The CPU's one-pass reading of logits against its plain-torch reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softvllm.core import mixture
from softvllm.core.mixture import Support
from softvllm.engine.cpu_reading import handles
from softvllm.engine.ops import HostOps

RELATIVE = 1e-5
NATS = 2e-5


def both(logits: torch.Tensor, support: Support) -> tuple[mixture.Reading, mixture.Reading]:
    assert handles(logits, support)
    return HostOps().read(logits, support), mixture.read(logits, support)


def probabilities(reading: mixture.Reading) -> torch.Tensor:
    return reading.dist.probs


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 2, 63, 64, 65, 511, 512, 513, 1500, 49152]),
    scale=st.sampled_from([0.0, 0.1, 3.0, 30.0, 1000.0]),
    tau=st.sampled_from([1e-6, 1e-4, 0.5, 1.0, 7.0, 100.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_a_dense_reading_equals_torch(rows, columns, scale, tau, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=generator) * scale).to(dtype)
    ours, reference = both(logits, Support(torch.full((rows,), tau)))
    assert torch.equal(ours.shadow, reference.shadow)
    log_p = logits.double().log_softmax(1)  # float32 torch is off by 1e-4 at logits of 3000
    exact = -(log_p.exp() * log_p).sum(1).float()
    torch.testing.assert_close(ours.entropy, exact, atol=2e-6, rtol=RELATIVE)
    # A last-bit difference of an exponent x (down to -87) is one of |x| * 2**-24 in exp(x).
    torch.testing.assert_close(
        probabilities(ours), probabilities(reference), rtol=max(3e-5, 3e-7 / tau), atol=1e-30
    )
    torch.testing.assert_close(probabilities(ours).sum(1), torch.ones(rows), atol=2e-5, rtol=0)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 4),
    columns=st.sampled_from([1, 5, 64, 200, 5000]),
    top_k=st.integers(1, 128),
    top_p=st.sampled_from([None, 0.3, 0.95]),
    min_p=st.sampled_from([None, 0.1]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_a_sparse_reading_equals_torch_ties_included(
    rows, columns, top_k, top_p, min_p, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=generator).to(torch.bfloat16).to(dtype)
    support = Support(
        torch.full((rows,), 0.5),
        top_k=torch.randint(1, top_k + 1, (rows,), generator=generator),
        top_p=None if top_p is None else torch.full((rows,), top_p),
        min_p=None if min_p is None else torch.full((rows,), min_p),
        max_top_k=top_k,
    )
    ours, reference = both(logits, support)
    assert isinstance(ours.dist, mixture.Sparse) and isinstance(reference.dist, mixture.Sparse)
    assert torch.equal(ours.dist.ids, reference.dist.ids)
    assert torch.equal(ours.dist.probs, reference.dist.probs)
    assert torch.equal(ours.shadow, reference.shadow)
    torch.testing.assert_close(ours.entropy, reference.entropy, atol=NATS, rtol=RELATIVE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masked_tokens_get_probability_zero_and_broken_rows_an_entropy_of_nan(dtype):
    logits = torch.randn(6, 700).to(dtype)
    logits[0, 600] = float("nan")
    logits[1] = float("-inf")
    logits[1, 9] = 2.0
    logits[2, 3] = float("inf")
    logits[3] = float("-inf")
    logits[4, 10:] = float("-inf")
    ours, reference = both(logits, Support(torch.full((6,), 0.5)))
    assert ours.entropy.isnan().tolist() == [True, False, True, True, False, False]
    assert reference.entropy.isnan().tolist() == ours.entropy.isnan().tolist()
    assert ours.entropy[1] == 0.0 and ours.shadow[1] == 9
    assert (probabilities(ours)[4, 10:] == 0.0).all()
    good = [1, 4, 5]
    torch.testing.assert_close(
        probabilities(ours)[good], probabilities(reference)[good], rtol=RELATIVE, atol=0
    )


def test_a_row_does_not_depend_on_its_neighbours():
    logits = (torch.randn(32, 3000) * 4).to(torch.bfloat16)
    ops = HostOps()
    tau = torch.full((32,), 0.5)
    together = ops.read(logits, Support(tau))
    rows = [(p.clone(), e) for p, e in zip(probabilities(together), together.entropy)]
    for b in (0, 7, 31):
        alone = ops.read(logits[b : b + 1], Support(tau[:1]))
        assert torch.equal(probabilities(alone)[0], rows[b][0])
        assert alone.entropy[0] == rows[b][1]


def test_logits_that_are_a_slice_of_a_padded_vocabulary_are_read_right():
    padded = torch.randn(3, 1030)
    ours, reference = both(padded[:, :1000], Support(torch.full((3,), 1.0)))
    torch.testing.assert_close(
        probabilities(ours), probabilities(reference), rtol=RELATIVE, atol=1e-30
    )
