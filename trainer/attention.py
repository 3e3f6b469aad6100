"""Attention over packed sequences, through transformers' attention interface.

No mask is ever built: each kernel is told where sequences begin. `sdpa` runs torch's own kernel
once per sequence (any device); `flash` is torch's variable-length flash attention and `xformers`
its block-diagonal kernel (both CUDA; the GPU kernels have had no run in this repository's tests).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

Kernel = Literal["sdpa", "flash", "xformers"]


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Where the segments of a packed row of R tokens lie (`packing.Batch`)."""

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor  # int32 [segments + 1]
    parents: tuple[int, ...] | None = None
    families: dict[int | None, list[_Family]] = field(default_factory=dict)
    """By sliding window (None: full attention), as one model may have layers of both kinds; made
    by the first layer that needs it, used by all of its kind."""


@dataclass(frozen=True, slots=True)
class _Family:
    """A prompt of P rows and the m segments after it, padded to T."""

    start: int
    prompt: int
    rows: torch.Tensor  # int64 [m x T]: their rows; padding repeats one
    real: torch.Tensor  # int64 [sum of lengths]: where rows lie that are no padding
    members: int
    mask: torch.Tensor  # bool [T, P + T]


def name_of(kernel: Kernel) -> str:
    """The kernel's name in transformers' registry."""
    return f"softvllm_{kernel}"


def pick(device: torch.device, dtype: torch.dtype) -> Kernel:
    """Flash attention where it runs (two-byte types on CUDA), else per-sequence SDPA."""
    flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "flash" if flash else "sdpa"


def shares_prompts(kernel: Kernel) -> bool:
    """Whether a kernel lets several segments go on from one prompt."""
    return kernel == "sdpa"


def _checked(
    boundaries: Boundaries | None, kwargs: dict[str, Any], shares: bool = False
) -> Boundaries:
    for key, what in (
        ("softcap", "soft-capped attention logits"),
        ("s_aux", "attention sinks"),
        ("position_bias", "a position bias"),
    ):
        if kwargs.get(key) is not None:
            raise ValueError(f"the trainer's packed attention does not know {what} ({key})")
    if boundaries is None:
        raise ValueError("this model belongs to trainer.forward.Policy and runs through it only")
    assert shares or boundaries.parents is None, "this kernel knows no shared prompts"
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
    boundaries = _checked(boundaries, kwargs, shares=True)
    if boundaries.parents is not None:
        return _by_family(query, key, value, scaling, sliding_window, boundaries), None
    parts = []
    split = list(boundaries.lengths)
    for q, k, v in zip(query.split(split, 2), key.split(split, 2), value.split(split, 2)):
        parts.append(_causal(q, k, v, scaling, sliding_window))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, window: int | None
) -> torch.Tensor:
    """[1, H, T, D]: each row sees itself and those before it."""
    length = q.shape[2]
    mask = None
    if window is not None and length > window:
        ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
        mask = ones.tril() & ones.triu(1 - window)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


def _by_family(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    boundaries: Boundaries,
) -> torch.Tensor:
    """[1, R, H, D]: two kernel calls for a prompt and all that goes on from it.

    Members are padded at their end, where no real row looks.
    """
    if window not in boundaries.families:
        boundaries.families[window] = list(_families(boundaries, window, query.device))
    q_rows, k_rows, v_rows = (x[0].transpose(0, 1) for x in (query, key, value))  # [R, H, D]
    parts = []
    for family in boundaries.families[window]:
        own = slice(family.start, family.start + family.prompt)
        first_q, first_k, first_v = (x[:, :, own] for x in (query, key, value))
        parts.append(_causal(first_q, first_k, first_v, scaling, window)[0].transpose(0, 1))
        m = family.members
        if not m:
            continue
        q, k, v = (  # [m, H, T, D]
            x.index_select(0, family.rows).unflatten(0, (m, -1)).transpose(1, 2)
            for x in (q_rows, k_rows, v_rows)
        )
        k = torch.cat((first_k.expand(m, -1, -1, -1), k), dim=2)
        v = torch.cat((first_v.expand(m, -1, -1, -1), v), dim=2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=family.mask, scale=scaling, enable_gqa=True
        )
        parts.append(out.transpose(1, 2).flatten(0, 1).index_select(0, family.real))
    return torch.cat(parts)[None]  # a family's rows lie together, in this order


def _families(
    boundaries: Boundaries, window: int | None, device: torch.device
) -> Iterator[_Family]:
    assert boundaries.parents is not None
    starts = boundaries.cu_seqlens.tolist()
    for index, parent in enumerate(boundaries.parents):
        if parent >= 0:
            continue
        children = [i for i, p in enumerate(boundaries.parents) if p == index]
        lengths = torch.tensor([boundaries.lengths[i] for i in children], dtype=torch.int64)
        first = torch.tensor([starts[i] for i in children], dtype=torch.int64)
        prompt, longest = boundaries.lengths[index], max(lengths.tolist(), default=0)
        step = torch.arange(longest)
        rows = first[:, None] + torch.minimum(step, lengths[:, None] - 1)
        real = (step < lengths[:, None]).flatten().nonzero()[:, 0]
        mask = torch.ones(longest, prompt + longest, dtype=torch.bool).tril(prompt)
        if window is not None:
            mask &= torch.ones_like(mask).triu(prompt + 1 - window)
        yield _Family(
            starts[index],
            prompt,
            rows.flatten().to(device),
            real.to(device),
            len(children),
            mask.to(device),
        )


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
