"""A rollout's seeds: all at once, and the same as one by one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.seeds import _AT_ONCE, sample_seeds
from softvllm.core.noise import derive_seed
from softvllm.core.params import MAX_SEED


@settings(max_examples=20)
@given(st.integers(0, MAX_SEED - 1), st.integers(1, 4), st.integers(1, 4))
def test_they_are_those_of_derive_seed(base: int, prompts: int, samples: int) -> None:
    assert sample_seeds(base, prompts, samples) == [
        [derive_seed(derive_seed(base, i), k) for k in range(samples)] for i in range(prompts)
    ]


def test_a_request_of_several_passes_has_the_same_seeds() -> None:
    samples = 1024
    prompts = 2 * _AT_ONCE // samples + 1
    seeds = sample_seeds(11, prompts, samples)
    assert [len(row) for row in seeds] == [samples] * prompts
    for i, k in ((0, 0), (15, 1023), (16, 0), (prompts - 1, samples - 1)):
        assert seeds[i][k] == derive_seed(derive_seed(11, i), k)
