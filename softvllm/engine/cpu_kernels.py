"""Compiled CPU loops for what torch does slowly: the ragged mixture sum and Philox normals.

numba comes with vLLM. Each function states its plain-torch reference in `softvllm.core`; the
tests hold the two together. Sums run in float32 in a fixed order per row, so a row's result
does not depend on its neighbours.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from softvllm.core import mixture, noise

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_TWO_PI = 2.0 * math.pi * 2.0**-32


@numba.njit(nogil=True, cache=True)
def _sum_bf16(ids, weights, offsets, table, out):  # type: ignore[no-untyped-def]
    dim = table.shape[1]
    wide = np.empty(dim, np.uint32)
    row = wide.view(np.float32)
    for b in range(out.shape[0]):
        acc = out[b]
        acc[:] = np.float32(0)
        for n in range(offsets[b], offsets[b + 1]):
            source = table[ids[n]]
            w = weights[n]
            for j in range(dim):  # a bfloat16 is the upper half of a float32
                wide[j] = np.uint32(source[j]) << np.uint32(16)
            for j in range(dim):
                acc[j] += w * row[j]


@numba.njit(nogil=True, cache=True)
def _sum_f32(ids, weights, offsets, table, out):  # type: ignore[no-untyped-def]
    for b in range(out.shape[0]):
        acc = out[b]
        acc[:] = np.float32(0)
        for n in range(offsets[b], offsets[b + 1]):
            source = table[ids[n]]
            w = weights[n]
            for j in range(table.shape[1]):
                acc[j] += w * source[j]


def ragged_expect(ragged: mixture.Ragged, table: torch.Tensor) -> torch.Tensor:
    """float32 [B, d]; reference: `mixture.ragged_expect`."""
    if table.dtype not in (torch.bfloat16, torch.float32) or not table.is_contiguous():
        return mixture.ragged_expect(ragged, table)
    out = torch.empty(len(ragged.offsets) - 1, table.shape[1], dtype=torch.float32)
    args = (ragged.ids.numpy(), ragged.weights.numpy(), ragged.offsets.numpy())
    if table.dtype == torch.bfloat16:
        _sum_bf16(*args, table.view(torch.uint16).numpy(), out.numpy())
    else:
        _sum_f32(*args, table.numpy(), out.numpy())
    return out


@numba.njit(nogil=True, cache=True)
def _gaussian(seeds, positions, stream, tag, out):  # type: ignore[no-untyped-def]
    rows, dim = out.shape
    for b in range(rows):
        seed = np.uint64(seeds[b])
        for block in range((dim + 3) // 4):
            c0 = np.uint64(block)
            c1 = np.uint64(positions[b]) & _MASK
            c2 = np.uint64(stream)
            c3 = np.uint64(tag)
            k0 = seed & _MASK
            k1 = (seed >> _32) & _MASK
            for _ in range(10):
                p0 = _M0 * c0
                p1 = _M1 * c2
                c0 = (p1 >> _32) ^ c1 ^ k0
                c1 = p1 & _MASK
                c2 = (p0 >> _32) ^ c3 ^ k1
                c3 = p0 & _MASK
                k0 = (k0 + _W0) & _MASK
                k1 = (k1 + _W1) & _MASK
            base = 4 * block
            for half in range(2):
                a, angle = (c0, c1) if half == 0 else (c2, c3)
                radius = math.sqrt(-2.0 * math.log((float(a) + 1.0) * 2.0**-32))
                theta = float(angle) * _TWO_PI
                j = base + 2 * half
                if j < dim:
                    out[b, j] = np.float32(radius * math.cos(theta))
                if j + 1 < dim:
                    out[b, j + 1] = np.float32(radius * math.sin(theta))


def gaussian(seed: torch.Tensor, position: torch.Tensor, dim: int) -> torch.Tensor:
    """float32 [B, d]; reference: `noise.gaussian`."""
    out = torch.empty(len(seed), dim, dtype=torch.float32)
    _gaussian(seed.numpy(), position.numpy(), noise.NOISE, noise._TAG, out.numpy())
    return out


def warm_up(dtype: torch.dtype) -> None:
    """Compile (or load from numba's cache) before the first request waits for it."""
    table = torch.zeros(4, 8, dtype=dtype)
    ragged = mixture.Ragged(
        torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.tensor([0, 1])
    )
    ragged_expect(ragged, table)
    one = torch.zeros(1, dtype=torch.int64)
    gaussian(one, one, 8)
