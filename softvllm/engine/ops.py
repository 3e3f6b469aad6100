"""Which code does the step's small work: compiled CPU loops, or Triton kernels on CUDA.

Both sets compute the same values; `softvllm.core` holds their plain-torch references.
"""

from __future__ import annotations

from typing import Protocol

import torch

from softvllm.core import mixture
from softvllm.core.embedding import noisy_input
from softvllm.core.mixture import Reading, Support
from softvllm.engine import cpu_kernels, cpu_reading, finish
from softvllm.engine.finish import Finished, FinishInputs


class Ops(Protocol):
    """What differs between devices."""

    exact_host: bool
    """Whether device state can be read without waiting (it lives in host memory)."""

    def uniform(
        self, seed: torch.Tensor, position: torch.Tensor, stream: int, index: int
    ) -> torch.Tensor:
        """`noise.uniform`."""

    def read(self, logits: torch.Tensor, support: Support) -> Reading:
        """`mixture.read`."""

    def feed(
        self,
        mean: torch.Tensor,
        sigma: torch.Tensor,
        seeds: torch.Tensor,
        position: torch.Tensor,
        fed: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Write fed[slots] = (mean + sigma z) rounded; return these rows, [B, d]."""

    def finish(self, x: FinishInputs) -> Finished:
        """`finish.finish`."""


class HostOps:
    """CPU: numba and torch."""

    exact_host = True

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def uniform(
        self, seed: torch.Tensor, position: torch.Tensor, stream: int, index: int
    ) -> torch.Tensor:
        return cpu_kernels.uniform(seed, position, stream, index)

    def read(self, logits: torch.Tensor, support: Support) -> Reading:
        if not cpu_reading.handles(logits, support):
            return mixture.read(logits, support)
        rows, columns = logits.shape
        if support.top_k is None and self._scratch.numel() < rows * columns:
            # Kept from step to step: fresh megabytes cost more in page faults than the softmax.
            self._scratch = torch.empty(rows * columns)
        return cpu_reading.read(logits, support, self._scratch[: rows * columns])

    def feed(
        self,
        mean: torch.Tensor,
        sigma: torch.Tensor,
        seeds: torch.Tensor,
        position: torch.Tensor,
        fed: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        rows = mean.to(fed.dtype)
        if bool((sigma != 0).any()):
            z = cpu_kernels.gaussian(seeds, position, mean.shape[1])
            rows = noisy_input(mean, sigma, z, fed.dtype)
        fed[slots] = rows
        return rows

    def finish(self, x: FinishInputs) -> Finished:
        return finish.finish(x)


class DeviceOps:
    """CUDA: Triton, no host decision that needs device values."""

    exact_host = False

    def uniform(
        self, seed: torch.Tensor, position: torch.Tensor, stream: int, index: int
    ) -> torch.Tensor:
        from softvllm.engine import triton_kernels

        return triton_kernels.uniform(seed, position, stream, index)

    def read(self, logits: torch.Tensor, support: Support) -> Reading:
        return mixture.read(logits, support)

    def feed(
        self,
        mean: torch.Tensor,
        sigma: torch.Tensor,
        seeds: torch.Tensor,
        position: torch.Tensor,
        fed: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        from softvllm.engine import triton_kernels

        return triton_kernels.noisy_inputs(mean, sigma, seeds, position, fed, slots)

    def finish(self, x: FinishInputs) -> Finished:
        from softvllm.engine import triton_finish

        return triton_finish.finish(x)


def for_device(device: torch.device) -> Ops:
    return HostOps() if device.type == "cpu" else DeviceOps()
