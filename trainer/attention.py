"""Attention over packed sequences, through transformers' attention interface.

No mask is ever built: each kernel is told where sequences begin. `sdpa` runs torch's own kernel
once per sequence (any device); `flash` is torch's variable-length flash attention and `xformers`
its block-diagonal kernel (both CUDA; the GPU kernels have had no run in this repository's tests).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

Kernel = Literal["sdpa", "flash", "xformers"]


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Where the sequences of a packed row of R tokens lie."""

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor  # int32 [S + 1]


def name_of(kernel: Kernel) -> str:
    """The kernel's name in transformers' registry."""
    return f"softvllm_{kernel}"


def pick(device: torch.device, dtype: torch.dtype) -> Kernel:
    """Flash attention where it runs (two-byte types on CUDA), else per-sequence SDPA."""
    flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "flash" if flash else "sdpa"


def _checked(boundaries: Boundaries | None, kwargs: dict[str, Any]) -> Boundaries:
    for key, what in (
        ("softcap", "soft-capped attention logits"),
        ("s_aux", "attention sinks"),
        ("position_bias", "a position bias"),
    ):
        if kwargs.get(key) is not None:
            raise ValueError(f"the trainer's packed attention does not know {what} ({key})")
    if boundaries is None:
        raise ValueError("this model belongs to trainer.forward.Policy and runs through it only")
    return boundaries


def _per_sequence(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    boundaries: Boundaries | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """q [1, H, R, D], k and v [1, Hkv, R, D] to [1, R, H, D]."""
    boundaries = _checked(boundaries, kwargs)
    parts = []
    split = list(boundaries.lengths)
    for q, k, v in zip(query.split(split, 2), key.split(split, 2), value.split(split, 2)):
        length = q.shape[2]
        mask = None
        if sliding_window is not None and length > sliding_window:
            ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
            mask = ones.tril() & ones.triu(1 - sliding_window)
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    boundaries: Boundaries | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from torch.nn.attention.varlen import varlen_attn

    boundaries = _checked(boundaries, kwargs)
    cu, longest = boundaries.cu_seqlens, max(boundaries.lengths)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [R, H, D]
    left = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(
        q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=True
    )
    assert isinstance(out, torch.Tensor)
    return out[None], None


def _xformers(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    *,
    boundaries: Boundaries | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    boundaries = _checked(boundaries, kwargs)
    bias = BlockDiagonalCausalMask.from_seqlens(list(boundaries.lengths))
    if sliding_window is not None:
        bias = bias.make_local_attention(sliding_window)
    groups = query.shape[1] // key.shape[1]
    q = query.transpose(1, 2)  # [1, R, H, D]
    k, v = (x.transpose(1, 2).repeat_interleave(groups, dim=2) for x in (key, value))
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scaling), None


# No mask function is registered under these names, so transformers builds no mask for them.
for _kernel, _function in (("sdpa", _per_sequence), ("flash", _flash), ("xformers", _xformers)):
    AttentionInterface.register(f"softvllm_{_kernel}", _function)
