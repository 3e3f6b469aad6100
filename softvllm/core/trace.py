"""The record of what a request was fed, and its binary format (numpy and torch only).

A trace covers every generated position: phase, kind, token id, log-prob, entropy, and for
soft steps what reproduces the fed embedding: the embedding itself (`dense`) or ids and
weights (`sparse`), from which `reconstruct` rebuilds it. No sentinels: `kind` says which
fields count. Layout in docs/wire.md.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from softvllm.core import noise
from softvllm.core.embedding import noisy_input
from softvllm.core.phases import EndCause, Phase

MAGIC = b"SVTR"
VERSION = 1
_HEAD = struct.Struct("<4sHHI")  # magic, version, reserved, bytes of the JSON header
_ALIGN = 8


class Kind(IntEnum):
    """What a position showed and fed."""

    SAMPLED = 0
    """A token drawn from a distribution (greedy included) and fed as such."""
    SOFT = 1
    """A mixture was fed; the token is the shadow."""
    FORCED = 2
    """A token put there by the phase machine: no policy decision, masked in a loss."""
    SOFT_SAMPLED = 3
    """A mixture that contains a sampled token (blend): both densities count."""


STEP = np.dtype(
    [
        ("phase", "u1"),
        ("kind", "u1"),
        ("cause", "u1"),
        ("pad", "u1"),
        ("token", "<i4"),
        ("log_prob", "<f4"),
        ("entropy", "<f4"),
    ]
)
"""One position: 16 bytes. `log_prob` counts for SAMPLED and SOFT_SAMPLED, else it is 0."""


def is_soft(kind: np.ndarray) -> np.ndarray:
    """bool [T]: positions whose input was a mixture."""
    return (kind == Kind.SOFT) | (kind == Kind.SOFT_SAMPLED)


def is_sampled(kind: np.ndarray) -> np.ndarray:
    """bool [T]: positions whose token was drawn, so that its log-prob counts."""
    return (kind == Kind.SAMPLED) | (kind == Kind.SOFT_SAMPLED)


@dataclass(slots=True)
class Trace:
    """A decoded trace. T positions, Tt think steps, Ts soft steps."""

    meta: dict[str, Any]
    """mode, policy, tau, gamma, rms, sigma (table units, the value used), seed, top_k, top_p,
    min_p, dim, dtype, vocab_size, end_cause, weight_versions [[version, start, end], ...];
    start: position of the first step, where the trace is a part of a request's (else absent)."""
    steps: np.ndarray  # STEP [T]
    top_ids: np.ndarray | None = None  # int32 [Tt, K]
    top_weights: np.ndarray | None = None  # float32 [Tt, K]
    sparse_ids: np.ndarray | None = None  # int32 [Ts, K]
    sparse_weights: np.ndarray | None = None  # float32 [Ts, K]; 0 marks an unused column
    dense: np.ndarray | None = None  # raw model dtype [Ts, d]; bfloat16 as uint16

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def token(self) -> np.ndarray:
        return self.steps["token"]

    @property
    def kind(self) -> np.ndarray:
        return self.steps["kind"]

    @property
    def phase(self) -> np.ndarray:
        return self.steps["phase"]

    @property
    def log_prob(self) -> np.ndarray:
        return self.steps["log_prob"]

    @property
    def entropy(self) -> np.ndarray:
        return self.steps["entropy"]

    @property
    def start(self) -> int:
        """Position of the first step in its request."""
        return int(self.meta.get("start", 0))

    @property
    def soft_positions(self) -> np.ndarray:
        """int64 [Ts]: steps whose input was a mixture, counted from `start`."""
        return np.flatnonzero(is_soft(self.kind))

    @property
    def end_cause(self) -> EndCause:
        return EndCause(int(self.steps["cause"][-1])) if len(self) else EndCause.UNFINISHED

    def dense_tensor(self) -> torch.Tensor:
        """The recorded embeddings [Ts, d] in the model's dtype."""
        if self.dense is None:
            raise ValueError('the trace holds no embeddings; ask for record="dense"')
        dtype = getattr(torch, self.meta["dtype"])
        raw = torch.from_numpy(np.array(self.dense))
        return raw.view(dtype)

    def summary(self) -> dict[str, Any]:
        """Counts and causes of the request, plain data for logs and JSON."""
        think = self.phase == Phase.THINK
        entropy = self.entropy[think]
        return {
            "mode": self.meta["mode"],
            "think_tokens": int(think.sum()),
            "soft_steps": int(is_soft(self.kind).sum()),
            "hard_steps": int((think & (self.kind == Kind.SAMPLED)).sum()),
            "forced_tokens": int((self.kind == Kind.FORCED).sum()),
            "answer_tokens": int((self.phase == Phase.ANSWER).sum()),
            "end_cause": self.end_cause.name.lower(),
            "mean_entropy": float(entropy.mean()) if len(entropy) else None,
            "tau": self.meta["tau"],
            "sigma": self.meta["sigma"],
            "seed": self.meta["seed"],
            "weight_version": self.meta["weight_versions"][-1][0]
            if self.meta.get("weight_versions")
            else None,
        }


def reconstruct(trace: Trace, table: torch.Tensor) -> torch.Tensor:
    """The inputs of all T positions, as fed: [T, d] in the model's dtype, table units.

    Hard positions are rows of `table`. Soft positions come from the dense record bit by bit,
    or are rebuilt from ids, weights and seed: the same float32 sum, so equal up to float32
    rounding of the sum's order (relative 1e-6), rounded once to the model's dtype.

    Args:
        table: the embedding table of the weight version that made the trace, [>= V, d].

    Raises:
        ValueError: the trace was recorded without dense or sparse inputs.
    """
    dtype = getattr(torch, trace.meta["dtype"])
    tokens = torch.from_numpy(trace.token.astype(np.int64)).to(table.device)
    out = table[tokens].to(dtype)
    at = torch.from_numpy(trace.soft_positions).to(table.device)
    if len(at) == 0:
        return out
    if trace.dense is not None:
        out[at] = trace.dense_tensor().to(table.device)
        return out
    if trace.sparse_ids is None or trace.sparse_weights is None:
        raise ValueError(
            'the trace holds no inputs to rebuild; ask for record="dense" (or "sparse" with top_k)'
        )
    ids = torch.from_numpy(trace.sparse_ids.astype(np.int64)).to(table.device)
    weights = torch.from_numpy(np.array(trace.sparse_weights)).to(table.device)
    mean = torch.einsum("tk,tkd->td", weights, table[ids].to(torch.float32))
    seed = torch.full_like(at, trace.meta["seed"])
    z = noise.gaussian(seed, at + trace.start, table.shape[1])
    sigma = step_sigma(trace)[at.cpu()].to(table.device)
    out[at] = noisy_input(mean, sigma, z, dtype)
    return out


def step_sigma(trace: Trace) -> torch.Tensor:
    """float32 [T]: the sigma of every position (it changes when weights change mid-request)."""
    sigma = torch.full((len(trace),), float(trace.meta["sigma"]))
    for value, start in trace.meta.get("sigmas", ()):
        sigma[max(int(start) - trace.start, 0) :] = float(value)
    return sigma


_ARRAYS = {
    "steps": ("step",),
    "top_ids": ("<i4",),
    "top_weights": ("<f4",),
    "sparse_ids": ("<i4",),
    "sparse_weights": ("<f4",),
    "dense": ("<u2", "<f4", "<f8"),
}
"""Arrays in file order and the element types each may have."""


def encode(trace: Trace) -> bytes:
    """Serialise: header, JSON (meta and array table), then the arrays, 8-byte aligned."""
    table, blobs, offset = [], [], 0
    for name in _ARRAYS:
        array = getattr(trace, name)
        if array is None:
            continue
        raw = np.ascontiguousarray(array).tobytes()
        dtype = "step" if name == "steps" else array.dtype.str
        table.append([name, dtype, list(array.shape), offset])
        padding = -len(raw) % _ALIGN
        blobs += [raw, b"\0" * padding]
        offset += len(raw) + padding
    header = json.dumps({"meta": trace.meta, "arrays": table}, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + _HEAD.size) % _ALIGN)
    return b"".join([_HEAD.pack(MAGIC, VERSION, 0, len(header)), header, *blobs])


def decode(blob: bytes) -> Trace:
    """The inverse of `encode`; arrays are read-only views of the bytes.

    Raises:
        ValueError: not a trace, another version, or truncated.
    """
    if len(blob) < _HEAD.size:
        raise ValueError(f"not a trace: {len(blob)} bytes are shorter than its header")
    magic, version, _, size = _HEAD.unpack_from(blob)
    if magic != MAGIC:
        raise ValueError(f"not a trace: starts with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise ValueError(f"trace format version {version}; this softvllm reads {VERSION}")
    base = _HEAD.size + size
    try:
        header = json.loads(blob[_HEAD.size : base])
        arrays = {}
        end = base
        for name, dtype, shape, offset in header["arrays"]:
            if name not in _ARRAYS:
                raise ValueError(f"unknown array {name!r}")
            if dtype not in _ARRAYS[name] or base + offset != end:
                raise ValueError(f"array {name!r} has type {dtype!r} at {offset!r}")
            if not all(isinstance(n, int) and n >= 0 for n in shape):
                raise ValueError(f"array {name!r} has shape {shape!r}")
            kind = STEP if dtype == "step" else np.dtype(dtype)
            array = np.frombuffer(blob, kind, math.prod(shape), end).reshape(shape)
            end += array.nbytes + -array.nbytes % _ALIGN
            arrays[name] = array
        if "steps" not in arrays:
            raise ValueError("it holds no steps")
        if end != len(blob):
            raise ValueError(f"{len(blob)} bytes, its arrays take {end}")
        trace = Trace(meta=header["meta"], **arrays)
        _check(trace)
        return trace
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"broken or truncated trace: {error}") from error


def _check(trace: Trace) -> None:
    """Raise ValueError where the arrays contradict each other or the format."""
    if not isinstance(trace.meta, dict):
        raise ValueError("meta is not an object")
    if trace.steps.ndim != 1:
        raise ValueError("steps is not one-dimensional")
    for name, kinds in (("phase", Phase), ("kind", Kind), ("cause", EndCause)):
        if (trace.steps[name] >= len(kinds)).any():
            raise ValueError(f"a step has {name} {int(trace.steps[name].max())}")
    think = int((trace.phase == Phase.THINK).sum())
    soft = int(is_soft(trace.kind).sum())
    for names, rows in (
        (("top_ids", "top_weights"), think),
        (("sparse_ids", "sparse_weights"), soft),
        (("dense",), soft),
    ):
        shapes = {a if a is None else a.shape for a in (getattr(trace, n) for n in names)}
        shape = shapes.pop()
        if shapes or (shape is not None and (len(shape) != 2 or shape[0] != rows)):
            raise ValueError(f"{' and '.join(names)} do not fit {rows} steps")


@dataclass(slots=True)
class TraceBuilder:
    """Collects a request's steps as they arrive; parts are raw bytes, appended, never copied
    into Python lists."""

    meta: dict[str, Any] = field(default_factory=dict)
    steps: bytearray = field(default_factory=bytearray)
    top: bytearray = field(default_factory=bytearray)  # per think step: ids then weights
    sparse: bytearray = field(default_factory=bytearray)  # per soft step: ids then weights
    dense: bytearray = field(default_factory=bytearray)  # per soft step: the embedding

    def append(self, step: bytes, top: bytes, sparse: bytes, dense: bytes) -> None:
        self.steps += step
        self.top += top
        self.sparse += sparse
        self.dense += dense

    def __len__(self) -> int:
        return len(self.steps) // STEP.itemsize

    @property
    def nbytes(self) -> int:
        return len(self.steps) + len(self.top) + len(self.sparse) + len(self.dense)

    def build(self, start: int = 0, stop: int | None = None) -> Trace:
        """The trace of positions start to stop (default: all); `meta` says where it starts."""
        steps = np.frombuffer(bytes(self.steps), STEP)
        stop = len(steps) if stop is None else stop
        think = steps["phase"] == Phase.THINK
        soft = is_soft(steps["kind"])
        meta = {**self.meta, "start": start} if start else dict(self.meta)
        trace = Trace(meta=meta, steps=steps[start:stop])
        span = slice(int(think[:start].sum()), int(think[:stop].sum()))
        trace.top_ids, trace.top_weights = _pairs(self.top, int(think.sum()), span)
        span = slice(int(soft[:start].sum()), int(soft[:stop].sum()))
        trace.sparse_ids, trace.sparse_weights = _pairs(self.sparse, int(soft.sum()), span)
        if self.dense:
            width = len(self.dense) // int(soft.sum())
            unit = {2: np.uint16, 4: np.float32, 8: np.float64}[width // self.meta["dim"]]
            part = bytes(self.dense[span.start * width : span.stop * width])
            trace.dense = np.frombuffer(part, unit).reshape(-1, self.meta["dim"])
        return trace


def _pairs(raw: bytearray, rows: int, span: slice) -> tuple[Any, Any]:
    if not raw or rows == 0:
        return None, None
    width = len(raw) // rows
    part = bytes(raw[span.start * width : span.stop * width])
    words = np.frombuffer(part, "<i4").reshape(span.stop - span.start, 2, width // 8)
    return words[:, 0], words[:, 1].copy().view("<f4")
