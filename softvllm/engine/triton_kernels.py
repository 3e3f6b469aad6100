"""Triton kernels for CUDA. Each names its plain-torch reference; tests run them interpreted."""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

from softvllm.engine.overlay import OverlayBuffers


@triton.jit
def _overlay_kernel(
    out_ptr, out_stride, row_source_ptr, fed_ptr, fed_stride, is_soft_ptr, dim, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    source = tl.load(row_source_ptr + row).to(tl.int64)
    if source < 0:
        return
    if tl.load(is_soft_ptr + source) == 0:
        return
    for start in range(0, dim, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        mask = offset < dim
        value = tl.load(fed_ptr + source * fed_stride + offset, mask=mask)
        tl.store(out_ptr + row.to(tl.int64) * out_stride + offset, value, mask=mask)


def overlay(out: torch.Tensor, buffers: OverlayBuffers) -> None:
    """Reference: `overlay.overlay_reference`. Rows that are not soft cost one load."""
    dim = out.shape[1]
    _overlay_kernel[(out.shape[0],)](
        out,
        out.stride(0),
        buffers.row_source,
        buffers.fed,
        buffers.fed.stride(0),
        buffers.is_soft,
        dim,
        BLOCK=min(1024, triton.next_power_of_2(dim)),
    )
