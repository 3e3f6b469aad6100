"""The part both model runners share: slots, input rows, the sampling step.

A runner adapter calls, in this order each step: `add`/`remove` for requests that come and go,
`prepare_inputs` before the forward pass, `begin` with the logits, and `Step.finish` with what
the stock sampler made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from softvllm.core import phases
from softvllm.core.embedding import noise_sigma
from softvllm.core.phases import EndCause, Phase, SlotState
from softvllm.core.resolve import ResolvedCoT
from softvllm.engine import overlay
from softvllm.engine.embedding import SoftTable
from softvllm.engine.ops import Ops, for_device
from softvllm.engine.replay import Replay, next_phase
from softvllm.engine.step import Step


@dataclass(slots=True)
class LiveRequest:
    """A request that owns a slot."""

    req_id: str
    slot: int
    cot: ResolvedCoT
    prompt_len: int
    replay: Replay | None
    prefill_len: int
    """Known tokens when it was (re)scheduled; rows before the last of them sample nothing."""
    sigma: float = 0.0


@dataclass(slots=True)
class PhaseHints:
    """What the host knows of each slot's phase, possibly a few steps old.

    Under async scheduling the device runs ahead, but a phase never goes back and the forced
    text takes a known number of steps, so old knowledge still rules things out.
    """

    phase: np.ndarray  # int8 [S], phase of position `at`
    at: np.ndarray  # int64 [S], position the phase belongs to
    max_think: np.ndarray  # int64 [S]
    to_answer: np.ndarray  # int64 [S], steps from `at` that thinking needs to reach the answer

    @classmethod
    def empty(cls, slots: int) -> PhaseHints:
        def zeros() -> np.ndarray:
            return np.zeros(slots, dtype=np.int64)

        return cls(zeros().astype(np.int8), zeros(), zeros(), zeros())

    def maybe_think(self, slots: np.ndarray, position: np.ndarray) -> np.ndarray:
        return (self.phase[slots] == Phase.THINK) & (position < self.max_think[slots])

    def maybe_answer(self, slots: np.ndarray, position: np.ndarray) -> np.ndarray:
        lag = position - self.at[slots]
        return (self.phase[slots] != Phase.THINK) | (lag >= self.to_answer[slots])


@dataclass
class SoftCore:
    """Soft decoding state of one worker (one model, one rank)."""

    table: SoftTable
    max_num_reqs: int
    max_num_tokens: int
    vocab_size: int
    device: torch.device
    key: int
    requests: dict[str, LiveRequest] = field(default_factory=dict)
    free_slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        slots, rows = self.max_num_reqs, self.max_num_tokens
        self.state = SlotState(slots, self.device)
        self.sigma = torch.zeros(slots, dtype=torch.float32, device=self.device)
        self.hints = PhaseHints.empty(slots)
        self.by_slot: list[LiveRequest | None] = [None] * slots
        self.free_slots = list(range(slots - 1, -1, -1))
        # Replayed rows exist only while a preempted request is recomputed, at most one batch.
        self.buffers = overlay.OverlayBuffers(
            row_source=torch.full((rows,), -1, dtype=torch.int32, device=self.device),
            fed=torch.zeros(
                slots + rows, self.table.dim, dtype=self.table.dtype, device=self.device
            ),
            is_soft=torch.zeros(slots + rows, dtype=torch.bool, device=self.device),
        )
        self._source_np = np.full(rows, -1, dtype=np.int32)
        self._source_len = 0
        self._stale = False
        self._rows: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        overlay.bind(self.key, self.buffers)
        self.ops: Ops = for_device(self.device)

    def close(self) -> None:
        overlay.unbind(self.key)

    # ---- requests come and go -------------------------------------------------------------

    def add(
        self, req_id: str, cot: ResolvedCoT, prompt_len: int, replay: Replay | None = None
    ) -> None:
        """Give a new or resumed request a slot."""
        self.remove(req_id)
        slot = self.free_slots.pop()
        request = LiveRequest(
            req_id=req_id,
            slot=slot,
            cot=cot,
            prompt_len=prompt_len,
            replay=replay,
            prefill_len=prompt_len + (len(replay) if replay else 0),
            sigma=noise_sigma(cot.gamma, self.table.rms()) if cot.gamma else 0.0,
        )
        self.requests[req_id] = request
        self.by_slot[slot] = request
        self.state.set_request(slot, cot)
        self.sigma[slot] = request.sigma
        self.buffers.is_soft[slot] = False
        phase, at = Phase.THINK, 0
        if cot.max_think == 0:
            phase = Phase.FORCED if cot.after_cut else Phase.ANSWER
        if replay is not None:
            phases.restore(
                self.state,
                slot,
                cot,
                replay.steps["token"],
                replay.steps["phase"],
                replay.steps["entropy"],
                int(replay.steps["cause"][-1]),
                replay.policy_state,
            )
            forced = int((replay.steps["phase"] == Phase.FORCED).sum())
            phase, at = next_phase(cot, int(replay.steps["cause"][-1]), forced), len(replay)
        hints = self.hints
        hints.phase[slot], hints.at[slot] = phase, at
        hints.max_think[slot] = cot.max_think
        hints.to_answer[slot] = min(len(cot.after_cut), len(cot.after_end) + 1)

    def remove(self, req_id: str) -> None:
        """Forget a finished or preempted request; unknown ids are fine."""
        request = self.requests.pop(req_id, None)
        if request is None:
            return
        self.by_slot[request.slot] = None
        self.buffers.is_soft[request.slot] = False
        self.state.clear(request.slot)
        self.free_slots.append(request.slot)

    def refresh_weights(self) -> None:
        """Weights changed: sigma is computed anew before it is needed next.

        Not at once: weights may still be asleep or on their way, and the RMS is a collective
        under tensor parallelism, which `add` and `prepare_inputs` reach on every rank alike.
        """
        self.table.refresh()
        self._stale = True

    def info(self) -> dict[str, Any]:
        """The embedding table as the think phase sees it; on every rank alike (a collective)."""
        table = self.table
        return {
            "rms": table.rms(),
            "dim": table.dim,
            "vocab_size": self.vocab_size,
            "dtype": str(table.dtype).removeprefix("torch."),
        }

    def _update_sigma(self) -> None:
        self._stale = False
        rms = self.table.rms()
        for request in self.requests.values():
            request.sigma = noise_sigma(request.cot.gamma, rms) if request.cot.gamma else 0.0
            self.sigma[request.slot] = request.sigma

    # ---- before the forward pass ----------------------------------------------------------

    def prepare_inputs(
        self,
        req_ids: Sequence[str],
        num_computed: np.ndarray,
        num_scheduled: np.ndarray,
        row_start: np.ndarray,
    ) -> None:
        """Say which input rows are soft, and remember which logit rows are ours.

        Args:
            req_ids: the batch in row order.
            num_computed: tokens of each request already in the KV cache, [num_reqs].
            num_scheduled: input rows of each request in this step, [num_reqs].
            row_start: first input row of each request, [num_reqs].
        """
        self._rows = None
        self.buffers.active = False
        if self._stale and self.requests:
            self._update_sigma()
        if not self.requests:
            self._write_sources(0)
            return
        live = [self.requests.get(req_id) for req_id in req_ids]
        index = np.flatnonzero(np.array([r is not None for r in live]))
        if not len(index):
            self._write_sources(0)
            return
        ours = [live[i] for i in index]
        slots = np.array([r.slot for r in ours if r], dtype=np.int64)
        prompt = np.array([r.prompt_len for r in ours if r], dtype=np.int64)
        prefill = np.array([r.prefill_len for r in ours if r], dtype=np.int64)
        computed = num_computed[index].astype(np.int64)
        scheduled = num_scheduled[index].astype(np.int64)
        start = row_start[index].astype(np.int64)
        total = int((row_start + num_scheduled).max())
        source = self._source_np
        source[: max(total, self._source_len)] = -1
        # The input of a decode row is the token generated last, unless it is being replayed.
        decode = (computed >= prefill) & (computed >= prompt)
        source[start[decode]] = slots[decode]
        staged = 0
        for i, request in enumerate(ours):
            if request is not None and request.replay is not None:
                staged = self._stage_replay(
                    request, int(computed[i]), int(scheduled[i]), int(start[i]), staged
                )
        self._write_sources(total)
        self.buffers.active = bool(decode.any()) or staged > 0
        end = computed + scheduled
        ready = end >= prefill
        if ready.any():
            self._rows = (index[ready], slots[ready], (end - prompt)[ready])

    def _stage_replay(
        self, request: LiveRequest, computed: int, scheduled: int, start: int, staged: int
    ) -> int:
        """Upload recorded soft inputs that fall into this chunk of a recomputed prefill."""
        replay = request.replay
        assert replay is not None
        first = max(computed - request.prompt_len, 0)
        stop = min(computed + scheduled - request.prompt_len, len(replay))
        if stop > first:
            at, rows = replay.soft_rows(first, stop)
            if len(at):
                base = self.max_num_reqs + staged
                source = rows.to(self.buffers.fed.dtype)
                self.buffers.fed[base : base + len(at)] = source.to(self.device)
                self.buffers.is_soft[base : base + len(at)] = True
                row = start + at + request.prompt_len - computed
                self._source_np[row] = base + np.arange(len(at), dtype=np.int32)
                staged += len(at)
        if computed + scheduled >= request.prefill_len:
            request.replay = None  # recomputed: from here on the device state is complete
        return staged

    def _write_sources(self, total: int) -> None:
        """Copy the row sources to the device; rows beyond `total` (graph padding) become -1."""
        width = max(total, self._source_len)
        if width:
            if total == 0:
                self._source_np[:width] = -1
            host = torch.from_numpy(self._source_np[:width])
            if self.device.type != "cpu":
                host = host.pin_memory()
            self.buffers.row_source[:width].copy_(host, non_blocking=True)
        self._source_len = total

    # ---- after the forward pass -----------------------------------------------------------

    def begin(self, logits: torch.Tensor) -> Step | None:
        """Start the sampling step; None if no row of this batch thinks, forces or answers here.

        Args:
            logits: [num_reqs, V] of the model, before any logits processor.
        """
        if self._rows is None:
            return None
        rows, slots, position = self._rows
        self._rows = None
        return Step(self, logits[:, : self.vocab_size], rows, slots, position)

    def observe(
        self, slots: np.ndarray, position: np.ndarray, phase: np.ndarray, cause: np.ndarray
    ) -> None:
        """Learn from results that reached the host: phase of `position`, and whether it ended.

        The next position's phase is at least this one's; a think step that ended thinking
        counts as forced from the next position on.
        """
        ended = (phase == Phase.THINK) & (cause != EndCause.UNFINISHED)
        self.hints.phase[slots] = np.where(ended, Phase.FORCED, phase)
        self.hints.at[slots] = position + 1
