"""Episodes: rollout samples as the loss needs them, and what a trace leaves unsaid.

`reading.py` makes them, `packing.py` puts them into batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from trainer.support import Support


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the rollout request asked for and the trace does not repeat. Penalties, logit bias,
    grammars and `min_tokens` also shape answers; the trainer does not model them: do not ask for
    them in rollouts."""

    temperature: float = 1.0
    """Of the answer phase; 0 is greedy."""
    top_k: int = 0
    """Of the answer phase; 0: all."""
    top_p: float = 1.0
    """Of the answer phase."""
    min_p: float = 0.0
    """Of the answer phase."""
    min_think: int = 0
    """The request's min_think_tokens: stop tokens cannot be drawn earlier."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a request (EOS and stop_token_ids)."""
    greedy_answer: Literal["count", "mask"] = "count"
    """Terms of greedily decoded answers, whose real density is a point mass without a gradient.
    count: their log-prob at temperature 1, as the paper's loss has it for every answer token
    (eq. 7; biased here, since the answer was not drawn from it); mask: no terms."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One sample. Tp prompt tokens, T generated positions, Ns Gaussian and Nh log-prob terms;
    positions count from the first generated one. All on the CPU."""

    prompt_ids: torch.Tensor  # int64 [Tp]
    token: torch.Tensor  # int64 [T]
    seed: int

    soft_at: torch.Tensor  # int64 [Ns]
    soft_input: torch.Tensor  # h~ in the rollout's dtype [Ns, d], table units
    soft_tau: torch.Tensor  # float32 [Ns]
    soft_sigma: torch.Tensor  # float32 [Ns], table units
    soft_mix: torch.Tensor  # float32 [Ns]: weight of pE; the rest is on the token's own row
    soft_ids: torch.Tensor | None  # int64 [Ns, K], -1: unused; recorded tokens of the mixture
    soft_support: Support

    hard_at: torch.Tensor  # int64 [Nh]
    hard_ids: torch.Tensor  # int64 [Nh, K]: any of these was drawn; -1: unused
    hard_tau: torch.Tensor  # float32 [Nh]: temperature
    hard_think: torch.Tensor  # bool [Nh]: in the think phase
    hard_log_prob: torch.Tensor  # float32 [Nh]: the rollout's; NaN where it has none
    hard_support: Support

    entropy: torch.Tensor  # float32 [Tt]: the rollout's, of every think step

    @property
    def num_inputs(self) -> int:
        """Rows this episode takes in a batch: the last position is predicted, not read."""
        return len(self.prompt_ids) + len(self.token) - 1

    @property
    def num_decisions(self) -> int:
        """Positions with a term, for normalising by length."""
        return len(torch.cat((self.soft_at, self.hard_at)).unique())


def pad_columns(ids: torch.Tensor, width: int) -> torch.Tensor:
    """int64 [N, width], filled up with -1."""
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1)
