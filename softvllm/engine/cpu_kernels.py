"""Compiled CPU loops for what torch does slowly: the mixture sum and Philox normals.

numba comes with vLLM. Each function states its plain-torch reference in `softvllm.core`; the
tests hold the two together. Sums run in float32 in a fixed order per row, so a row's result
does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from softvllm.core import mixture, noise

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_TWO_PI = 2.0 * math.pi * 2.0**-32


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use; keep the result on disk where some cache folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # read-only installation and no home directory
        return numba.njit(nogil=True)(function)


INSERTION_K = 128
"""Largest k for which inserting into a sorted list beats a partial sort."""
_PRODUCT_ROWS = 6
"""Flat rows from which the matrix product is cheaper than summing token by token."""
_SCAN = 64
"""Columns looked at together: most blocks of a vocabulary hold nothing worth a closer look."""
_RARE = np.float32(2.0**-12)
"""Tokens of less probability are summed apart: added one by one to a sum near 1, ten thousand
terms of 1e-8 would leave no trace in float32."""


@_compiled
def _count(probs, cut, counts):  # type: ignore[no-untyped-def]
    """counts[b] = columns of row b with probability of at least cut."""
    for b in range(probs.shape[0]):
        row = probs[b]
        total = 0
        for v in range(row.shape[0]):
            total += row[v] >= cut
        counts[b] = total


@_compiled
def _add_row(acc, source, w, wide, is_bf16):  # type: ignore[no-untyped-def]
    """acc += w * source; a bfloat16 (as uint16) is the upper half of a float32."""
    if is_bf16:
        for j in range(acc.shape[0]):
            wide[j] = np.uint32(source[j]) << np.uint32(16)
        row = wide.view(np.float32)
        for j in range(acc.shape[0]):
            acc[j] += w * row[j]
    else:
        for j in range(acc.shape[0]):
            acc[j] += w * source[j]


@_compiled
def _expect(probs, low, high, table, is_bf16, out, kept):  # type: ignore[no-untyped-def]
    """out[b] += sum of p E over columns with low <= p < high; kept[b] += their mass."""
    wide = np.empty(out.shape[1], np.uint32)
    rare = np.empty(out.shape[1], np.float32)
    columns = probs.shape[1]
    for b in range(out.shape[0]):
        row, acc = probs[b], out[b]
        rare[:] = np.float32(0)
        for start in range(0, columns, _SCAN):
            stop = min(start + _SCAN, columns)
            largest = np.float32(0)
            for v in range(start, stop):
                largest = max(largest, row[v])
            if largest < low:
                continue
            for v in range(start, stop):
                w = row[v]
                if w >= low and w < high:
                    kept[b] += w
                    _add_row(rare if w < _RARE else acc, table[v], w, wide, is_bf16)
        for j in range(acc.shape[0]):
            acc[j] += rare[j]


def dense_expect(probs: torch.Tensor, table: torch.Tensor, shards: int = 1) -> torch.Tensor:
    """p E without the tokens that do not matter: float32 [B, d].

    With `shards` > 1, probs and table are one rank's columns: the rank drops at most its share
    of the mass.

    Reference: `mixture.ragged_expect(mixture.significant(probs), table)`, itself within
    `mixture.DROPPED_MASS` of `mixture.dense_expect`. Rows so flat that summing them token by
    token costs more than the matrix product take the product.
    """
    if table.dtype not in (torch.bfloat16, torch.float32) or not table.is_contiguous():
        return mixture.dense_expect(probs, table)
    dropped = mixture.DROPPED_MASS / shards
    coarse, fine = mixture.cuts(probs.shape[1], dropped)
    probs = probs.contiguous()
    total = 1.0 if shards == 1 else probs.sum(dim=-1, dtype=torch.float64).numpy()
    counts = np.empty(len(probs), np.int64)
    _count(probs.numpy(), np.float32(coarse), counts)
    # The product reads and converts the whole table once, whatever the number of rows, which
    # costs about as much as adding _PRODUCT_ROWS whole columns of probabilities token by token.
    flat = torch.from_numpy(counts > probs.shape[1] // 8)
    if int(counts[flat.numpy()].sum()) > _PRODUCT_ROWS * probs.shape[1]:
        out = torch.empty(len(probs), table.shape[1])
        out[flat] = mixture.dense_expect(probs[flat], table)
        if not bool(flat.all()):
            out[~flat] = dense_expect(probs[~flat], table, shards)
        return out
    is_bf16 = table.dtype == torch.bfloat16
    raw = table.view(torch.uint16).numpy() if is_bf16 else table.numpy()
    out = torch.zeros(len(probs), table.shape[1])
    kept = np.zeros(len(probs), np.float64)
    infinity = np.float32(np.inf)
    _expect(probs.numpy(), np.float32(coarse), infinity, raw, is_bf16, out.numpy(), kept)
    short = np.flatnonzero(total - kept > 0.8 * dropped)
    if len(short):
        rest, part = np.ascontiguousarray(probs.numpy()[short]), out.numpy()[short]
        mass = np.zeros(len(short), np.float64)
        _expect(rest, np.float32(fine), np.float32(coarse), raw, is_bf16, part, mass)
        out[torch.from_numpy(short)] = torch.from_numpy(part)
    return out


@_compiled
def top_k_row(row, best, where):  # type: ignore[no-untyped-def]
    """Largest first, ties by lowest index: one pass with insertion into a sorted list."""
    k, columns = best.shape[0], row.shape[0]
    best[:] = -np.inf
    where[:] = 0
    for start in range(0, columns, _SCAN):
        stop = min(start + _SCAN, columns)
        largest = row[start]
        for v in range(start, stop):
            largest = max(largest, row[v])
        if largest <= best[k - 1] and start >= k:
            continue
        for v in range(start, stop):
            value = row[v]
            if v >= k and not value > best[k - 1]:
                continue
            place = min(v, k - 1)
            while place > 0 and best[place - 1] < value:
                best[place] = best[place - 1]
                where[place] = where[place - 1]
                place -= 1
            best[place] = value
            where[place] = v


@_compiled
def _top_k(values, top, ids):  # type: ignore[no-untyped-def]
    for b in range(values.shape[0]):
        top_k_row(values[b], top[b], ids[b])


def top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values float32 and ids int64 [B, k]; reference: `mixture.top_k_in_order`.

    Rows with NaN give valid ids in no particular order.
    """
    if k > INSERTION_K or values.dtype != torch.float32:
        return mixture.top_k_in_order(values, k)
    top = torch.empty(len(values), k)
    ids = torch.empty(len(values), k, dtype=torch.int64)
    _top_k(values.contiguous().numpy(), top.numpy(), ids.numpy())
    return top, ids


@_compiled
def _philox(seed, c0, c1, c2, c3):  # type: ignore[no-untyped-def]
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
    return c0, c1, c2, c3


@_compiled
def _gaussian(seeds, positions, stream, tag, out):  # type: ignore[no-untyped-def]
    rows, dim = out.shape
    for b in range(rows):
        for block in range((dim + 3) // 4):
            c0, c1, c2, c3 = _philox(
                np.uint64(seeds[b]),
                np.uint64(block),
                np.uint64(positions[b]) & _MASK,
                np.uint64(stream),
                np.uint64(tag),
            )
            for half in range(2):
                a, angle = (c0, c1) if half == 0 else (c2, c3)
                radius = math.sqrt(-2.0 * math.log((float(a) + 1.0) * 2.0**-32))
                theta = float(angle) * _TWO_PI
                j = 4 * block + 2 * half
                if j < dim:
                    out[b, j] = np.float32(radius * math.cos(theta))
                if j + 1 < dim:
                    out[b, j + 1] = np.float32(radius * math.sin(theta))


@_compiled
def _uniform(seeds, positions, stream, index, tag, out):  # type: ignore[no-untyped-def]
    for b in range(len(out)):
        x0, x1, _, _ = _philox(
            np.uint64(seeds[b]),
            np.uint64(index),
            np.uint64(positions[b]) & _MASK,
            np.uint64(stream),
            np.uint64(tag),
        )
        word = (x0 << np.uint64(20)) | (x1 >> np.uint64(12))
        out[b] = (float(word) + 0.5) * 2.0**-52


def uniform(
    seed: torch.Tensor, position: torch.Tensor, stream: int = noise.SAMPLE, index: int = 0
) -> torch.Tensor:
    """float64 [B]; reference: `noise.uniform`."""
    out = torch.empty(len(seed), dtype=torch.float64)
    args = (seed.contiguous().numpy(), position.contiguous().numpy())
    _uniform(*args, stream, index, noise._TAG, out.numpy())
    return out


def gaussian(seed: torch.Tensor, position: torch.Tensor, dim: int) -> torch.Tensor:
    """float32 [B, d]; reference: `noise.gaussian`."""
    out = torch.empty(len(seed), dim, dtype=torch.float32)
    args = (seed.contiguous().numpy(), position.contiguous().numpy())
    _gaussian(*args, noise.NOISE, noise._TAG, out.numpy())
    return out


def warm_up(dtype: torch.dtype) -> None:
    """Compile (or load from numba's cache) before the first request waits for it."""
    probs = torch.zeros(2, 2048)
    probs[0, 0], probs[1, :200] = 1.0, 1.0 / 200
    dense_expect(probs, torch.zeros(2048, 8, dtype=dtype))
    one = torch.zeros(1, dtype=torch.int64)
    gaussian(one, one, 8)
    uniform(one, one)
    top_k(torch.zeros(2, 200), 4)
