"""The frames of a rollout stream: any cutting of the bytes gives the same frames or an error."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softvllm.core import rollout
from softvllm.core.rollout import (
    End,
    Failure,
    Frame,
    FrameReader,
    Sample,
    Start,
    encode_frame,
    read_frames,
)

starts = st.builds(
    Start,
    request_id=st.text(max_size=8),
    model=st.text(max_size=8),
    weight_version=st.one_of(st.none(), st.text(max_size=4)),
    num_prompts=st.integers(0, 2**31),
    num_samples=st.integers(0, 2**31),
)
made = st.builds(
    Sample,
    prompt=st.integers(0, 99),
    sample=st.integers(0, 99),
    prompt_ids=st.lists(st.integers(0, 2**31 - 1), max_size=5).map(
        lambda ids: np.asarray(ids, "<i4").tobytes()
    ),
    trace_bytes=st.binary(max_size=40),
    text=st.text(max_size=10),
    answer_start=st.integers(0, 10),
    finish_reason=st.sampled_from(["stop", "length"]),
    stop_reason=st.one_of(st.none(), st.integers(0, 9), st.text(max_size=3)),
)
failures = st.builds(
    Failure,
    prompt=st.integers(0, 99),
    sample=st.integers(0, 99),
    code=st.sampled_from(["nan", "aborted", "engine", "limit"]),
    message=st.text(max_size=10),
)
ends = st.builds(End, samples=st.integers(0, 99), errors=st.integers(0, 99))
streams = st.tuples(starts, st.lists(st.one_of(made, failures), max_size=5), ends).map(
    lambda parts: [parts[0], *parts[1], parts[2]]
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = [0, *sorted(places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(at)]


@settings(deadline=None)
@given(data=st.data(), frames=streams)
def test_any_chunking_gives_the_same_frames(data: st.DataObject, frames: list[Frame]) -> None:
    raw = b"".join(map(encode_frame, frames))
    places = data.draw(st.lists(st.integers(0, len(raw)), max_size=12))
    assert list(read_frames(cut(raw, places))) == frames


@settings(deadline=None)
@given(data=st.data(), frames=streams)
def test_a_stream_that_breaks_off_gives_its_whole_frames_and_an_error(
    data: st.DataObject, frames: list[Frame]
) -> None:
    pieces = list(map(encode_frame, frames))
    raw = b"".join(pieces)
    end = data.draw(st.integers(0, len(raw) - 1))
    whole, size = 0, 0
    while size + len(pieces[whole]) <= end:
        size += len(pieces[whole])
        whole += 1
    got = []
    with pytest.raises(ValueError, match="cut"):
        for frame in read_frames(cut(raw[:end], [end // 2])):
            got.append(frame)
    assert got == frames[:whole]


@settings(deadline=None)
@given(junk=st.binary(min_size=1, max_size=64))
def test_junk_is_never_taken_for_a_whole_stream(junk: bytes) -> None:
    with pytest.raises(ValueError):
        list(read_frames([junk]))


BROKEN: dict[str, tuple[bytes, str]] = {
    "an unknown type": (msgspec.msgpack.encode({"type": "hello"}), "broken"),
    "no type": (msgspec.msgpack.encode({"prompt": 1}), "broken"),
    "a missing field": (msgspec.msgpack.encode({"type": "end", "samples": 1}), "broken"),
    "a wrong type": (
        msgspec.msgpack.encode({"type": "end", "samples": "1", "errors": 0}),
        "broken",
    ),
    "no msgpack": (b"\xc1", "broken"),
    "nothing": (b"", "broken"),
    "a later version": (
        encode_frame(Start(version=2, request_id="", model="", num_prompts=1, num_samples=1))[4:],
        "version 2",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_frame_that_is_none_is_named(name: str) -> None:
    body, part = BROKEN[name]
    with pytest.raises(ValueError, match=part):
        list(FrameReader().feed(struct.pack("<I", len(body)) + body))


def test_a_length_that_cannot_be_is_refused_before_its_bytes_arrive() -> None:
    with pytest.raises(ValueError, match="frame of 4294967295 bytes"):
        list(FrameReader().feed(b"\xff\xff\xff\xff"))


def test_a_frame_too_large_to_send_says_what_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "MAX_FRAME", 100)
    fields: dict[str, Any] = {"text": "", "answer_start": 0, "finish_reason": "stop"}
    large = Sample(prompt=0, sample=0, prompt_ids=b"", trace_bytes=b"x" * 101, **fields)
    with pytest.raises(ValueError, match="sparse"):
        encode_frame(large)


def test_fields_of_a_later_server_do_not_break_a_reader() -> None:
    """Adding a field to a frame is no new version."""
    body = msgspec.msgpack.encode({"type": "end", "samples": 1, "errors": 0, "seconds": 2.0})
    (frame,) = FrameReader().feed(struct.pack("<I", len(body)) + body)
    assert frame == End(samples=1, errors=0)


@given(ids=st.lists(st.integers(0, 2**31 - 1), max_size=8), start=st.integers(0, 8))
def test_a_sample_gives_its_ids_and_its_answer(ids: list[int], start: int) -> None:
    sample = Sample(
        prompt=0,
        sample=0,
        prompt_ids=np.asarray(ids, "<i4").tobytes(),
        trace_bytes=b"",
        text="abcdefgh",
        answer_start=start,
        finish_reason="stop",
    )
    assert sample.prompt_token_ids.tolist() == ids
    assert sample.answer == "abcdefgh"[start:]
    with pytest.raises(ValueError, match="not a trace"):
        _ = sample.trace
