"""The output head fused with what the loss needs of it, without a float32 [N, V] tensor.

Two functions over hidden states [N, d]:

- `soft_mean`: mu = softmax(logits / tau) E, the mean of a soft step's Gaussian (paper eq. 5-6);
- `token_log_prob`: log-probability of the sampled token (paper eq. 7-15).

Both also give the entropy of the distribution they use, if asked. Logits exist for a few rows at
a time (`head_chunks.py`): the forward pass keeps hidden states and results, the backward pass
computes the logits again. Sums are float32 also where the weights have two bytes. Products of size
[N, d] x [d, V]: `soft_mean` 2 forward and 5 backward (4 with a table that gets no gradient),
`token_log_prob` 1 and 3.

`head_reference.py` is the same in plain torch; `python -m trainer.bench_head` compares cost.
"""

from __future__ import annotations

from typing import Any

import torch

from trainer.head_chunks import Chunks, Gradients, Logits, Settings
from trainer.matmul import add_outer, times, times_transposed, wide
from trainer.support import OUTSIDE, Support

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Bytes of one [rows, V] buffer; two exist at a time in a backward pass."""


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
    chunk_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """mu = p E with p = softmax(logits / tau) on the support, and the entropy of p.

    Gradients flow to `hidden`, `weight`, `table` (both uses summed if the two are one tensor)
    and `bias`; detach `table` to stop the gradient through E in p E.

    Args:
        hidden: last hidden states [N, d].
        weight: output rows [V, d].
        table: embedding rows E [V, d'], table units.
        tau: float32 [N], > 0.
        bias: [V].
        form: what the model does between product and logits; default nothing.
        support: the rows' restrictions; None: whole vocabulary.
        with_entropy: whether the entropy is wanted; it takes another pass over the logits.
        chunk_bytes: size of a buffer; default by device.

    Returns:
        mu [N, d'] and entropy [N] in nats or None, float32 (float64 for float64 inputs).
    """
    _check(hidden, weight, tau, table)
    rows = _chunk_rows(hidden, weight, chunk_bytes)
    settings = Settings(form or Logits(), support, rows, with_entropy)
    return _SoftMean.apply(hidden, weight, table, bias, tau, settings)


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
    chunk_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p(target) under softmax(logits / temperature) on the support, and the entropy.

    Args:
        targets: int64 [N], or [N, K] for "any of these ids" (-1: none; the first is an id).
        temperature: float32 [N], > 0.
        others: as in `soft_mean`.

    Returns:
        log-probs [N] and entropies [N] in nats or None, float32 (float64 for float64 inputs).
    """
    _check(hidden, weight, temperature)
    targets = targets[:, None] if targets.dim() == 1 else targets
    if targets.numel() and not (int(targets.min()) >= -1 and int(targets.max()) < len(weight)):
        raise ValueError(f"a target is outside the {len(weight)} rows of the head")
    rows = _chunk_rows(hidden, weight, chunk_bytes)
    settings = Settings(form or Logits(), support, rows, with_entropy)
    return _TokenLogProb.apply(hidden, weight, bias, temperature, targets, settings)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tau: torch.Tensor,
    table: torch.Tensor | None = None,
) -> None:
    if hidden.shape[1] != weight.shape[1] or len(tau) != len(hidden):
        shapes = f"{list(hidden.shape)}, {list(weight.shape)}, {list(tau.shape)}"
        raise ValueError(f"hidden [N, d], weight [V, d] and tau [N] do not fit: {shapes}")
    if table is not None and len(table) != len(weight):
        raise ValueError(f"the table has {len(table)} rows, the head {len(weight)}: cut both to V")


def _chunk_rows(hidden: torch.Tensor, weight: torch.Tensor, chunk_bytes: int | None) -> int:
    size = wide(weight.dtype).itemsize * len(weight)
    budget = chunk_bytes or CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    return max(1, min(len(hidden), budget // size))


def _entropy_slope(log_p: torch.Tensor, p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """g dH / d scaled = -g p (log p + H), [n, V]."""
    finite = log_p.clamp(min=OUTSIDE)
    entropy = -(p * finite).sum(-1, keepdim=True)
    return (finite + entropy).mul_(p).mul_(-g[:, None])


class _SoftMean(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        table: torch.Tensor,
        bias: torch.Tensor | None,
        tau: torch.Tensor,
        settings: Settings,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = Chunks(hidden, weight, bias, tau, settings)
            mean = torch.empty(
                len(hidden), table.shape[1], dtype=chunks.dtype, device=hidden.device
            )
            entropy = mean.new_empty(len(hidden)) if settings.with_entropy else None
            for rows, scaled in chunks:
                p = torch.softmax(scaled, dim=-1, out=scaled)
                mean[rows] = times(p, table, exact=True)
                if entropy is not None:
                    entropy[rows] = torch.special.entr(p).sum(-1)
        ctx.save_for_backward(hidden, weight, table, bias, tau, mean)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return mean, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_mean: torch.Tensor | None, g_entropy: torch.Tensor | None) -> Any:
        hidden, weight, table, bias, tau, mean = ctx.saved_tensors
        wants_hidden, wants_weight, wants_table, wants_bias = ctx.needs_input_grad[:4]
        # One tensor in both roles gets one sum, rounded to its type once.
        tied = weight is table or weight.data_ptr() == table.data_ptr()
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = Chunks(hidden, weight, bias, tau, ctx.settings)
            grads = Gradients(chunks, (wants_hidden, wants_weight, wants_bias))
            to_table = None
            if wants_table and g_mean is not None:
                shared = tied and grads.weight is not None
                to_table = grads.weight if shared else torch.zeros_like(table, dtype=chunks.dtype)
            slope = torch.empty_like(chunks.buffer)
            for rows, scaled in chunks:
                part = slope[: len(scaled)]
                log_p = None
                if g_entropy is not None:
                    log_p = torch.log_softmax(scaled, dim=-1)
                p = torch.softmax(scaled, dim=-1, out=scaled)
                if g_mean is None:
                    part.zero_()
                else:
                    # The same rounding of g on both sides, or peaked rows lose the difference.
                    g = g_mean[rows].to(table.dtype)
                    times_transposed(g, table, part)  # d p
                    if to_table is not None:
                        add_outer(to_table, p, g_mean[rows], table.dtype)
                    part -= (g.to(chunks.dtype) * mean[rows]).sum(-1, keepdim=True)
                    part *= p
                if g_entropy is not None and log_p is not None:
                    part += _entropy_slope(log_p, p, g_entropy[rows])
                grads.add(rows, part)
        g_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
        g_table = None
        if to_table is not None and to_table is not grads.weight:
            g_table = to_table.to(table.dtype)
        g_bias = None if bias is None or grads.bias is None else grads.bias.to(bias.dtype)
        return grads.hidden, g_weight, g_table, g_bias, None, None


class _TokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tau: torch.Tensor,
        targets: torch.Tensor,
        settings: Settings,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = Chunks(hidden, weight, bias, tau, settings, targets)
            log_prob = torch.empty(len(hidden), dtype=chunks.dtype, device=hidden.device)
            entropy = torch.empty_like(log_prob) if settings.with_entropy else None
            for rows, scaled in chunks:
                log_p = torch.log_softmax(scaled, dim=-1, out=scaled)
                log_prob[rows] = _gathered(log_p, targets[rows]).logsumexp(-1)
                if entropy is not None:
                    entropy[rows] = -torch.linalg.vecdot(log_p, log_p.exp())
        ctx.save_for_backward(hidden, weight, bias, tau, targets)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return log_prob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_log_prob: torch.Tensor | None, g_entropy: torch.Tensor | None) -> Any:
        hidden, weight, bias, tau, targets = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = Chunks(hidden, weight, bias, tau, ctx.settings, targets)
            grads = Gradients(chunks, (wants_hidden, wants_weight, wants_bias))
            for rows, scaled in chunks:
                entropic = None
                shares = _gathered(scaled, targets[rows]).softmax(-1)  # which of the targets
                if g_entropy is not None:
                    log_p = torch.log_softmax(scaled, dim=-1)
                    entropic = _entropy_slope(log_p, log_p.exp(), g_entropy[rows])
                part = torch.softmax(scaled, dim=-1, out=scaled)
                if g_log_prob is None:
                    part.zero_()
                else:
                    g = g_log_prob[rows, None]
                    part *= -g
                    part.scatter_add_(1, targets[rows].clamp(min=0), shares * g)
                if entropic is not None:
                    part += entropic
                grads.add(rows, part)
        g_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
        g_bias = None if bias is None or grads.bias is None else grads.bias.to(bias.dtype)
        return grads.hidden, g_weight, g_bias, None, None, None


def _gathered(scaled: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Values at the targets [n, K]; unused columns hold -inf."""
    values = scaled.gather(1, targets.clamp(min=0))
    return values.masked_fill(targets < 0, -torch.inf)
