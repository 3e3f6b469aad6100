"""Episodes to padding-free batches, and batches of a bounded number of tokens.

A batch is one row of concatenated sequences, each with positions from 0. An episode of Tp prompt
tokens and T generated positions takes Tp + T - 1 rows: row Tp - 1 + t, the one *before* position
t's own, holds the logits that decided position t. Terms name their rows, so nothing is shifted
later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from trainer.episodes import Episode, pad_columns
from trainer.support import Support


@dataclass(frozen=True, slots=True)
class SoftTerms:
    """Ns Gaussian terms."""

    row: torch.Tensor  # int64 [Ns]: row whose hidden state decided the step
    sequence: torch.Tensor  # int64 [Ns]: which episode of the batch
    position: torch.Tensor  # int64 [Ns]: generated position, the noise's counter
    seed: torch.Tensor  # int64 [Ns]
    value: torch.Tensor  # [Ns, d]: h~ as recorded, table units
    token: torch.Tensor  # int64 [Ns]: visible token
    tau: torch.Tensor  # float32 [Ns]
    sigma: torch.Tensor  # float32 [Ns], table units
    mix: torch.Tensor  # float32 [Ns]: weight of pE; the rest is on E[token]
    ids: torch.Tensor | None  # int64 [Ns, K], -1: unused, all -1: not recorded; None: none is
    support: Support | None  # None: whole vocabulary


@dataclass(frozen=True, slots=True)
class HardTerms:
    """Nh log-prob terms."""

    row: torch.Tensor  # int64 [Nh]
    sequence: torch.Tensor  # int64 [Nh]
    position: torch.Tensor  # int64 [Nh]
    ids: torch.Tensor  # int64 [Nh, K]: any of these, -1: unused
    tau: torch.Tensor  # float32 [Nh]
    think: torch.Tensor  # bool [Nh]
    rollout_log_prob: torch.Tensor  # float32 [Nh], NaN where the rollout has none
    support: Support | None


@dataclass(frozen=True, slots=True)
class Batch:
    """S episodes in R rows."""

    token_ids: torch.Tensor  # int64 [R]: looked up in the table, then ...
    soft_rows: torch.Tensor  # int64 [Nf]: ... overwritten in these rows ...
    soft_values: torch.Tensor  # [Nf, d]: ... by these constants, table units
    position_ids: torch.Tensor  # int64 [R], from 0 in each sequence
    cu_seqlens: torch.Tensor  # int32 [S + 1]: where sequences begin
    lengths: tuple[int, ...]  # the same as host numbers
    soft: SoftTerms
    hard: HardTerms
    num_decisions: torch.Tensor  # int64 [S]: positions with a term

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> Batch:
        return _to(self, device)


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, (torch.Tensor, Support)):
        return value.to(device)
    if isinstance(value, (Batch, SoftTerms, HardTerms)):
        return replace(
            value, **{f.name: _to(getattr(value, f.name), device) for f in fields(value)}
        )
    return value


def pack(episodes: Sequence[Episode]) -> Batch:
    """One batch of all episodes, in their order.

    Raises:
        ValueError: no episodes, or episodes of different models (dtype or size of h~) or
            different stop tokens.
    """
    if not episodes:
        raise ValueError("nothing to pack")
    kinds = {(e.soft_input.dtype, e.soft_input.shape[1]) for e in episodes if len(e.soft_at)}
    if len(kinds) > 1:
        raise ValueError(f"soft inputs of different models in one batch: {sorted(map(str, kinds))}")
    lengths = [e.num_inputs for e in episodes]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    first = [s + len(e.prompt_ids) - 1 for s, e in zip(starts, episodes)]  # decides position 0

    values = [e.soft_input for e in episodes if len(e.soft_at)] or [episodes[0].soft_input]
    value = torch.cat(values)
    soft_rows = torch.cat([f + e.soft_at for f, e in zip(first, episodes)])
    # Position t is read one row after the one that decided it; the last position never is.
    read = torch.cat([e.soft_at < len(e.token) - 1 for e in episodes])
    return Batch(
        token_ids=torch.cat([torch.cat((e.prompt_ids, e.token[:-1])) for e in episodes]),
        soft_rows=(soft_rows + 1)[read],
        soft_values=value[read],
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        lengths=tuple(lengths),
        soft=SoftTerms(
            row=soft_rows,
            sequence=_repeat([len(e.soft_at) for e in episodes]),
            position=torch.cat([e.soft_at for e in episodes]),
            seed=torch.cat([torch.full((len(e.soft_at),), e.seed) for e in episodes]),
            value=value,
            token=torch.cat([e.token[e.soft_at] for e in episodes]),
            tau=torch.cat([e.soft_tau for e in episodes]),
            sigma=torch.cat([e.soft_sigma for e in episodes]),
            mix=torch.cat([e.soft_mix for e in episodes]),
            ids=_join_ids(episodes),
            support=_join_support([e.soft_support for e in episodes]),
        ),
        hard=HardTerms(
            row=torch.cat([f + e.hard_at for f, e in zip(first, episodes)]),
            sequence=_repeat([len(e.hard_at) for e in episodes]),
            position=torch.cat([e.hard_at for e in episodes]),
            ids=_padded([e.hard_ids for e in episodes]),
            tau=torch.cat([e.hard_tau for e in episodes]),
            think=torch.cat([e.hard_think for e in episodes]),
            rollout_log_prob=torch.cat([e.hard_log_prob for e in episodes]),
            support=_join_support([e.hard_support for e in episodes]),
        ),
        num_decisions=torch.tensor([e.num_decisions for e in episodes]),
    )


def _repeat(counts: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def _padded(ids: list[torch.Tensor]) -> torch.Tensor:
    width = max(i.shape[1] for i in ids)
    return torch.cat([pad_columns(i, width) for i in ids])


def _join_ids(episodes: Sequence[Episode]) -> torch.Tensor | None:
    if all(e.soft_ids is None for e in episodes):
        return None
    unknown = [torch.full((len(e.soft_at), 1), -1) for e in episodes]
    return _padded([u if e.soft_ids is None else e.soft_ids for u, e in zip(unknown, episodes)])


def _join_support(parts: list[Support]) -> Support | None:
    if any(not torch.equal(p.stop_ids, parts[0].stop_ids) for p in parts):
        raise ValueError("episodes with different stop tokens in one batch; pack them apart")
    joined = Support.cat(parts)
    return None if joined.is_full else joined


def micro_batches(lengths: Sequence[int], max_tokens: int, at_least: int = 1) -> list[list[int]]:
    """Indices of sequences that go through the model together: at most `max_tokens` rows each.

    Longest first, each into the fullest batch it fits in. Loss and gradient do not depend on the
    split (`Normaliser`).

    Args:
        at_least: number of batches at least, so that all ranks can make the same number of
            steps; lists may be empty where there are fewer sequences.

    Raises:
        ValueError: a sequence is longer than `max_tokens`.
    """
    if lengths and max(lengths) > max_tokens:
        raise ValueError(
            f"a sequence of {max(lengths)} tokens does not fit micro_batch_tokens = {max_tokens}; "
            "raise it, or shorten rollout.max_think_tokens or prompts"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = [[] for _ in range(at_least)]
    free = [max_tokens] * at_least
    # The wanted number of batches gets one sequence each before any gets two.
    for batch, i in zip(range(at_least), order):
        batches[batch].append(i)
        free[batch] -= lengths[i]
    for i in order[at_least:]:
        fits = [b for b, room in enumerate(free) if room >= lengths[i]]
        if not fits:
            batches.append([])
            free.append(max_tokens)
            fits = [len(batches) - 1]
        best = min(fits, key=lambda b: free[b])
        batches[best].append(i)
        free[best] -= lengths[i]
    return batches
