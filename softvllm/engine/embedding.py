"""The embedding-layer seam: where a mixture replaces a token's embedding.

The model's own embedding layer keeps its weights, name and place in the (compiled) graph; only
its class changes to one that, after the lookup, overwrites the rows of soft positions. The
rest of the model never knows: multipliers apply once, token ids stay available, and a batch
without soft rows runs the stock lookup.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from softvllm.core import mixture
from softvllm.core.embedding import sum_of_squares
from softvllm.core.mixture import Dense, Distribution, Sparse
from softvllm.engine import cpu_kernels, overlay


class SoftTable:
    """This rank's shard of the embedding table, and sums over it.

    `expect` and `gather` return this rank's partial sums; `reduce` adds the ranks' parts in
    float32, so that no rank rounds before the sum.
    """

    def __init__(self, layer: Any, vocab_size: int) -> None:
        weight = layer.weight
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            raise ValueError(f"the embedding layer {type(layer).__name__} has no [V, d] weight")
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"soft decoding needs a float embedding table, this one is {weight.dtype}; "
                "serve a checkpoint whose embedding is not quantised"
            )
        self.layer = layer
        self.vocab_size = vocab_size
        self.tp_size = int(getattr(layer, "tp_size", 1))
        shard = layer.shard_indices
        self.start = int(shard.org_vocab_start_index)
        self.stop = min(int(shard.org_vocab_end_index), vocab_size)
        self.dim = int(weight.shape[1])
        self.dtype = weight.dtype
        self._rms: float | None = None
        self._mm_fp32 = weight.device.type == "cuda" and weight.dtype == torch.bfloat16

    @property
    def weight(self) -> torch.Tensor:
        """Real rows of this shard, [stop - start, d]; read anew each time, never copied."""
        return self.layer.weight[: max(self.stop - self.start, 0)]

    @property
    def dropped_mass(self) -> float:
        """Probability that a dense mixture may leave out (the CPU path's bound; 0 elsewhere)."""
        return mixture.DROPPED_MASS if self.weight.device.type == "cpu" else 0.0

    def rms(self) -> float:
        """RMS of the whole table's entries (every rank's shard), cached until `refresh`."""
        if self._rms is None:
            total = self._sum_over_ranks(float(sum_of_squares(self.weight)))
            self._rms = math.sqrt(total / (self.vocab_size * self.dim))
        return self._rms

    def _sum_over_ranks(self, value: float) -> float:
        """Exact sum of one float64 per rank.

        Collectives on CPU know float32 only, so each rank puts the high and low half of its
        value into places of its own: adding zeros rounds nothing.
        """
        if self.tp_size == 1:
            return value
        parts = torch.zeros(2 * self.tp_size, dtype=torch.float32, device=self.weight.device)
        high = torch.tensor(value, dtype=torch.float64).to(torch.float32)
        parts[2 * self.layer.tp_rank] = high
        parts[2 * self.layer.tp_rank + 1] = value - float(high)
        return float(self._all_reduce(parts).to(torch.float64).sum())

    def refresh(self) -> None:
        """Forget derived values; call after the weights changed."""
        self._rms = None

    def expect(self, dist: Distribution) -> torch.Tensor:
        """This rank's part of p E: float32 [B, d]."""
        if isinstance(dist, Sparse):
            return self.gather(dist.ids, dist.probs)
        return self._dense(dist)

    def _dense(self, dist: Dense) -> torch.Tensor:
        probs = dist.probs[:, self.start : self.stop]
        weight = self.weight
        if probs.device.type == "cpu":
            return cpu_kernels.dense_expect(probs, weight, self.tp_size)
        if self._mm_fp32:
            return _split_matmul(probs, weight)
        return mixture.dense_expect(probs, weight)

    def gather(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """This rank's part of sum_j w_j E[id_j]: float32 [B, d]."""
        if self.tp_size == 1:
            return mixture.sparse_expect(ids, weights, self.weight)
        # Ids of other shards are masked before weighting: they read row 0 with weight 0.
        local = ids - self.start
        mine = (local >= 0) & (local < self.stop - self.start)
        return mixture.sparse_expect(
            torch.where(mine, local, 0), torch.where(mine, weights, 0.0), self.weight
        )

    def reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum of all ranks' parts, equal on every rank."""
        return self._all_reduce(partial)

    def _all_reduce(self, value: torch.Tensor) -> torch.Tensor:
        if self.tp_size == 1:
            return value
        from vllm.distributed import tensor_model_parallel_all_reduce

        return tensor_model_parallel_all_reduce(value)


def _split_matmul(probs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """p E with bfloat16 tensor cores and float32 accuracy.

    The table, by far the larger operand, is still read once.
    """
    out = torch.mm(_split_bf16(probs), weight, out_dtype=torch.float32)
    return out.view(3, probs.shape[0], -1).sum(dim=0)


def _split_bf16(probs: torch.Tensor) -> torch.Tensor:
    """Three bfloat16 terms (24 bits of mantissa) that sum to probs, stacked as rows: [3B, V]."""
    high = probs.to(torch.bfloat16)
    rest = probs - high.to(torch.float32)
    middle = rest.to(torch.bfloat16)
    low = (rest - middle.to(torch.float32)).to(torch.bfloat16)
    return torch.cat((high, middle, low))


def find_embedding(model: nn.Module) -> nn.Module:
    """The model's one input-embedding layer.

    Raises:
        ValueError: none or several candidates, so the seam cannot be placed safely.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    found = {
        id(module): (name, module)
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    }
    if len(found) != 1:
        names = ", ".join(name for name, _ in found.values()) or "none"
        raise ValueError(
            f"soft decoding needs exactly one VocabParallelEmbedding in {type(model).__name__}, "
            f"found: {names}; serve this model without softvllm"
        )
    return next(iter(found.values()))[1]


def find_wrapper(model: nn.Module, layer: nn.Module) -> nn.Module:
    """The outermost module that stands for the layer: itself, or its LoRA wrapper."""
    for module in model.modules():
        if getattr(module, "base_layer", None) is layer:
            return module
    return layer


def install(layer: nn.Module, key: int) -> None:
    """Change the layer's class so that its output rows are overwritten where `key` says so."""
    base = type(layer)

    def forward(self: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        out = base.forward(self, *args)
        torch.ops.softvllm.overlay(out, key)
        return out

    overlay.register()
    layer.__class__ = type(f"Soft{base.__name__}", (base,), {"forward": forward})
