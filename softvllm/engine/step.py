"""One sampling step of the rows that have a CoT object, from raw logits to emitted tokens.

Two halves around the stock sampler: `__init__` computes the think step from the raw logits,
`finish` draws answer tokens from what the stock sampler made of them, advances the phase
machine and writes the next soft inputs. Rows are split by what the host knows of their phase;
where it cannot know, both ways are computed and the device picks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from softvllm.core import phases, think
from softvllm.core.phases import Phase
from softvllm.core.think import Group, ThinkStep
from softvllm.engine.finish import FinishInputs
from softvllm.engine.records import StepRecord

if TYPE_CHECKING:
    from softvllm.engine.core import LiveRequest, SoftCore


class Step:
    """R rows of this batch; `rows` index the logits."""

    def __init__(
        self,
        core: SoftCore,
        logits: torch.Tensor,
        rows: np.ndarray,
        slots: np.ndarray,
        position: np.ndarray,
    ) -> None:
        self.core = core
        self.requests: list[LiveRequest] = []
        for slot in slots:
            request = core.by_slot[slot]
            assert request is not None
            self.requests.append(request)
        self.num_rows = logits.shape[0]
        self.rows_np, self.slots_np, self.position_np = rows, slots, position
        # One copy brings all three index columns to the device.
        index = torch.from_numpy(np.stack((rows, slots, position)))
        if core.device.type != "cpu":
            index = index.pin_memory().to(core.device, non_blocking=True)
        self.rows, self.slots, self.position = index.unbind(0)
        if core.ops.exact_host:
            phase = core.state.dyn[self.slots, core.state.PHASE].numpy()
            thinks, answers = phase == Phase.THINK, phase == Phase.ANSWER
        else:
            thinks = core.hints.maybe_think(slots, position)
            answers = core.hints.maybe_answer(slots, position)
        self.think_np = np.flatnonzero(thinks)
        self.think = self._think(logits) if len(self.think_np) else None
        if core.ops.exact_host and self.think is not None:
            answers = answers | self._answers_at_once()
        self.answer_np = np.flatnonzero(answers)

    @property
    def needs_sampler(self) -> bool:
        """Whether any row of the batch, ours or a neighbour's, wants the stock sampler."""
        return len(self.answer_np) > 0 or self.num_rows > len(self.rows_np)

    @property
    def _mixes(self) -> bool:
        """Whether any think row may feed a mixture; equal on every rank, which must all reduce."""
        return any(self.requests[i].cot.policy != "hard" for i in self.think_np)

    def _answers_at_once(self) -> np.ndarray:
        """Rows whose think token is a stop token and that have no forced text to fall back on."""
        assert self.think is not None
        state = self.core.state
        at = torch.from_numpy(self.think_np)
        stop = phases.is_stop(state, self.slots[at], self.think.token)
        out = np.zeros(len(self.rows_np), dtype=bool)
        if bool(stop.any()):
            bare = (state.ints[self.slots[at], state.LEN_CUT] == 0) & stop
            out[self.think_np[bare.numpy()]] = True
        return out

    # ---- think --------------------------------------------------------------------------

    def _groups(self) -> list[tuple[Group, np.ndarray]]:
        """Think rows by policy and kind of support, with what their requests need together."""
        members: dict[tuple[str, bool], list[int]] = {}
        for i in self.think_np:
            cot = self.requests[i].cot
            members.setdefault((cot.policy, cot.top_k > 0), []).append(i)
        groups = []
        for (policy, sparse), rows in members.items():
            cots = [self.requests[i].cot for i in rows]
            group = Group(
                policy,
                sparse,
                max_top_k=max(c.top_k for c in cots),
                uses_top_p=any(c.top_p < 1.0 for c in cots),
                uses_min_p=any(c.min_p > 0.0 for c in cots),
                masks_stop=any(self.position_np[i] < c.min_think for i, c in zip(rows, cots)),
                record_top=max(c.record_top if c.record == "top" else 0 for c in cots),
                record_sparse=any(c.record == "sparse" for c in cots),
            )
            groups.append((group, np.array(rows)))
        return groups

    def _think(self, logits: torch.Tensor) -> ThinkStep:
        """Think step of the rows in `think_np`, groups merged back into that order."""
        core = self.core
        parts: list[tuple[np.ndarray, ThinkStep]] = []
        for group, members in self._groups():
            whole = len(members) == self.num_rows == len(self.rows_np)
            at = self._index(members)
            part = think.think_step(
                group,
                logits if whole else logits[self.rows[at]],
                core.state,
                self.slots[at],
                self.position[at],
                core.table.expect,
                core.table.gather,
                core.ops.uniform,
                core.ops.read,
            )
            parts.append((members, part))
        return self._merge(parts)

    def _index(self, members: np.ndarray) -> torch.Tensor:
        index = torch.from_numpy(members)
        if self.core.device.type == "cpu":
            return index
        # Pinned: a copy from pageable memory would wait for everything queued before it.
        return index.pin_memory().to(self.core.device, non_blocking=True)

    def _merge(self, parts: list[tuple[np.ndarray, ThinkStep]]) -> ThinkStep:
        core, count = self.core, len(self.think_np)
        device = core.device
        if len(parts) == 1:
            merged = parts[0][1]
            if merged.mean.numel() == 0:
                merged.mean = torch.zeros(count, core.table.dim, device=device)
        else:
            merged = ThinkStep(
                token=torch.empty(count, dtype=torch.int64, device=device),
                soft=torch.empty(count, dtype=torch.bool, device=device),
                sampled=torch.empty(count, dtype=torch.bool, device=device),
                log_prob=torch.empty(count, device=device),
                entropy=torch.empty(count, device=device),
                mean=torch.zeros(count, core.table.dim, device=device),
                state=torch.empty(count, core.state.policy_state.shape[1], device=device),
            )
            order = {row: i for i, row in enumerate(self.think_np)}
            for members, part in parts:
                at = self._index(np.array([order[m] for m in members]))
                for name in ("token", "soft", "sampled", "log_prob", "entropy", "mean", "state"):
                    value = getattr(part, name)
                    if value.numel():
                        getattr(merged, name)[at] = value
                for name in ("top_ids", "top_probs", "sparse_ids", "sparse_weights"):
                    value = getattr(part, name)
                    if value is not None:
                        setattr(merged, name, _put(getattr(merged, name), at, value, count))
        # One reduction over ranks for all groups; it is linear, so partial sums may be mixed.
        if self._mixes:
            merged.mean = core.table.reduce(merged.mean)
        return merged

    # ---- after the stock sampler ------------------------------------------------------------

    def finish(
        self, sampled: torch.Tensor | None, processed: torch.Tensor | None
    ) -> tuple[torch.Tensor, StepRecord]:
        """Emit this position.

        Args:
            sampled: the stock sampler's tokens [num_rows], or None if it did not run.
            processed: logits as the request's sampling parameters shaped them [num_rows, V];
                needed where a row may answer.

        Returns:
            tokens of the whole batch, int64 [num_rows], and the record of our rows.
        """
        core = self.core
        device = core.device
        answer_token = torch.zeros(0, dtype=torch.int64, device=device)
        answer_log_prob = torch.zeros(0, device=device)
        if len(self.answer_np):
            assert processed is not None
            at = self._index(self.answer_np)
            shaped = processed[self.rows[at]][:, : core.vocab_size].to(torch.float32)
            answer_token, answer_log_prob = think.sample_answer(
                shaped, core.state, self.slots[at], self.position[at], core.ops.uniform
            )
        tokens = torch.zeros(self.num_rows, dtype=torch.int64, device=device)
        if sampled is not None:
            tokens.copy_(sampled)
        places = np.full((2, len(self.rows_np)), -1, dtype=np.int64)
        places[0, self.think_np] = np.arange(len(self.think_np))
        places[1, self.answer_np] = np.arange(len(self.answer_np))
        think_at, answer_at = self._index(places).unbind(0)
        fed = self._feed()
        done = core.ops.finish(
            FinishInputs(
                state=core.state,
                rows=self.rows,
                slots=self.slots,
                position=self.position,
                think_at=think_at,
                think=self.think,
                answer_at=answer_at,
                answer_token=answer_token,
                answer_log_prob=answer_log_prob,
                tokens=tokens,
                is_soft=core.buffers.is_soft,
            )
        )
        return tokens, StepRecord.of(self, done, fed)

    def _feed(self) -> torch.Tensor | None:
        """Write the next inputs of rows that may think softly; returns them as fed, [Rt, d].

        Whether a row really is soft is decided by `finish`, which sets its overlay flag.
        """
        if self.think is None or not self._mixes:
            return None
        core, at = self.core, self._index(self.think_np)
        slots = self.slots[at]
        seeds = core.state.ints[slots, core.state.SEED]
        return core.ops.feed(
            self.think.mean,
            core.sigma[slots],
            seeds,
            self.position[at],
            core.buffers.fed,
            slots,
        )


def _put(
    target: torch.Tensor | None, at: torch.Tensor, value: torch.Tensor, count: int
) -> torch.Tensor:
    """Scatter a group's columns into the merged array, widened where groups differ."""
    width = max(value.shape[1], target.shape[1] if target is not None else 0)
    if target is None or target.shape[1] < width:
        wider = torch.zeros(count, width, dtype=value.dtype, device=value.device)
        if target is not None:
            wider[:, : target.shape[1]] = target
        target = wider
    target[at, : value.shape[1]] = value
    return target
