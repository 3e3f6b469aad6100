"""Writing soft inputs over looked-up embeddings, as one custom op inside the model's graph.

The op reads static buffers, so it is captured by CUDA graphs and replayed with whatever the
buffers hold then. `row_source[i]` says where input row i comes from: -1 for the token's own
embedding, else a row of `fed`, taken only if `is_soft` of that row is set. `is_soft` is
written by the sampling step on the device, so under async scheduling the host need not know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class OverlayBuffers:
    """Static device buffers of one worker. S slots, N rows of a batch at most."""

    row_source: torch.Tensor  # int32 [N]
    fed: torch.Tensor  # model dtype [S + R, d]: last soft input per slot, then replayed rows
    is_soft: torch.Tensor  # bool [S + R]
    active: bool = False
    """Host knowledge: some row of this batch may be soft. Only the CPU path may use it, a
    captured graph must always look at the buffers."""


_BUFFERS: dict[int, OverlayBuffers] = {}
_registered = False


def bind(key: int, buffers: OverlayBuffers) -> None:
    """Make the buffers reachable from the op; `key` is baked into the graph."""
    _BUFFERS[key] = buffers


def unbind(key: int) -> None:
    _BUFFERS.pop(key, None)


def overlay_reference(out: torch.Tensor, buffers: OverlayBuffers) -> None:
    """Plain torch, in place on out [n, d]; rows beyond the buffers (profiling) stay."""
    rows = buffers.row_source[: out.shape[0]].to(torch.int64)
    source = rows.clamp(min=0)
    soft = (rows >= 0) & buffers.is_soft[source]
    out.copy_(torch.where(soft[:, None], buffers.fed[source], out))


def _overlay_cpu(out: torch.Tensor, key: int) -> None:
    buffers = _BUFFERS.get(key)
    if buffers is None or not buffers.active:
        return
    overlay_reference(out, buffers)


def _overlay_cuda(out: torch.Tensor, key: int) -> None:
    buffers = _BUFFERS.get(key)
    if buffers is None:
        return
    from softvllm.engine import triton_kernels

    triton_kernels.overlay(out, buffers)


def _overlay_fake(out: torch.Tensor, key: int) -> None:
    return None


def register() -> None:
    """Define torch.ops.softvllm.overlay once per process."""
    global _registered
    if _registered:
        return
    library = torch.library.Library("softvllm", "FRAGMENT")
    library.define("overlay(Tensor(a!) out, int key) -> ()")
    library.impl("overlay", _overlay_cpu, "CPU")
    library.impl("overlay", _overlay_cuda, "CUDA")
    torch.library.register_fake("softvllm::overlay", _overlay_fake, lib=library)
    globals()["_library"] = library  # a Library unregisters its ops when collected
    _registered = True
