"""Episodes to padding-free batches, and batches of a bounded number of tokens.

A batch is one row of concatenated segments. An episode of Tp prompt tokens and T generated
positions has Tp + T - 1 inputs; the row *before* position t's own holds the logits that decided
position t. Terms name their rows, so nothing is shifted later.

A segment is an episode; or, where prompts are shared, a prompt or what one episode generated
after it. All samples of a group have the same prompt, so its rows go through the model once a
batch, and gradients from all samples meet in them. That is the same function of the weights.
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
    cu_seqlens: torch.Tensor  # int32 [segments + 1]: where segments begin
    lengths: tuple[int, ...]  # the same as host numbers
    soft: SoftTerms
    hard: HardTerms
    num_decisions: torch.Tensor  # int64 [S]: positions with a term
    parents: tuple[int, ...] | None = None
    """Of each segment, the one it goes on from (its prompt); -1: none. None: no prompt is shared,
    segments are episodes."""

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

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


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things lie in a batch."""

    last: list[int]
    """Per episode, its prompt's last row, which decides position 0."""
    own: list[int]
    """Per episode, the row that reads position 0."""
    token_ids: list[torch.Tensor]  # per segment
    position_ids: list[torch.Tensor]
    parents: tuple[int, ...] | None

    def deciding(self, index: int, at: torch.Tensor) -> torch.Tensor:
        """Rows that decide positions `at` of an episode."""
        return torch.where(at == 0, self.last[index], self.own[index] + at - 1)


def _lay_out(episodes: Sequence[Episode]) -> _Layout:
    """Each episode whole, one after the other."""
    last, own, start = [], [], 0
    for e in episodes:
        last.append(start + len(e.prompt_ids) - 1)
        own.append(start + len(e.prompt_ids))
        start += e.num_inputs
    ids = [torch.cat((e.prompt_ids, e.token[:-1])) for e in episodes]
    return _Layout(last, own, ids, [torch.arange(len(i)) for i in ids], None)


def _lay_out_shared(episodes: Sequence[Episode]) -> _Layout:
    """Each prompt once, followed by what its episodes generated."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, e in enumerate(episodes):
        groups.setdefault(tuple(e.prompt_ids.tolist()), []).append(index)
    last, own = [0] * len(episodes), [0] * len(episodes)
    ids: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    parents: list[int] = []
    start = 0
    for members in groups.values():
        prompt = episodes[members[0]].prompt_ids
        parent, length = len(ids), len(prompt)
        ids.append(prompt)
        positions.append(torch.arange(length))
        parents.append(-1)
        end, start = start + length - 1, start + length
        for index in members:
            last[index], own[index] = end, start
            read = episodes[index].token[:-1]
            if len(read):
                ids.append(read)
                positions.append(length + torch.arange(len(read)))
                parents.append(parent)
                start += len(read)
    return _Layout(last, own, ids, positions, tuple(parents))


def pack(episodes: Sequence[Episode], share_prompts: bool = False) -> Batch:
    """One batch of all episodes, in their order.

    Args:
        share_prompts: put equal prompts through the model once (attention: `sdpa` only).

    Raises:
        ValueError: no episodes, or episodes of different models (dtype or size of h~) or
            different stop tokens.
    """
    if not episodes:
        raise ValueError("nothing to pack")
    kinds = {(e.soft_input.dtype, e.soft_input.shape[1]) for e in episodes if len(e.soft_at)}
    if len(kinds) > 1:
        raise ValueError(f"soft inputs of different models in one batch: {sorted(map(str, kinds))}")
    layout = _lay_out_shared(episodes) if share_prompts else _lay_out(episodes)
    lengths = [len(ids) for ids in layout.token_ids]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]

    values = [e.soft_input for e in episodes if len(e.soft_at)] or [episodes[0].soft_input]
    value = torch.cat(values)
    # The last position is never read.
    read = torch.cat([e.soft_at < len(e.token) - 1 for e in episodes])
    soft_rows = torch.cat([own + e.soft_at for own, e in zip(layout.own, episodes)])
    return Batch(
        token_ids=torch.cat(layout.token_ids),
        soft_rows=soft_rows[read],
        soft_values=value[read],
        position_ids=torch.cat(layout.position_ids),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        lengths=tuple(lengths),
        parents=layout.parents,
        soft=SoftTerms(
            row=torch.cat([layout.deciding(i, e.soft_at) for i, e in enumerate(episodes)]),
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
            row=torch.cat([layout.deciding(i, e.hard_at) for i, e in enumerate(episodes)]),
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


def group_batches(
    groups: Sequence[object],
    prompts: Sequence[int],
    owns: Sequence[int],
    max_tokens: int,
    at_least: int = 1,
) -> list[list[int]]:
    """`micro_batches` that keep samples of a group together and count their prompt once.

    Args:
        groups: the group of every sequence.
        prompts: rows of its prompt.
        owns: rows of its own.
    """
    wanted = min(at_least, len(groups))
    most = -(-len(groups) // at_least)
    units: list[list[int]] = []
    rows: list[int] = []
    latest: dict[object, int] = {}
    for i, group in enumerate(groups):
        at = latest.get(group)
        if at is None or len(units[at]) == most or rows[at] + owns[i] > max_tokens:
            latest[group] = at = len(units)
            units.append([])
            rows.append(prompts[i])
        units[at].append(i)
        rows[at] += owns[i]
    while len(units) < wanted:  # groups of uneven size: halve the largest unit
        largest = max(range(len(units)), key=lambda u: len(units[u]))
        half = len(units[largest]) // 2
        units.append(units[largest][half:])
        units[largest] = units[largest][:half]
    rows = [prompts[unit[0]] + sum(owns[i] for i in unit) for unit in units]
    split = micro_batches(rows, max_tokens, at_least)
    return [[i for unit in part for i in units[unit]] for part in split]
