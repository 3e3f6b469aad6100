"""A rollout sample as the loss needs it: which steps were decided by chance, and how.

Every position of a trace is a decision, or it is not (docs/wire.md, kinds):

- soft (1): the vector h~ was drawn from N(mu, sigma^2 I): one Gaussian term;
- sampled (0): a token was drawn: one log-prob term, at the temperature and support it was drawn at;
- soft and sampled (3, blend): a token y was drawn, then h~ around w pE + (1 - w) E[y]: both terms;
- forced (2): put there by the phase machine: no term;
- an end-of-sequence token that was *drawn* while thinking is hidden by the phase machine, which
  puts something else at that position. Stopping was a decision all the same: one log-prob term.

A trace does not say how the answer was sampled nor which tokens could not come; `Asked` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from softvllm.core import noise
from softvllm.core.phases import EndCause, Phase
from softvllm.core.rollout import Sample
from softvllm.core.trace import Kind, Trace, is_sampled, reconstruct, step_sigma
from trainer.episodes import Asked, Episode, pad_columns
from trainer.support import Support

GREEDY_BELOW = 1e-5
"""Answer temperatures below this mean argmax, as in vLLM."""


def episode(sample: Sample, asked: Asked, table: torch.Tensor | None) -> Episode:
    """Read a sample.

    Args:
        table: embedding table of the weights that made the sample, [>= V, d], in the rollout's
            dtype; needed for `record="sparse"` only.

    Raises:
        ValueError: the sample cannot be trained on; the message says why. Count and drop it, and
            stop above a small rate.
    """
    return episode_of_trace(sample.prompt_token_ids, sample.trace, asked, table)


def episode_of_trace(
    prompt_ids: np.ndarray, trace: Trace, asked: Asked, table: torch.Tensor | None = None
) -> Episode:
    """`episode` for a prompt and a trace."""
    _check(prompt_ids, trace, asked)
    meta, kind = trace.meta, trace.kind
    soft_at = trace.soft_positions
    sigma = step_sigma(trace)[soft_at]
    if (sigma <= 0).any():
        raise ValueError(
            "a soft step without noise is a point mass and has no density; roll out with "
            "noise_scale > 0"
        )
    stops = torch.tensor(sorted(set(asked.stop_ids)), dtype=torch.int64)
    tau = float(meta["tau"])

    def think_support(at: np.ndarray) -> Support:
        return _support(meta["top_k"], meta["top_p"], meta["min_p"], at < asked.min_think, stops)

    hard_at = np.flatnonzero(is_sampled(kind))
    greedy = asked.temperature < GREEDY_BELOW
    if greedy and asked.greedy_answer == "mask":
        hard_at = hard_at[trace.phase[hard_at] == Phase.THINK]
    thinks = trace.phase[hard_at] == Phase.THINK
    shown = _Hard.of_tokens(trace, hard_at, thinks, tau, greedy, asked, stops, think_support)
    hidden = _hidden_stop(trace, stops)
    if hidden is not None:
        at = np.array([hidden])
        shown = shown.joined(
            _Hard(at, stops[None], torch.tensor([tau]), np.array([True]), think_support(at))
        )
    return Episode(
        prompt_ids=torch.from_numpy(prompt_ids.astype(np.int64)),
        token=torch.from_numpy(trace.token.astype(np.int64)),
        seed=int(meta["seed"]),
        soft_at=torch.from_numpy(soft_at),
        soft_input=_soft_inputs(trace, table),
        soft_tau=torch.full((len(soft_at),), tau),
        soft_sigma=sigma,
        soft_mix=torch.full((len(soft_at),), _mix_weight(meta)),
        soft_ids=_recorded_ids(trace),
        soft_support=think_support(soft_at),
        hard_at=torch.from_numpy(shown.at),
        hard_ids=shown.ids,
        hard_tau=shown.tau,
        hard_think=torch.from_numpy(shown.think),
        hard_log_prob=shown.log_prob,
        hard_support=shown.support,
        entropy=torch.from_numpy(trace.entropy[trace.phase == Phase.THINK].copy()),
    )


def _check(prompt_ids: np.ndarray, trace: Trace, asked: Asked) -> None:
    if len(prompt_ids) == 0:
        raise ValueError("the prompt is empty: nothing predicts the first token")
    if len(trace) == 0:
        raise ValueError("the sample has no generated position")
    if trace.start:
        raise ValueError(f"the trace starts at position {trace.start}: a part cannot be trained on")
    if not (np.isfinite(trace.entropy).all() and np.isfinite(trace.log_prob).all()):
        raise ValueError("the trace holds NaN: the model that made it was broken")
    answers = (trace.phase == Phase.ANSWER) & (trace.kind == Kind.SAMPLED)
    if asked.temperature < GREEDY_BELOW and trace.log_prob[answers].any():
        raise ValueError("answers should be greedy, yet they have log-probs: check `Asked`")


def _mix_weight(meta: dict[str, Any]) -> float:
    """Weight of pE in the mean of a soft step."""
    if meta["policy"] in ("hard", "soft", "interleave", "entropy"):
        return 1.0
    if meta["policy"] == "blend":
        return float(meta["policy_values"][0])
    raise ValueError(
        f"policy {meta['policy']!r}: the trainer does not know its mean; it knows hard, soft, "
        "blend, interleave and entropy"
    )


def _soft_inputs(trace: Trace, table: torch.Tensor | None) -> torch.Tensor:
    if trace.dense is not None:
        return trace.dense_tensor()
    if len(trace.soft_positions) == 0:
        return torch.zeros(0, int(trace.meta["dim"]), dtype=getattr(torch, trace.meta["dtype"]))
    if trace.sparse_ids is None:
        raise ValueError(
            'the trace holds no soft inputs; ask for record="dense", or "sparse" with top_k'
        )
    if table is None:
        raise ValueError("sparse traces need the embedding table to rebuild their inputs")
    if str(table.dtype) != f"torch.{trace.meta['dtype']}":
        raise ValueError(
            f"the rollout's table was {trace.meta['dtype']}, this one is {table.dtype}: convert "
            "it, or the rebuilt inputs are not those that were fed"
        )
    return reconstruct(trace, table)[trace.soft_positions].cpu()


def _recorded_ids(trace: Trace) -> torch.Tensor | None:
    """Tokens of the mixtures, if recorded: int64 [Ns, K]."""
    if trace.sparse_ids is None or trace.sparse_weights is None:
        return None
    extra = 1 if trace.meta["policy"] == "blend" else 0  # the sampled token comes first
    ids = torch.from_numpy(trace.sparse_ids[:, extra:].astype(np.int64))
    used = torch.from_numpy(trace.sparse_weights[:, extra:] > 0)
    whole = trace.meta["top_p"] >= 1 and trace.meta["min_p"] <= 0
    if whole and ids.shape[1] == trace.meta["top_k"]:
        # All columns belong to the support, also those whose weight underflowed (fuzzy).
        return ids
    if not used.any(dim=1).all():
        return None  # blend of weight 0: the weights do not show the support
    return ids.where(used, -1)


def _support(top_k: int, top_p: float, min_p: float, hides: np.ndarray, stops: Any) -> Support:
    n = len(hides)
    return Support(
        top_k=torch.full((n,), int(top_k)),
        top_p=torch.full((n,), float(top_p)),
        min_p=torch.full((n,), float(min_p)),
        hides_stop=torch.from_numpy(hides.astype(bool)),
        stop_ids=stops,
    )


class _Hard:
    """Log-prob terms on the way to an `Episode`."""

    def __init__(
        self,
        at: np.ndarray,
        ids: torch.Tensor,
        tau: torch.Tensor,
        think: np.ndarray,
        support: Support,
        log_prob: torch.Tensor | None = None,
    ) -> None:
        self.at, self.ids, self.tau, self.think, self.support = at, ids, tau, think, support
        self.log_prob = torch.full((len(at),), torch.nan) if log_prob is None else log_prob

    @classmethod
    def of_tokens(
        cls,
        trace: Trace,
        at: np.ndarray,
        thinks: np.ndarray,
        tau: float,
        greedy: bool,
        asked: Asked,
        stops: torch.Tensor,
        think_support: Any,
    ) -> _Hard:
        """Terms of the shown tokens at positions `at`."""
        answering = ~thinks
        log_prob = torch.from_numpy(trace.log_prob[at].copy())
        if greedy:
            log_prob[torch.from_numpy(answering)] = torch.nan
        temperature = 1.0 if greedy else asked.temperature
        taus = torch.where(torch.from_numpy(thinks), tau, temperature)
        think = think_support(at)
        limits = (0, 1.0, 0.0) if greedy else (asked.top_k, asked.top_p, asked.min_p)
        answer = _support(*limits, np.zeros(len(at), bool), stops)
        mixed = {
            name: torch.where(torch.from_numpy(thinks), getattr(think, name), getattr(answer, name))
            for name in ("top_k", "top_p", "min_p", "hides_stop")
        }
        ids = torch.from_numpy(trace.token[at].astype(np.int64))[:, None]
        return cls(at, ids, taus, thinks, Support(**mixed, stop_ids=stops), log_prob)

    def joined(self, other: _Hard) -> _Hard:
        width = max(self.ids.shape[1], other.ids.shape[1])
        return _Hard(
            np.concatenate((self.at, other.at)),
            torch.cat((pad_columns(self.ids, width), pad_columns(other.ids, width))),
            torch.cat((self.tau, other.tau)),
            np.concatenate((self.think, other.think)),
            Support.cat([self.support, other.support]),
            torch.cat((self.log_prob, other.log_prob)),
        )


def _hidden_stop(trace: Trace, stops: torch.Tensor) -> int | None:
    """Position at which a drawn stop token ended thinking; None if none was drawn."""
    if trace.end_cause != EndCause.EOS:
        return None
    at = int(np.flatnonzero(trace.steps["cause"] == EndCause.EOS)[0])
    policy = trace.meta["policy"]
    if policy == "interleave":
        u = noise.uniform(torch.tensor([trace.meta["seed"]]), torch.tensor([at]), noise.POLICY)
        drawn = float(u) >= trace.meta["policy_values"][0]
    else:
        # Which side policy `entropy` was on at a hidden step is not recorded: no term.
        drawn = policy in ("hard", "blend")
    if not drawn:
        return None
    if len(stops) == 0:
        raise ValueError(
            "thinking ended at a stop token that was drawn; name the request's stop tokens in "
            "`Asked.stop_ids`, so that this decision counts"
        )
    return at
