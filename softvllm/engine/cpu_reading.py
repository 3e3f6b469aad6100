"""CPU: everything a think step takes from its logits, in one pass over each row.

torch would convert, divide, exponentiate twice and reduce five times, each through a matrix of
several megabytes that is allocated, page-faulted and freed; at 32 rows of 49,152 columns that is
13 ms a step where this takes 3. A row's result does not depend on its neighbours.

Reference: `softvllm.core.mixture.read`. Probabilities agree within 1e-5 relative, the entropy
within 1e-5 nats (float32 exponentials of both are good to two units in the last place; the sums
here are the more exact ones).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from softvllm.core.mixture import Reading, Support
from softvllm.engine.cpu_kernels import INSERTION_K, top_k_row

_WIDTH = 512
"""Columns summed in float32 before the sum goes to float64; also fits the L1 cache."""
_ONE = np.float32(1)
_LOW = np.float32(-87)
"""exp of anything lower counts as 0: it would be below float32's normal numbers."""
_LOG2E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
"""ln 2 in two parts, so that x - k ln 2 loses no bits."""
_C7, _C6, _C5, _C4, _C3 = (np.float32(1 / math.factorial(n)) for n in (7, 6, 5, 4, 3))
_HALF = np.float32(0.5)


def _compiled(fastmath: set[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # read-only installation and no home directory
            return numba.njit(**options)(function)

    return compile


# No reassociation here: it would undo the split of ln 2.
@_compiled({"contract"})
def _exp(x, shift, scale, out, bits):  # type: ignore[no-untyped-def]
    """out = exp((x - shift) * scale), 0 where that underflows, NaN where x is.

    exp(d) = 2^k e^r with |r| <= ln(2) / 2: e^r by its series to r^7 (relative error 4e-9), 2^k by
    writing float32's exponent.
    """
    powers = bits.view(np.float32)
    for i in range(x.shape[0]):
        d = (x[i] - shift) * scale
        small = d < _LOW
        d = _LOW if small else d
        k = np.floor(d * _LOG2E + _HALF)
        r = (d - k * _LN2_HIGH) - k * _LN2_LOW
        p = ((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _HALF
        p = p * (r * r) + r + _ONE
        out[i] = np.float32(0) if small else p
        bits[i] = (np.int32(k) + np.int32(127)) << np.int32(23)
    for i in range(x.shape[0]):
        out[i] = out[i] * powers[i]


@_compiled({"contract", "reassoc"})
def _sum(x):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i]
    return total


@_compiled({"contract", "reassoc"})
def _weighted(weights, x, shift):  # type: ignore[no-untyped-def]
    """sum of weight * (x - shift); a weight of 0 counts 0 even where x is -inf."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        d = x[i] - shift
        total += weights[i] * (_LOW if d < _LOW else d)
    return total


@_compiled({"contract"})
def _load(row, is_bf16, x):  # type: ignore[no-untyped-def]
    """x = row as float32, returns its maximum; a bfloat16 is the upper half of a float32."""
    if is_bf16:
        bits = x.view(np.uint32)
        for v in range(x.shape[0]):
            bits[v] = np.uint32(row[v]) << np.uint32(16)
    else:
        words = row.view(np.float32)
        for v in range(x.shape[0]):
            x[v] = words[v]
    largest = np.float32(-np.inf)
    for v in range(x.shape[0]):
        largest = x[v] if x[v] > largest else largest
    return largest


@_compiled({"contract"})
def _entropy(x, largest, scratch, bits):  # type: ignore[no-untyped-def]
    """(entropy of softmax(x), first index of the maximum)."""
    total, weighted, first = 0.0, 0.0, -1
    for start in range(0, x.shape[0], _WIDTH):
        block = x[start : start + _WIDTH]
        e = scratch[: block.shape[0]]
        _exp(block, largest, _ONE, e, bits[: block.shape[0]])
        total += _sum(e)
        weighted += _weighted(e, block, largest)
        if first < 0:
            for i in range(block.shape[0]):
                if block[i] == largest:
                    first = start + i
                    break
    return max(math.log(total) - weighted / total, 0.0) if total == total else total, max(first, 0)


@_compiled({"contract"})
def _read_dense(raw, is_bf16, tau, probs, shadow, entropy):  # type: ignore[no-untyped-def]
    x = np.empty(raw.shape[1], np.float32)
    scratch, bits = np.empty(_WIDTH, np.float32), np.empty(_WIDTH, np.int32)
    for b in range(raw.shape[0]):
        largest = _load(raw[b], is_bf16, x)
        entropy[b], shadow[b] = _entropy(x, largest, scratch, bits)
        out, scale, total = probs[b], _ONE / tau[b], 0.0
        for start in range(0, x.shape[0], _WIDTH):
            block, part = x[start : start + _WIDTH], out[start : start + _WIDTH]
            _exp(block, largest, scale, part, bits[: block.shape[0]])
            total += _sum(part)
        norm = np.float32(1.0 / total)
        for v in range(x.shape[0]):
            out[v] *= norm


@_compiled({"contract"})
def _read_sparse(raw, is_bf16, values, ids, shadow, entropy):  # type: ignore[no-untyped-def]
    x = np.empty(raw.shape[1], np.float32)
    scratch, bits = np.empty(_WIDTH, np.float32), np.empty(_WIDTH, np.int32)
    for b in range(raw.shape[0]):
        largest = _load(raw[b], is_bf16, x)
        entropy[b], shadow[b] = _entropy(x, largest, scratch, bits)
        top_k_row(x, values[b], ids[b])


def handles(logits: torch.Tensor, support: Support) -> bool:
    """Whether `read` has code for these logits."""
    bounded = support.top_k is None or support.max_top_k <= INSERTION_K
    return logits.dtype in (torch.bfloat16, torch.float32) and logits.shape[1] > 0 and bounded


def read(logits: torch.Tensor, support: Support, scratch: torch.Tensor) -> Reading:
    """`mixture.read`; see `handles`.

    Args:
        logits: bfloat16 or float32 [B, V].
        scratch: float32 [B * V], holds the probabilities of a dense reading.
    """
    rows, columns = logits.shape
    is_bf16 = logits.dtype == torch.bfloat16
    raw = logits.contiguous().view(torch.uint16 if is_bf16 else torch.uint32).numpy()
    shadow, entropy = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    if support.top_k is None:
        probs = scratch.view(rows, columns)
        tau = support.tau.contiguous().numpy()
        _read_dense(raw, is_bf16, tau, probs.numpy(), shadow.numpy(), entropy.numpy())
        return Reading(support.dense(probs), shadow, entropy)
    k = min(support.max_top_k, columns)
    values, ids = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    _read_sparse(raw, is_bf16, values.numpy(), ids.numpy(), shadow.numpy(), entropy.numpy())
    return Reading(support.sparse(values, ids), shadow, entropy)
