"""The trace format: what goes in comes out, and nothing broken is taken for a trace."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softvllm.core import noise
from softvllm.core.embedding import noise_sigma, noisy_input
from softvllm.core.phases import EndCause, Phase
from softvllm.core.trace import (
    MAGIC,
    STEP,
    VERSION,
    Kind,
    Trace,
    TraceBuilder,
    decode,
    encode,
    is_sampled,
    is_soft,
    reconstruct,
    step_sigma,
)

fast = settings(max_examples=50, deadline=None)  # a deadline would only measure load

ARRAYS = ("steps", "top_ids", "top_weights", "sparse_ids", "sparse_weights", "dense")
DTYPES = ["bfloat16", "float16", "float32"]
VOCAB, DIM = 61, 12


def meta(**changes: Any) -> dict[str, Any]:
    facts = {
        "mode": "soft",
        "policy": "soft",
        "tau": 0.5,
        "gamma": 0.33,
        "rms": 0.04,
        "sigma": noise_sigma(0.33, 0.04),
        "seed": 2**53 - 1,
        "dim": DIM,
        "dtype": "float32",
        "vocab_size": VOCAB,
        "weight_versions": [["v1", 0, 3]],
    }
    return facts | changes


def raw(rows: torch.Tensor) -> np.ndarray:
    """As recorded: two-byte floats as uint16."""
    return (rows.view(torch.uint16) if rows.element_size() == 2 else rows).numpy()


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Think, forced and answer positions with any kinds, tokens and numbers."""
    think, forced, answer = (draw(st.integers(0, 6)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = think + forced + answer
    steps = np.zeros(count, STEP)
    steps["phase"] = [Phase.THINK] * think + [Phase.FORCED] * forced + [Phase.ANSWER] * answer
    kinds = [draw(st.sampled_from([Kind.SAMPLED, Kind.SOFT, Kind.SOFT_SAMPLED]))] * think
    steps["kind"] = kinds + [Kind.FORCED] * forced + [Kind.SAMPLED] * answer
    steps["cause"][think:] = draw(st.integers(1, 4))
    steps["token"] = draw(
        st.lists(st.sampled_from([0, 1, VOCAB - 1, 2**31 - 1]), min_size=count, max_size=count)
    )
    steps["log_prob"], steps["entropy"] = rng.normal(size=(2, count))
    steps["entropy"][rng.random(count) < 0.2] = np.nan
    soft = int(is_soft(steps["kind"]).sum())
    trace = Trace(meta(seed=draw(st.integers(0, 2**53 - 1))), steps)
    if draw(st.booleans()):
        width = draw(st.integers(1, 8))
        trace.top_ids = rng.integers(0, 2**31, (think, width)).astype("<i4")
        trace.top_weights = rng.random((think, width)).astype("<f4")
    if draw(st.booleans()):
        width = draw(st.integers(1, 5))
        trace.sparse_ids = rng.integers(0, 2**31, (soft, width)).astype("<i4")
        trace.sparse_weights = rng.random((soft, width)).astype("<f4")
    if draw(st.booleans()):
        trace.meta["dtype"] = draw(st.sampled_from(DTYPES))
        unit = np.float32 if trace.meta["dtype"] == "float32" else np.uint16
        trace.dense = rng.integers(0, 256, (soft, DIM * unit().itemsize)).astype("u1").view(unit)
    return trace


def assert_same(a: Trace, b: Trace) -> None:
    assert a.meta == b.meta
    for name in ARRAYS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), name


# ---- the format ------------------------------------------------------------------------------


@fast
@given(trace=traces())
def test_decoding_gives_back_what_was_encoded(trace):
    blob = encode(trace)
    again = decode(blob)
    assert_same(again, trace)
    assert encode(again) == blob
    for name in ARRAYS:
        array = getattr(again, name)
        if array is not None:
            assert isinstance(array, np.ndarray) and not array.flags.writeable
            assert not array.size or array.ctypes.data % array.dtype.alignment == 0


def test_arrays_start_at_multiples_of_eight_bytes():
    trace = Trace(meta(), np.zeros(3, STEP))
    trace.steps["kind"] = Kind.SOFT
    trace.steps["phase"] = Phase.THINK
    trace.sparse_ids, trace.sparse_weights = np.ones((3, 3), "<i4"), np.ones((3, 3), "<f4")
    trace.dense = np.ones((3, 5), np.uint16)
    trace.meta["dim"] = 5
    for padding in range(8):  # whatever the length of the header
        trace.meta["note"] = "x" * padding
        blob = encode(trace)
        size = struct.unpack_from("<4sHHI", blob)[3]
        header = json.loads(blob[12 : 12 + size])
        assert len(blob) % 8 == 0 and (12 + size) % 8 == 0
        assert all(offset % 8 == 0 for *_, offset in header["arrays"])


def test_a_step_takes_16_bytes_and_the_header_names_the_version():
    assert STEP.itemsize == 16
    blob = encode(Trace(meta(), np.zeros(2, STEP)))
    assert blob[:4] == MAGIC == b"SVTR"
    assert struct.unpack_from("<H", blob, 4)[0] == VERSION


def test_the_file_layout_does_not_change():
    """A trace written by version 1, byte by byte."""
    steps = np.array([(1, 1, 1, 0, 7, 0.0, 0.5)], STEP)
    header = b'{"meta":{"seed":5},"arrays":[["steps","step",[1],0]]}'
    header += b" " * (-(12 + len(header)) % 8)
    written = b"SVTR\x01\x00\x00\x00" + struct.pack("<I", len(header)) + header
    written += struct.pack("<BBBBiff", 1, 1, 1, 0, 7, 0.0, 0.5)
    assert encode(Trace({"seed": 5}, steps)) == written
    assert_same(decode(written), Trace({"seed": 5}, steps))


@given(trace=traces(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_truncated_trace_is_refused(trace, data):
    blob = encode(trace)
    cut = data.draw(st.integers(0, len(blob) - 1))
    with pytest.raises(ValueError, match="trace"):
        decode(blob[:cut])


def test_trailing_bytes_are_refused():
    with pytest.raises(ValueError, match="broken or truncated trace"):
        decode(encode(Trace(meta(), np.zeros(1, STEP))) + b"\0" * 8)


@fast
@given(junk=st.binary(max_size=200))
def test_anything_else_is_refused(junk):
    with pytest.raises(ValueError, match="trace"):
        decode(junk)
    with pytest.raises(ValueError, match="trace"):
        decode(b"SVTR\x01\x00\x00\x00" + junk)


@given(trace=traces(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_garbled_byte_gives_a_trace_or_a_value_error_and_nothing_else(trace, data):
    blob = bytearray(encode(trace))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] = data.draw(st.integers(0, 255))
    try:
        got = decode(bytes(blob))
    except ValueError as error:
        assert "trace" in str(error)
    else:
        got.kind, got.phase, got.end_cause, got.soft_positions  # noqa: B018


@pytest.mark.parametrize("version", [0, VERSION + 1, 65535])
def test_another_version_is_refused_by_name(version):
    blob = bytearray(encode(Trace(meta(), np.zeros(1, STEP))))
    struct.pack_into("<H", blob, 4, version)
    with pytest.raises(ValueError, match=rf"version {version}; this softvllm reads {VERSION}"):
        decode(bytes(blob))


def with_header(header: Any, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<4sHHI", MAGIC, VERSION, 0, len(text)) + text + body


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ([], "no steps"),
        ([["steps", "step", [1], 0], ["loot", "<i4", [1], 16]], "unknown array 'loot'"),
        ([["steps", "step", [-1], 0]], "shape"),
        ([["steps", "step", [2.0], 0]], "shape"),
        ([["steps", "step", ["a"], 0]], "shape"),
        ([["steps", "step", [2**70], 0]], "trace"),
        ([["steps", "step", [1], -16]], "at -16"),
        ([["steps", "step", [1], "0"]], "trace"),
        ([["steps", "<i4", [4], 0]], "type '<i4'"),
        ([["steps", "|O", [2], 0]], "type"),
        ([["steps", ["step"], [1], 0]], "type"),
        ([["steps", "step", [1, 1], 0]], "one-dimensional"),
        ([["steps", "step", [1], 0, 0]], "trace"),
        ("steps", "trace"),
        (None, "trace"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(arrays, words):
    with pytest.raises(ValueError, match="broken or truncated trace") as caught:
        decode(with_header({"meta": {}, "arrays": arrays}, b"\0" * 16))
    assert words in str(caught.value)


@pytest.mark.parametrize("header", [[], 7, "x", {"arrays": []}, {"meta": 1, "arrays": []}])
def test_a_header_of_another_shape_is_refused(header):
    with pytest.raises(ValueError, match="broken or truncated trace"):
        decode(with_header(header))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_ids": np.zeros((2, 3), "<i4")}, "top_ids and top_weights"),
        (
            {"top_ids": np.zeros((2, 3), "<i4"), "top_weights": np.zeros((2, 4), "<f4")},
            "top_ids and top_weights",
        ),
        (
            {"sparse_ids": np.zeros((2, 3), "<i4"), "sparse_weights": np.zeros((2, 3), "<f4")},
            "sparse_ids and sparse_weights do not fit 1",
        ),
        ({"dense": np.zeros((3, DIM), "<f4")}, "dense do not fit 1"),
        ({"dense": np.zeros(DIM, "<f4")}, "dense do not fit 1"),
    ],
)
def test_arrays_that_do_not_fit_the_steps_are_refused(changes, words):
    steps = np.zeros(2, STEP)
    steps["phase"] = Phase.THINK
    steps["kind"] = [Kind.SOFT, Kind.SAMPLED]
    with pytest.raises(ValueError, match=words):
        decode(encode(dataclasses.replace(Trace(meta(), steps), **changes)))


@pytest.mark.parametrize("name", ["phase", "kind", "cause"])
def test_a_kind_nobody_knows_is_refused(name):
    steps = np.zeros(2, STEP)
    steps[name][1] = 9
    with pytest.raises(ValueError, match=f"a step has {name} 9"):
        decode(encode(Trace(meta(), steps)))


# ---- what a trace says -----------------------------------------------------------------------


def test_kinds_are_explicit_and_token_0_means_token_0():
    """No sentinel anywhere: all-zero fields differ by their kind alone."""
    steps = np.zeros(4, STEP)
    steps["kind"] = [Kind.SAMPLED, Kind.SOFT, Kind.FORCED, Kind.SOFT_SAMPLED]
    trace = decode(encode(Trace(meta(), steps)))
    assert trace.token.tolist() == [0, 0, 0, 0]
    assert is_soft(trace.kind).tolist() == [False, True, False, True]
    assert is_sampled(trace.kind).tolist() == [True, False, False, True]
    assert trace.soft_positions.tolist() == [1, 3]
    table = torch.arange(VOCAB * DIM).float().view(VOCAB, DIM)
    hard = Trace(meta(), steps[[0, 2]])
    assert torch.equal(reconstruct(hard, table), table[[0, 0]])


def test_the_summary_counts_every_kind():
    steps = np.zeros(8, STEP)
    steps["phase"] = [Phase.THINK] * 4 + [Phase.FORCED] * 2 + [Phase.ANSWER] * 2
    steps["kind"][:4] = [Kind.SOFT, Kind.SAMPLED, Kind.SOFT_SAMPLED, Kind.SOFT]
    steps["kind"][4:6] = Kind.FORCED
    steps["cause"][3:] = EndCause.COLD_STOP
    steps["entropy"][:4] = [1.0, 2.0, 3.0, 4.0]
    trace = Trace(meta(weight_versions=[["v1", 0, 3], ["v2", 3, 8]]), steps)
    assert trace.summary() == {
        "mode": "soft",
        "think_tokens": 4,
        "soft_steps": 3,
        "hard_steps": 1,
        "forced_tokens": 2,
        "answer_tokens": 2,
        "end_cause": "cold_stop",
        "mean_entropy": 2.5,
        "tau": 0.5,
        "sigma": meta()["sigma"],
        "seed": 2**53 - 1,
        "weight_version": "v2",
    }
    json.dumps(trace.summary())
    empty = Trace(meta(weight_versions=[]), np.zeros(0, STEP))
    assert empty.end_cause is EndCause.UNFINISHED
    assert empty.summary()["mean_entropy"] is None and empty.summary()["weight_version"] is None


# ---- collecting ------------------------------------------------------------------------------


def feed(builder: TraceBuilder, trace: Trace) -> None:
    """Hand a trace over position by position, as the engine does."""
    think = soft = 0
    for step in trace.steps:
        top = sparse = dense = b""
        if step["phase"] == Phase.THINK:
            if trace.top_ids is not None and trace.top_weights is not None:
                top = trace.top_ids[think].tobytes() + trace.top_weights[think].tobytes()
            think += 1
        if is_soft(step["kind"]):
            if trace.sparse_ids is not None and trace.sparse_weights is not None:
                sparse = trace.sparse_ids[soft].tobytes() + trace.sparse_weights[soft].tobytes()
            if trace.dense is not None:
                dense = trace.dense[soft].tobytes()
            soft += 1
        builder.append(step.tobytes(), top, sparse, dense)


@fast
@given(trace=traces(), data=st.data())
def test_a_builder_returns_every_slice_of_what_it_was_given(trace, data):
    builder = TraceBuilder(dict(trace.meta))
    feed(builder, trace)
    assert len(builder) == len(trace)
    sizes = [getattr(trace, n).nbytes for n in ARRAYS if getattr(trace, n) is not None]
    assert builder.nbytes == sum(sizes), "no more memory than the arrays"
    start = data.draw(st.integers(0, len(trace)))
    stop = data.draw(st.integers(start, len(trace)))
    got = builder.build(start, stop)
    think = slice(*((trace.phase[:n] == Phase.THINK).sum() for n in (start, stop)))
    soft = slice(*(is_soft(trace.kind[:n]).sum() for n in (start, stop)))
    assert got.steps.tobytes() == trace.steps[start:stop].tobytes()
    for name, span in (
        ("top_ids", think),
        ("top_weights", think),
        ("sparse_ids", soft),
        ("sparse_weights", soft),
        ("dense", soft),
    ):
        whole, part = getattr(trace, name), getattr(got, name)
        if whole is None or not len(whole):
            assert part is None, name
        else:
            assert isinstance(part, np.ndarray), name
            assert part.tobytes() == whole[span].tobytes(), name
            assert part.shape == whole[span].shape and part.dtype == whole.dtype, name
    assert got.start == start
    assert_same(decode(encode(got)), got)
    assert "start" not in builder.meta and builder.build().start == 0


def test_a_builder_holds_bytes_and_a_trace_arrays():
    builder = TraceBuilder()
    assert all(
        isinstance(getattr(builder, n), bytearray) for n in ("steps", "top", "sparse", "dense")
    )
    before = builder.build()
    builder.append(np.zeros(1, STEP).tobytes(), b"", b"", b"")
    assert len(before) == 0 and len(builder.build()) == 1, "a built trace does not change"


# ---- reconstruction --------------------------------------------------------------------------


@dataclasses.dataclass
class Fed:
    """What an engine would have fed, and its record."""

    table: torch.Tensor
    inputs: torch.Tensor
    trace: Trace
    ids: torch.Tensor
    weights: torch.Tensor


def fed_by_an_engine(
    dtype_name: str, seed: int = 0, count: int = 12, cut: int | None = None
) -> Fed:
    """Hard, soft and forced positions; from `cut` on with another sigma."""
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCAB + 3, DIM, generator=generator).to(dtype)
    table[VOCAB:] = torch.nan  # vocabulary padding
    steps = np.zeros(count, STEP)
    steps["token"] = torch.randint(0, VOCAB, (count,), generator=generator)
    steps["phase"] = Phase.THINK
    steps["kind"] = np.resize([Kind.SOFT, Kind.SAMPLED, Kind.SOFT_SAMPLED, Kind.SOFT], count)
    steps["phase"][-2:], steps["kind"][-2:] = Phase.FORCED, Kind.FORCED
    at = torch.from_numpy(np.flatnonzero(is_soft(steps["kind"])))
    ids = torch.randint(0, VOCAB, (len(at), 5), generator=generator)
    weights = torch.softmax(torch.randn(len(at), 5, generator=generator), -1)
    weights[0, 3:] = 0.0  # unused columns
    sigma = torch.full((count,), noise_sigma(0.33, 1.0))
    facts = meta(dtype=dtype_name, seed=2**52 + 11, sigma=float(sigma[0]))
    facts["sigmas"] = [[float(sigma[0]), 0]]
    if cut is not None:
        sigma[cut:] = noise_sigma(0.33, 2.0)
        facts["sigmas"].append([float(sigma[-1]), cut])
    mean = (weights[..., None] * table[ids].float()).sum(1)
    z = noise.gaussian(torch.full_like(at, facts["seed"]), at, DIM)
    inputs = table[torch.from_numpy(steps["token"].astype(np.int64))].clone()
    inputs[at] = noisy_input(mean, sigma[at], z, dtype)
    return Fed(table, inputs, Trace(facts, steps), ids, weights)


def sparse(case: Fed) -> Trace:
    return dataclasses.replace(
        case.trace,
        sparse_ids=case.ids.numpy().astype("<i4"),
        sparse_weights=case.weights.numpy(),
    )


def dense(case: Fed) -> Trace:
    return dataclasses.replace(case.trace, dense=raw(case.inputs[case.trace.soft_positions]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_record_gives_back_every_bit(dtype):
    case = fed_by_an_engine(dtype)
    case.inputs[0, 0] = -0.0  # soft position 0
    trace = decode(encode(dense(case)))
    got = reconstruct(trace, case.table)
    assert got.dtype == case.inputs.dtype
    assert raw(got).tobytes() == raw(case.inputs).tobytes()
    assert torch.equal(trace.dense_tensor(), case.inputs[trace.soft_positions])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [None, 5])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_a_sparse_record_gives_the_same_up_to_float32_rounding(dtype, cut, seed):
    """Noise included, and with a sigma that changed when weights were updated."""
    case = fed_by_an_engine(dtype, seed, cut=cut)
    got = reconstruct(decode(encode(sparse(case))), case.table)
    # One more rounding to the model's dtype may fall the other way.
    tolerance = {"float32": 2e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    torch.testing.assert_close(got, case.inputs, rtol=tolerance, atol=2e-6)
    hard = ~is_soft(case.trace.kind)
    assert torch.equal(got[hard], case.inputs[hard]), "hard rows are rows of the table"


def test_the_noise_of_a_sparse_record_matters():
    case = fed_by_an_engine("float32")
    for changes in ({"seed": 3}, {"sigma": 0.0, "sigmas": []}):
        other = dataclasses.replace(sparse(case), meta=case.trace.meta | changes)
        assert not torch.allclose(reconstruct(other, case.table), case.inputs, atol=1e-2)


@pytest.mark.parametrize("start", [0, 1, 4, 7, 12])
def test_a_part_of_a_trace_is_rebuilt_with_the_noise_of_its_own_positions(start):
    case = fed_by_an_engine("float32", cut=5)
    whole = sparse(case)
    builder = TraceBuilder(dict(whole.meta))
    feed(builder, whole)
    part = decode(encode(builder.build(start)))
    torch.testing.assert_close(
        reconstruct(part, case.table), case.inputs[start:], rtol=2e-6, atol=2e-6
    )
    torch.testing.assert_close(step_sigma(part), step_sigma(whole)[start:])


def test_sigma_holds_from_the_position_where_it_changed():
    trace = Trace(meta(sigma=1.0, sigmas=[[1.0, 0], [2.0, 3], [4.0, 4]]), np.zeros(6, STEP))
    assert step_sigma(trace).tolist() == [1, 1, 1, 2, 4, 4]
    assert step_sigma(Trace(meta(sigma=1.5), np.zeros(2, STEP))).tolist() == [1.5, 1.5]


def test_a_record_without_inputs_says_what_to_ask_for():
    case = fed_by_an_engine("float32")
    with pytest.raises(ValueError, match='record="dense"'):
        reconstruct(case.trace, case.table)
    with pytest.raises(ValueError, match='record="dense"'):
        case.trace.dense_tensor()


def test_the_sigma_of_a_trace_is_the_float32_that_was_used():
    sigma = noise_sigma(0.33, 0.0417)
    assert struct.unpack("<f", struct.pack("<f", sigma))[0] == sigma
    again = decode(encode(Trace(meta(sigma=sigma), np.zeros(1, STEP))))
    assert again.meta["sigma"] == sigma and math.isfinite(sigma)
