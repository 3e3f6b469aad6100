"""Counter-based randomness: the same numbers on any device, in any batch, in the trainer.

Philox4x32-10 (Salmon et al., SC'11) maps (seed, stream, position, block) to four 32-bit
words. Nothing is drawn in sequence, so a value depends on what it is for and never on batch
composition, slot, chunking, preemption, rank or runner.

The integer part is exact everywhere. Normals come from Box-Muller in float64, rounded once
to float32: two correct maths libraries differ by an ulp or two of float64, which survives the
rounding with probability about 2**-28 per value, as one last bit of float32. Measured: torch,
numba and numpy (which Triton's interpreter uses) agree on all of 6.8e8 values.
"""

from __future__ import annotations

import math

import torch

NOISE, SAMPLE, POLICY, DERIVE, ANSWER = 0, 1, 2, 3, 4
"""Streams: embedding noise, think tokens, the policy's own draws, seeds of sibling samples, answer
tokens (their own stream: where end-of-sequence ends thinking and nothing is forced, one position
draws a think token, hides it and draws an answer token)."""

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
TWO_PI_32 = 2.0 * math.pi * 2.0**-32
_TAG = 0x536F6674
"""Fourth counter word; keeps our streams apart from other users of Philox with small seeds."""
SEEDS_AT_ONCE = 16384
"""Seeds in one pass: torch splits larger ones over its threads, which wait for the engine's."""


def philox(
    c0: torch.Tensor,
    c1: torch.Tensor,
    c2: torch.Tensor,
    k0: torch.Tensor,
    k1: torch.Tensor,
    c3: int = _TAG,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words (broadcasting)."""
    c0, c1, c2, k0, k1, last = torch.broadcast_tensors(c0, c1, c2, k0, k1, torch.full_like(c0, c3))
    for _ in range(10):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, last = hi1 ^ c1 ^ k0, lo1, hi0 ^ last ^ k1, lo0
        k0 = (k0 + _W0) & _MASK
        k1 = (k1 + _W1) & _MASK
    return c0, c1, c2, last


def _mulhilo(m: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the 32x32-bit product.

    The product needs 64 unsigned bits and int64 has 63, so it is built from 16-bit halves.
    """
    low = (x & 0xFFFF) * m  # < 2**48
    high = (x >> 16) * m  # < 2**48
    high = high + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _key(seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    seed = seed.to(torch.int64)
    return seed & _MASK, (seed >> 32) & _MASK


def gaussian(
    seed: torch.Tensor, position: torch.Tensor, dim: int, stream: int = NOISE
) -> torch.Tensor:
    """Standard normals for the given positions.

    Args:
        seed: request seeds, int64 [B].
        position: index of the generated token the noise belongs to, int [B].
        dim: embedding size d.
        stream: which of the streams above.

    Returns:
        float32 [B, d]; entry (b, j) depends on seed[b], position[b] and j alone.
    """
    blocks = torch.arange((dim + 3) // 4, device=seed.device, dtype=torch.int64)  # [d/4]
    k0, k1 = _key(seed)
    words = philox(
        blocks[None, :],
        position.to(torch.int64)[:, None],
        torch.full((1, 1), stream, device=seed.device, dtype=torch.int64),
        k0[:, None],
        k1[:, None],
    )
    x0, x1, x2, x3 = (w.to(torch.float64) for w in words)
    z0, z1 = _box_muller(x0, x1)
    z2, z3 = _box_muller(x2, x3)
    z = torch.stack((z0, z1, z2, z3), dim=-1).flatten(1)  # [B, 4 * d/4]
    return z[:, :dim].to(torch.float32)


def _box_muller(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    radius = torch.sqrt(-2.0 * torch.log((a + 1.0) * 2.0**-32))  # a + 1: log of (0, 1]
    angle = b * TWO_PI_32
    return radius * torch.cos(angle), radius * torch.sin(angle)


def uniform(
    seed: torch.Tensor, position: torch.Tensor, stream: int = SAMPLE, index: int = 0
) -> torch.Tensor:
    """One float64 in (0, 1) per request: [B] from seed [B] and position [B].

    `index` numbers further draws of the same stream at the same position.
    """
    k0, k1 = _key(seed)
    zero = torch.zeros_like(k0)
    x0, x1, _, _ = philox(zero + index, position.to(torch.int64), zero + stream, k0, k1)
    return (((x0 << 20) | (x1 >> 12)).to(torch.float64) + 0.5) * 2.0**-52


def derive_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a request with n > 1; below 2**53 like every seed."""
    return int(_derived(torch.tensor([seed]), torch.tensor([index])))


def sample_seeds(base: int, prompts: int, samples: int) -> list[list[int]]:
    """`derive_seed(derive_seed(base, i), k)` for i < prompts, k < samples: [prompts][samples].

    In a few passes: one by one, each seed costs about a millisecond of small tensor operations.
    """
    index = torch.arange(max(prompts, samples))
    groups = _derived(torch.tensor([base]), index[:prompts])[0]  # [prompts]
    seeds: list[list[int]] = []
    for part in groups.split(max(1, SEEDS_AT_ONCE // samples)):
        seeds += _derived(part, index[:samples]).tolist()
    return seeds


def _derived(seeds: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`derive_seed` of seeds int64 [B] and indices int64 [K]: int64 [B, K]."""
    k0, k1 = _key(seeds[:, None])
    zero = torch.zeros_like(k0)
    x0, x1, _, _ = philox(index[None, :], zero, zero + DERIVE, k0, k1)
    return ((x0 << 21) | (x1 >> 11)) & (2**53 - 1)
