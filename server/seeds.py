"""Seeds of all samples of a rollout request, in a few passes.

One call of `derive_seed` per sample costs about a millisecond of small tensor operations, during
which the event loop serves nobody: a minute and a half for the largest request that is admitted.
"""

from __future__ import annotations

import torch

from softvllm.core.noise import DERIVE, philox

_WORD = 0xFFFFFFFF
_AT_ONCE = 16384
"""Values in one pass: torch splits larger ones over its threads, which wait for the engine's."""


def sample_seeds(base: int, prompts: int, samples: int) -> list[list[int]]:
    """`derive_seed(derive_seed(base, i), k)` for i < prompts, k < samples: [prompts][samples]."""
    index = torch.arange(max(prompts, samples))
    groups = _derived(torch.tensor([base]), index[:prompts])[0]  # [prompts]
    seeds: list[list[int]] = []
    for part in groups.split(max(1, _AT_ONCE // samples)):
        seeds += _derived(part, index[:samples]).tolist()
    return seeds


def _derived(seeds: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`derive_seed` of seeds int64 [B] and indices int64 [K]: int64 [B, K]."""
    seeds = seeds[:, None]
    stream = torch.full_like(seeds, DERIVE)
    x0, x1, _, _ = philox(
        index[None, :], torch.zeros_like(seeds), stream, seeds & _WORD, (seeds >> 32) & _WORD
    )
    return ((x0 << 21) | (x1 >> 11)) & (2**53 - 1)
