"""Triton kernels for CUDA. Each names its plain-torch reference; tests run them interpreted."""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton

from softvllm.core import noise
from softvllm.engine.overlay import OverlayBuffers

_M0 = tl.constexpr(noise._M0)
_M1 = tl.constexpr(noise._M1)
_W0 = tl.constexpr(noise._W0)
_W1 = tl.constexpr(noise._W1)
_TAG = tl.constexpr(noise._TAG)
_TWO_PI = tl.constexpr(noise.TWO_PI_32)
_TWO_M32 = tl.constexpr(2.0**-32)
_TWO_M52 = tl.constexpr(2.0**-52)

_MAX_COUNTERS = 256
"""Philox counters per program; each gives four coordinates."""


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
    rows, dim = min(out.shape[0], buffers.row_source.shape[0]), out.shape[1]
    _overlay_kernel[(rows,)](
        out,
        out.stride(0),
        buffers.row_source,
        buffers.fed,
        buffers.fed.stride(0),
        buffers.is_soft,
        dim,
        BLOCK=min(1024, triton.next_power_of_2(dim)),
    )


@triton.jit
def _box_muller(a, b):
    radius = tl.sqrt(-2.0 * tl.log((a.to(tl.float64) + 1.0) * _TWO_M32))
    angle = b.to(tl.float64) * _TWO_PI
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _philox(c0, c1, c2, seed):
    """Ten rounds of Philox4x32 for counters uint32 [N] and one or N seeds int64."""
    c3 = tl.zeros_like(c0) + tl.full((), _TAG, tl.uint32)
    k0 = tl.zeros_like(c0) + seed.to(tl.uint32)
    k1 = tl.zeros_like(c0) + (seed >> 32).to(tl.uint32)
    m0, m1 = tl.full((), _M0, tl.uint32), tl.full((), _M1, tl.uint32)
    w0, w1 = tl.full((), _W0, tl.uint32), tl.full((), _W1, tl.uint32)
    for _ in tl.static_range(10):
        hi0, lo0 = tl.umulhi(c0, m0), c0 * m0
        hi1, lo1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit
def _normals(seed, position, stream, block, COUNTERS: tl.constexpr):
    """Coordinates 4 * COUNTERS * block and following of one row: float32 [4 * COUNTERS]."""
    c0 = (block * COUNTERS + tl.arange(0, COUNTERS)).to(tl.uint32)
    c1 = tl.zeros_like(c0) + position.to(tl.uint32)
    c2 = (tl.zeros_like(c0) + stream).to(tl.uint32)
    c0, c1, c2, c3 = _philox(c0, c1, c2, seed)
    z0, z1 = _box_muller(c0, c1)
    z2, z3 = _box_muller(c2, c3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3)).to(tl.float32)


@triton.jit
def _uniform_kernel(seed_ptr, position_ptr, out_ptr, count, stream, index, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < count
    seed = tl.load(seed_ptr + offset, mask=mask, other=0)
    c1 = tl.load(position_ptr + offset, mask=mask, other=0).to(tl.uint32)
    # Arguments equal to 1 are compile-time numbers without .to(): cast after the addition.
    c0 = (tl.zeros_like(c1) + index).to(tl.uint32)
    c2 = (tl.zeros_like(c1) + stream).to(tl.uint32)
    x0, x1, _, _ = _philox(c0, c1, c2, seed)
    word = (x0.to(tl.int64) << 20) | (x1.to(tl.int64) >> 12)
    tl.store(out_ptr + offset, (word.to(tl.float64) + 0.5) * _TWO_M52, mask=mask)


@triton.jit
def _gaussian_kernel(seed_ptr, position_ptr, stream, out_ptr, dim, COUNTERS: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z = _normals(tl.load(seed_ptr + row), tl.load(position_ptr + row), stream, block, COUNTERS)
    offset = block * 4 * COUNTERS + tl.arange(0, 4 * COUNTERS)
    tl.store(out_ptr + row * dim + offset, z, mask=offset < dim)


@triton.jit
def _noisy_inputs_kernel(
    mean_ptr,
    mean_stride,
    sigma_ptr,
    seed_ptr,
    position_ptr,
    slot_ptr,
    fed_ptr,
    fed_stride,
    out_ptr,
    dim,
    STREAM: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offset = block * 4 * COUNTERS + tl.arange(0, 4 * COUNTERS)
    mask = offset < dim
    value = tl.load(mean_ptr + row * mean_stride + offset, mask=mask, other=0.0)
    sigma = tl.load(sigma_ptr + row)
    if sigma != 0.0:
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
        stream = tl.full((), STREAM, tl.uint32)
        value += sigma * _normals(seed, position, stream, block, COUNTERS)
    value = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * dim + offset, value, mask=mask)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    tl.store(fed_ptr + slot * fed_stride + offset, value, mask=mask)


def _grid(rows: int, dim: int) -> tuple[tuple[int, int], int]:
    """Programs, and Philox counters per program: enough programs to fill a GPU at few rows."""
    counters = min(_MAX_COUNTERS, triton.next_power_of_2(triton.cdiv(dim, 4)))
    return (rows, triton.cdiv(dim, 4 * counters)), counters


def gaussian(
    seed: torch.Tensor, position: torch.Tensor, dim: int, stream: int = noise.NOISE
) -> torch.Tensor:
    """float32 [B, d] for seed, position int64 [B]; reference: `noise.gaussian`."""
    out = torch.empty(seed.shape[0], dim, dtype=torch.float32, device=seed.device)
    grid, counters = _grid(seed.shape[0], dim)
    _gaussian_kernel[grid](
        seed.contiguous(), position.contiguous(), stream, out, dim, COUNTERS=counters
    )
    return out


def uniform(
    seed: torch.Tensor, position: torch.Tensor, stream: int = noise.SAMPLE, index: int = 0
) -> torch.Tensor:
    """float64 [B] for seed, position int64 [B]; reference: `noise.uniform`."""
    count = seed.shape[0]
    out = torch.empty(count, dtype=torch.float64, device=seed.device)
    _uniform_kernel[(triton.cdiv(count, 128),)](
        seed.contiguous(), position.contiguous(), out, count, stream, index, BLOCK=128
    )
    return out


def noisy_inputs(
    mean: torch.Tensor,
    sigma: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    fed: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """fed[slots[b]] = (mean[b] + sigma[b] z).to(dtype) in one launch.

    Reference: `embedding.noisy_input` of `noise.gaussian`, then an index write. Without fused
    multiply-add, so that product and sum are rounded one by one, as there.

    Args:
        mean: float32 [B, d], unit stride along d.
        sigma: float32 [B].
        seeds, positions, slots: int64 [B].
        fed: model dtype [S, d], unit stride along d; written in place.

    Returns:
        The rows written, [B, d] of their own: a record may read them while the next step
        overwrites `fed`.
    """
    rows, dim = mean.shape
    out = torch.empty(rows, dim, dtype=fed.dtype, device=mean.device)
    grid, counters = _grid(rows, dim)
    _noisy_inputs_kernel[grid](
        mean,
        mean.stride(0),
        sigma.contiguous(),
        seeds.contiguous(),
        positions.contiguous(),
        slots.contiguous(),
        fed,
        fed.stride(0),
        out,
        dim,
        STREAM=noise.NOISE,
        COUNTERS=counters,
        enable_fp_fusion=False,
    )
    return out
