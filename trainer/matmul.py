"""Matrix products with float32 sums for operands of any float type.

A [N, V] result in bfloat16 would round every logit to 1/128 of its size, and probabilities to
0.4 %, which alone moves a soft mean by 0.1 sigma; so results are float32 (float64 for float64
operands) whatever the weights are. No float32 copy of a two-byte weight matrix is made: on CUDA
the product itself widens, elsewhere a block of rows at a time does.
"""

from __future__ import annotations

import torch

_BLOCK = 4096
"""Rows of a two-byte matrix widened at a time where the product cannot."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to sum in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def times_transposed(a: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = a table^T: [N, d] x [V, d] -> wide [N, V].

    With a two-byte table on CUDA `a` is rounded to the table's type.
    """
    if table.dtype == out.dtype:
        return torch.mm(a.to(out.dtype), table.t(), out=out)
    if table.is_cuda:
        return torch.mm(a.to(table.dtype), table.t(), out_dtype=out.dtype, out=out)
    a = a.to(out.dtype)
    for start in range(0, table.shape[0], _BLOCK):
        block = table[start : start + _BLOCK].to(out.dtype)
        out[:, start : start + _BLOCK] = a @ block.t()
    return out


def times(weights: torch.Tensor, table: torch.Tensor, exact: bool = False) -> torch.Tensor:
    """weights table: wide [N, V] x [V, d] -> wide [N, d].

    With a two-byte table on CUDA the weights are rounded to its type; `exact` splits them into
    two terms first (16 bits of mantissa for one more product).
    """
    if table.dtype == weights.dtype:
        return weights @ table
    if table.is_cuda:
        high = weights.to(table.dtype)
        out = torch.mm(high, table, out_dtype=weights.dtype)
        if exact:
            rest = (weights - high).to(table.dtype)
            out += torch.mm(rest, table, out_dtype=weights.dtype)
        return out
    out = weights.new_zeros(weights.shape[0], table.shape[1])
    for start in range(0, table.shape[0], _BLOCK):
        block = table[start : start + _BLOCK].to(weights.dtype)
        out.addmm_(weights[:, start : start + _BLOCK], block)
    return out


def add_outer(total: torch.Tensor, rows: torch.Tensor, a: torch.Tensor, low: torch.dtype) -> None:
    """total += rows^T a: wide [V, d] += [N, V]^T x [N, d].

    On CUDA both factors are rounded to `low` where that is a two-byte type.
    """
    if total.is_cuda and low != total.dtype:
        total += torch.mm(rows.t().to(low), a.to(low), out_dtype=total.dtype)
    else:
        total.addmm_(rows.t(), a.to(total.dtype))
