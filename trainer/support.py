"""Which tokens a step could have come from: the rollout's support, in the trainer's hands.

Rollout and trainer must restrict the distribution in the same way (top-k, top-p, min-p, stop
tokens hidden early on); a trainer that takes the full vocabulary for a mixture of k tokens has
another mean and another density. The support is a constant as far as gradients go.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from softvllm.core.mixture import top_k_in_order

OUTSIDE = -1e30
"""Logit of a token outside the support: probability 0 without the NaN that 0 x -inf gives."""


@dataclass(slots=True)
class Support:
    """Restrictions of N rows. A row with top_k 0, top_p 1, min_p 0 and no hidden stop tokens has
    the whole vocabulary."""

    top_k: torch.Tensor  # int64 [N], 0: all
    top_p: torch.Tensor  # float32 [N]
    min_p: torch.Tensor  # float32 [N]
    hides_stop: torch.Tensor  # bool [N]: before min_think_tokens stop tokens cannot come
    stop_ids: torch.Tensor  # int64 [S]

    @property
    def is_full(self) -> bool:
        """Whether no row is restricted."""
        restricted = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0) | self.hides_stop
        return not bool(restricted.any())

    def __getitem__(self, rows: slice | torch.Tensor) -> Support:
        named = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "stop_ids"}
        return Support(**named, stop_ids=self.stop_ids)

    def to(self, device: torch.device | str) -> Support:
        return Support(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @staticmethod
    def cat(parts: list[Support]) -> Support:
        """Rows of all parts; their stop tokens must be the same."""
        assert all(torch.equal(p.stop_ids, parts[0].stop_ids) for p in parts)
        names = ("top_k", "top_p", "min_p", "hides_stop")
        joined = {n: torch.cat([getattr(p, n) for p in parts]) for n in names}
        return Support(**joined, stop_ids=parts[0].stop_ids)


@torch.no_grad()
def outside(
    scaled: torch.Tensor, support: Support, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """bool [N, V]: tokens that the rows could not draw or mix.

    Args:
        scaled: logits / temperature, wide [N, V].
        keep: ids int64 [N, K] (-1: none) one of which the rollout drew. The likeliest is inside,
            as a support never holds a token without all likelier ones; where rounding moved the
            border, the rollout is right.
    """
    if len(support.stop_ids):
        hide = torch.zeros_like(scaled, dtype=torch.bool)
        hide[:, support.stop_ids] = support.hides_stop[:, None]
        scaled = scaled.masked_fill(hide, OUTSIDE)
    out = scaled <= OUTSIDE
    if (support.min_p > 0).any():
        best = scaled.amax(dim=-1, keepdim=True)
        out |= scaled < best + support.min_p.to(scaled.dtype).log()[:, None]  # log 0: none
    limit = int(support.top_k.max())
    if limit:
        values, ids = top_k_in_order(scaled, min(limit, scaled.shape[1]))
        rank = torch.arange(values.shape[1], device=ids.device)
        inside = torch.zeros_like(out).scatter_(1, ids, rank < support.top_k[:, None])
        out |= ~inside & (support.top_k > 0)[:, None]
    if (support.top_p < 1).any():
        probs = torch.softmax(scaled.masked_fill(out, OUTSIDE), dim=-1)
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        beyond = (before >= support.top_p[:, None]) & (support.top_p < 1)[:, None]
        beyond[:, 0] = False
        out |= torch.zeros_like(out).scatter_(1, ids, beyond)
    if keep is not None:
        values = scaled.gather(1, keep.clamp(min=0)).masked_fill(keep < 0, -torch.inf)
        likeliest = keep.gather(1, values.argmax(dim=-1, keepdim=True))
        out.scatter_(1, likeliest, False)
    return out
