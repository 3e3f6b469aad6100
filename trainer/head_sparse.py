"""The soft mean over recorded tokens: K columns of the head instead of V.

Where the rollout recorded the k tokens it mixed (`record="sparse"`), the trainer needs their
logits only: no [N, V] at all, and a cost that vanishes beside the model's. Reference: eq. 5 of the
paper with p renormalised on the ids.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.head_chunks import Logits
from trainer.matmul import wide

CHUNK_BYTES = 64 << 20
"""Bytes of one gathered [rows, K, d] block."""


def sparse_soft_mean(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    ids: torch.Tensor,
    tau: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    form: Logits | None = None,
) -> torch.Tensor:
    """mu [N, d'] = softmax(logits[ids] / tau) E[ids]; gradients as in `head.soft_mean`.

    Args:
        hidden: [N, d]; weight: [V, d]; table: [V, d']; tau: float32 [N]; bias: [V].
        ids: int64 [N, K], -1 where a column is unused, at least one used per row.
    """
    if ids.numel() and not bool((ids >= 0).any(dim=1).all()):
        raise ValueError("a row has no recorded token")
    return _SparseMean.apply(hidden, weight, table, bias, ids, tau, form or Logits())


class _Block:
    """Logits, probabilities and rows of one block of steps."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        tau: torch.Tensor,
        form: Logits,
    ) -> None:
        dtype = wide(weight.dtype)
        self.hidden, self.at = hidden.to(dtype), ids.clamp(min=0)
        self.weight = weight[self.at].to(dtype)  # [n, K, d]
        logits = torch.einsum("nkd,nd->nk", self.weight, self.hidden)
        if bias is not None:
            logits = logits + bias[self.at].to(dtype)
        logits = logits * form.scale
        self.slope = form.scale / tau.to(dtype)[:, None]  # d scaled / d (w h)
        if form.softcap is not None:
            capped = torch.tanh(logits / form.softcap)
            self.slope = self.slope * (1.0 - capped * capped)
            logits = form.softcap * capped
        scaled = (logits / tau.to(dtype)[:, None]).masked_fill(ids < 0, -torch.inf)
        self.p = scaled.softmax(-1)  # [n, K]


class _SparseMean(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        tau: torch.Tensor,
        form: Logits,
    ) -> torch.Tensor:
        dtype = wide(weight.dtype)
        mean = torch.empty(len(hidden), table.shape[1], dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _blocks(hidden, ids):
                block = _Block(hidden[rows], weight, bias, ids[rows], tau[rows], form)
                mean[rows] = torch.einsum("nk,nkd->nd", block.p, table[block.at].to(dtype))
        ctx.save_for_backward(hidden, weight, table, bias, ids, tau)
        ctx.form = form
        return mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_mean: torch.Tensor) -> Any:
        hidden, weight, table, bias, ids, tau = ctx.saved_tensors
        wants_hidden, wants_weight, wants_table, wants_bias = ctx.needs_input_grad[:4]
        dtype = g_mean.dtype

        def zeros(like: torch.Tensor, wanted: bool) -> torch.Tensor | None:
            return torch.zeros(like.shape, dtype=dtype, device=like.device) if wanted else None

        to_hidden, to_weight = zeros(hidden, wants_hidden), zeros(weight, wants_weight)
        to_bias = None if bias is None else zeros(bias, wants_bias)
        # One tensor in both roles gets one sum, rounded to its type once.
        shared = wants_weight and wants_table and weight.data_ptr() == table.data_ptr()
        to_table = to_weight if shared else zeros(table, wants_table)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _blocks(hidden, ids):
                block = _Block(hidden[rows], weight, bias, ids[rows], tau[rows], ctx.form)
                g, at = g_mean[rows], block.at.flatten()
                to_p = torch.einsum("nd,nkd->nk", g, table[block.at].to(dtype))
                centre = (block.p * to_p).sum(-1, keepdim=True)
                to_logits = block.p * (to_p - centre) * block.slope
                if to_hidden is not None:
                    to_hidden[rows] = torch.einsum("nk,nkd->nd", to_logits, block.weight)
                if to_weight is not None:
                    outer = to_logits[:, :, None] * block.hidden[:, None, :]
                    to_weight.index_add_(0, at, outer.flatten(0, 1))
                if to_table is not None:
                    outer = block.p[:, :, None] * g[:, None, :]
                    to_table.index_add_(0, at, outer.flatten(0, 1))
                if to_bias is not None:
                    to_bias.index_add_(0, at, to_logits.flatten())
        if shared:
            to_table = None

        def cast(grad: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor | None:
            return None if grad is None or like is None else grad.to(like.dtype)

        return (
            cast(to_hidden, hidden),
            cast(to_weight, weight),
            cast(to_table, table),
            cast(to_bias, bias),
            None,
            None,
            None,
        )


def _blocks(hidden: torch.Tensor, ids: torch.Tensor) -> list[slice]:
    size = max(1, ids.shape[1] * hidden.shape[1] * 4)
    step = max(1, CHUNK_BYTES // size)
    return [slice(s, min(s + step, len(hidden))) for s in range(0, len(hidden), step)]
