"""Logits a few rows at a time, and what their gradients mean for hidden states and weights.

Shared by the functions of `head.py`: no tensor here has more than [rows per chunk, V] entries,
besides the gradient of the weight itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainer.matmul import add_outer, times, times_transposed, wide
from trainer.support import OUTSIDE, Support, outside


@dataclass(frozen=True, slots=True)
class Logits:
    """How hidden states become logits: cap * tanh(scale * (h W^T + bias) / cap)."""

    scale: float = 1.0
    """Constant factor (Granite 1 / logits_scaling, Cohere logit_scale)."""
    softcap: float | None = None
    """Gemma 2's final_logit_softcapping; None: no cap."""


@dataclass(frozen=True, slots=True)
class Settings:
    form: Logits
    support: Support | None
    rows: int
    """Rows per chunk."""
    with_entropy: bool


class Chunks:
    """Walks over the rows of one call, computing logits / temperature into one buffer."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tau: torch.Tensor,
        settings: Settings,
        targets: torch.Tensor | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.settings, self.dtype = settings, wide(weight.dtype)
        self.tau = tau.to(self.dtype)
        # Dividing [N, d] instead of [N, V] saves a pass; rounding a two-byte h / tau would not do.
        self.folds = weight.dtype == self.dtype and settings.form.softcap is None
        shape = (settings.rows, len(weight))
        self.buffer = torch.empty(shape, dtype=self.dtype, device=hidden.device)
        self.slope: torch.Tensor | None = None  # d logits / d (W h) of the softcap

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows and their scaled logits [n, V]; the buffer is the caller's until the next."""
        for start in range(0, len(self.hidden), self.settings.rows):
            rows = slice(start, min(start + self.settings.rows, len(self.hidden)))
            yield rows, self._scaled(rows)

    def factor(self, rows: slice) -> torch.Tensor:
        """d scaled / d (W h), [n, 1], save for the softcap's slope."""
        return self.settings.form.scale / self.tau[rows, None]

    def inputs(self, rows: slice) -> torch.Tensor:
        """factor x hidden, wide [n, d]: what the weight's gradient multiplies."""
        return self.hidden[rows].to(self.dtype) * self.factor(rows)

    def _scaled(self, rows: slice) -> torch.Tensor:
        form, out = self.settings.form, self.buffer[: rows.stop - rows.start]
        if self.folds:
            times_transposed(self.inputs(rows), self.weight, out)
            if self.bias is not None:
                out += self.factor(rows) * self.bias.to(self.dtype)
        else:
            times_transposed(self.hidden[rows], self.weight, out)
            if self.bias is not None:
                out += self.bias.to(self.dtype)
            if form.softcap is not None:
                out.mul_(form.scale / form.softcap).tanh_()
                self.slope = 1.0 - out * out
                out.mul_(form.softcap).div_(self.tau[rows, None])
            else:
                out.mul_(self.factor(rows))
        if self.settings.support is not None:
            keep = None if self.targets is None else self.targets[rows]
            out.masked_fill_(outside(out, self.settings.support[rows], keep), OUTSIDE)
        return out


class Gradients:
    """Adds up what chunks of d scaled [n, V] mean for hidden, weight and bias."""

    def __init__(self, chunks: Chunks, needs: tuple[bool, bool, bool]) -> None:
        self.chunks, hidden, weight = chunks, chunks.hidden, chunks.weight
        wants_hidden, wants_weight, wants_bias = needs

        def zeros(like: torch.Tensor, dtype: torch.dtype, wanted: bool) -> torch.Tensor | None:
            return torch.zeros(like.shape, dtype=dtype, device=like.device) if wanted else None

        self.hidden = zeros(hidden, hidden.dtype, wants_hidden)
        self.weight = zeros(weight, chunks.dtype, wants_weight)
        self.bias = zeros(weight[:, 0], chunks.dtype, wants_bias)

    def add(self, rows: slice, scaled: torch.Tensor) -> None:
        chunks = self.chunks
        if chunks.slope is not None:
            scaled *= chunks.slope
        if self.hidden is not None:
            self.hidden[rows] = (times(scaled, chunks.weight) * chunks.factor(rows)).to(
                self.hidden.dtype
            )
        if self.weight is not None:
            add_outer(self.weight, scaled, chunks.inputs(rows), chunks.weight.dtype)
        if self.bias is not None:
            self.bias += (scaled * chunks.factor(rows)).sum(0)
