"""What a preempted request needs to be recomputed exactly: its steps and soft inputs.

The engine core keeps this record for every running request (`ledger.py`) and hands it to the
workers with the step that resumes the request. Workers keep no history of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from softvllm.core.phases import EndCause, Phase
from softvllm.core.resolve import ResolvedCoT
from softvllm.core.trace import is_soft


@dataclass(slots=True)
class Replay:
    """Positions 0 to T - 1 of a request, as fed before the preemption."""

    steps: np.ndarray  # STEP [T]
    dense: np.ndarray  # raw dtype [Ts, d]; bfloat16 and float16 as uint16
    dtype: str
    policy_state: np.ndarray  # float32 [NUM_STATES]

    def __len__(self) -> int:
        return len(self.steps)

    def soft_rows(self, start: int, stop: int) -> tuple[np.ndarray, torch.Tensor]:
        """Soft positions in [start, stop) and their embeddings: int64 [n], dtype [n, d]."""
        soft = is_soft(self.steps["kind"])
        at = start + np.flatnonzero(soft[start:stop])
        first = int(soft[:start].sum())
        raw = np.array(self.dense[first : first + len(at)])
        return at, torch.from_numpy(raw).view(getattr(torch, self.dtype))


def next_phase(cot: ResolvedCoT, cause: int, forced: int) -> Phase:
    """Phase of the next position, as `phases.restore` sets it.

    Args:
        cause: `EndCause` of the last position.
        forced: forced positions so far.
    """
    if cause == EndCause.UNFINISHED:
        return Phase.THINK
    length = len(cot.after_end if cause == EndCause.END_SEQUENCE else cot.after_cut)
    return Phase.FORCED if forced < length else Phase.ANSWER
