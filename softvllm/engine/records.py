"""What a sampling step reports to the engine core: compact arrays, copied without a sync."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from softvllm.core.trace import STEP

if TYPE_CHECKING:
    from softvllm.engine.finish import Finished
    from softvllm.engine.step import Step


@dataclass
class HostRecord:
    """One step of R requests in host memory; travels from worker to engine core.

    `think` maps rows of the think-only arrays to rows 0..R-1.
    """

    req_ids: list[str]
    steps: np.ndarray  # STEP [R]
    position: np.ndarray  # int64 [R]
    sigma: list[float]
    rms: float
    dtype: str
    dim: int
    vocab_size: int
    dropped_mass: float
    policy_state: np.ndarray  # float32 [R, NUM_STATES]
    think: np.ndarray  # int64 [Rt]
    fed: np.ndarray | None = None  # raw dtype [Rt, d]
    top_ids: np.ndarray | None = None  # int32 [Rt, K]
    top_probs: np.ndarray | None = None
    sparse_ids: np.ndarray | None = None
    sparse_weights: np.ndarray | None = None

    @cached_property
    def raw_steps(self) -> bytes:
        """`steps` as bytes: slicing these is ten times faster than numpy's structured rows."""
        return self.steps.tobytes()

    @cached_property
    def columns(self) -> list[tuple[int, int, int]]:
        """(phase, kind, cause) of each row as plain integers."""
        steps = self.steps
        return list(zip(steps["phase"].tolist(), steps["kind"].tolist(), steps["cause"].tolist()))


class StepRecord:
    """A step's record while it may still be on the device.

    Small columns are packed into one integer and one float matrix, so that a CUDA copy is a
    handful of transfers on the output stream.
    """

    __slots__ = (
        "arrays",
        "core",
        "device_arrays",
        "position",
        "requests",
        "rms",
        "sigma",
        "slots",
        "think",
    )

    def __init__(self, step: Step, arrays: dict[str, torch.Tensor]) -> None:
        self.arrays = arrays
        self.device_arrays: dict[str, torch.Tensor] = {}
        self.core = step.core
        self.requests = step.requests
        # As of this step: weights, and sigma with them, may change before the copies complete.
        self.sigma = [request.sigma for request in step.requests]
        self.rms = step.core.table.rms()
        self.position = step.position_np
        self.slots = step.slots_np
        self.think = step.think_np

    @classmethod
    def of(cls, step: Step, done: Finished, fed: torch.Tensor | None) -> StepRecord:
        arrays = {"ints": done.ints, "floats": done.floats, "policy_state": done.policy_state}
        if fed is not None:
            arrays["fed"] = fed
        if step.think is not None:
            for name in ("top_ids", "top_probs", "sparse_ids", "sparse_weights"):
                value = getattr(step.think, name)
                if value is not None:
                    arrays[name] = value.to(torch.int32) if name.endswith("ids") else value
        return cls(step, arrays)

    def copy_to_host(self) -> None:
        """Start the copies on the current stream (pinned memory); CPU arrays stay."""
        self.device_arrays = self.arrays  # must outlive the copies: they run on another stream
        self.arrays = {
            name: value.to("cpu", non_blocking=True) if value.device.type != "cpu" else value
            for name, value in self.arrays.items()
        }

    def to_host(self) -> HostRecord:
        """Assemble the record; call once the copies have completed."""
        self.device_arrays = {}
        ints, floats = self.arrays["ints"].numpy(), self.arrays["floats"].numpy()
        steps = np.zeros(len(self.requests), STEP)
        steps["phase"], steps["kind"], steps["cause"], steps["token"] = ints
        steps["log_prob"], steps["entropy"] = floats
        core = self.core
        # Other ranks do not see results, and all ranks must split rows alike (they all reduce).
        if not core.ops.exact_host and core.table.tp_size == 1:
            same = np.array([core.by_slot[r.slot] is r for r in self.requests])
            core.observe(
                self.slots[same],
                self.position[same],
                steps["phase"][same],
                steps["cause"][same],
            )
        extra: dict[str, Any] = {}
        for name in ("top_ids", "top_probs", "sparse_ids", "sparse_weights"):
            if name in self.arrays:
                extra[name] = self.arrays[name].numpy()
        fed = self.arrays.get("fed")
        return HostRecord(
            req_ids=[r.req_id for r in self.requests],
            steps=steps,
            position=self.position,
            sigma=self.sigma,
            rms=self.rms,
            dtype=str(core.table.dtype).removeprefix("torch."),
            dim=core.table.dim,
            vocab_size=core.vocab_size,
            dropped_mass=core.table.dropped_mass,
            policy_state=self.arrays["policy_state"].numpy(),
            think=self.think,
            fed=None if fed is None else raw_numpy(fed),
            **extra,
        )


def raw_numpy(value: torch.Tensor) -> np.ndarray:
    """A tensor as numpy; two-byte floats as uint16, which numpy can hold."""
    if value.dtype in (torch.bfloat16, torch.float16):
        return value.view(torch.uint16).numpy()
    return value.numpy()
