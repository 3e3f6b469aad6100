"""What each running request was fed, kept by the engine core until the request is done.

The one history in the engine: from here preempted requests are replayed, and from here each
step's part of the trace goes to the front end. A stale or dropped step (async scheduling after
a preemption) is never accepted, so the ledger always agrees with the scheduler's token list.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softvllm.core import policies
from softvllm.core.phases import Phase
from softvllm.core.resolve import ResolvedCoT
from softvllm.core.trace import STEP, Kind, TraceBuilder, is_soft
from softvllm.engine.records import HostRecord
from softvllm.engine.replay import Replay, next_phase

Delta = dict[str, Any]
"""One accepted position for the front end: step, top, sparse, dense (bytes), sigma, and for the
first position the facts that do not change."""


class Ledger:
    """History of one request. Dense soft inputs are always kept: a replay must be exact even
    if the weights, and with them any rebuilt mixture, changed in between."""

    def __init__(self, cot: ResolvedCoT) -> None:
        self.cot = cot
        self.builder = TraceBuilder()
        self.dtype = "float32"
        self.policy_state = np.zeros(policies.NUM_STATES, np.float32)
        self.pending_phase: Phase | None = None
        """Phase of the position the scheduler is processing right now."""
        self.answer_start: int | None = None
        self._next = Phase.THINK
        if cot.max_think == 0:
            self._next = Phase.FORCED if cot.after_cut else Phase.ANSWER
        self._forced = 0

    @property
    def nbytes(self) -> int:
        return self.builder.nbytes

    def next_phase(self) -> Phase:
        """Phase of the next position, as far as the accepted ones tell."""
        return self._next

    def accept(self, record: HostRecord, row: int, think_row: int | None) -> Delta:
        """Append one position and return its part of the trace.

        Args:
            record: the step's arrays.
            row: our row in the R-row arrays.
            think_row: our row in the think-only arrays, or None.
        """
        phase, kind, cause = record.columns[row]
        step = record.raw_steps[row * STEP.itemsize : (row + 1) * STEP.itemsize]
        soft = kind in (Kind.SOFT, Kind.SOFT_SAMPLED)
        dense = top = sparse = b""
        if soft:
            assert record.fed is not None and think_row is not None
            dense = record.fed[think_row].tobytes()
        if phase == Phase.THINK and self.cot.record == "top":
            assert record.top_ids is not None and record.top_probs is not None
            top = _pair(record.top_ids[think_row], record.top_probs[think_row], self.cot.record_top)
        if soft and self.cot.record == "sparse":
            assert record.sparse_ids is not None and record.sparse_weights is not None
            width = self.cot.top_k + self.cot.num_extra
            sparse = _pair(record.sparse_ids[think_row], record.sparse_weights[think_row], width)
        first = not len(self.builder)
        self.builder.append(step, b"", b"", dense)
        self._forced += int(phase == Phase.FORCED)
        self._next = next_phase(self.cot, cause, self._forced)
        self.policy_state = record.policy_state[row].copy()
        self.dtype = record.dtype
        if phase == Phase.ANSWER and self.answer_start is None:
            self.answer_start = len(self.builder) - 1
        delta: Delta = {
            "step": step,
            "top": top,
            "sparse": sparse,
            "dense": dense if self.cot.record == "dense" else b"",
            "sigma": record.sigma[row],
        }
        if first:
            delta["facts"] = {
                "rms": record.rms,
                "dtype": record.dtype,
                "dim": record.dim,
                "vocab_size": record.vocab_size,
                "dropped_mass": record.dropped_mass,
            }
        return delta

    def replay(self) -> Replay:
        """Everything accepted so far, for the workers that recompute this request."""
        steps = np.frombuffer(bytes(self.builder.steps), STEP)
        soft = int(is_soft(steps["kind"]).sum())
        unit: Any = np.float32 if self.dtype == "float32" else np.uint16
        dense = np.frombuffer(bytes(self.builder.dense), unit).reshape(soft, -1 if soft else 0)
        return Replay(steps, dense, self.dtype, self.policy_state)


def _pair(ids: np.ndarray, weights: np.ndarray, width: int) -> bytes:
    """Ids then weights of one row, padded to the request's own width (weight 0 = unused)."""
    out_ids = np.zeros(width, "<i4")
    out_weights = np.zeros(width, "<f4")
    n = min(width, len(ids))
    out_ids[:n], out_weights[:n] = ids[:n], weights[:n]
    return out_ids.tobytes() + out_weights.tobytes()
