"""`head.py` in plain torch: the whole [N, V] at once, gradients by autograd. For tests, and for
comparing cost."""

from __future__ import annotations

import torch

from trainer.head_chunks import Logits
from trainer.support import OUTSIDE, Support, outside


def scaled_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tau: torch.Tensor,
    bias: torch.Tensor | None = None,
    form: Logits | None = None,
    support: Support | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits / tau [N, V]; `OUTSIDE` the support."""
    form = form or Logits()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * form.scale
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    logits = logits / tau.to(dtype)[:, None]
    if support is not None:
        logits = logits.masked_fill(outside(logits.detach(), support, keep), OUTSIDE)
    return logits


def soft_mean(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    tau: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    form: Logits | None = None,
    support: Support | None = None,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `head.soft_mean`."""
    scaled = scaled_logits(hidden, weight, tau, bias, form, support)
    log_p = torch.log_softmax(scaled, dim=-1)
    p = log_p.exp()
    return p @ table.to(p.dtype), -(p * log_p).sum(-1) if with_entropy else None


def token_log_prob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    form: Logits | None = None,
    support: Support | None = None,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `head.token_log_prob`."""
    targets = targets[:, None] if targets.dim() == 1 else targets
    scaled = scaled_logits(hidden, weight, temperature, bias, form, support, targets)
    log_p = torch.log_softmax(scaled, dim=-1)
    chosen = log_p.gather(1, targets.clamp(min=0)).masked_fill(targets < 0, -torch.inf)
    return chosen.logsumexp(-1), -(log_p.exp() * log_p).sum(-1) if with_entropy else None
