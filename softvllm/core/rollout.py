"""The frames of `POST /v1/rollouts`: one codec for server, clients and trainer.

A stream is a sequence of frames, each a little-endian u32 length and that many bytes of msgpack
(docs/wire.md). `Start` comes first, then a `Sample` or a `Failure` for every (prompt, sample) in
the order in which they finish, then `End`. A stream without `End` was cut.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import numpy as np

from softvllm.core.trace import Trace, decode

VERSION = 1
MAX_PROMPTS, MAX_SAMPLES, MAX_TOTAL = 4096, 1024, 65536
"""Prompts, samples a prompt and samples in all that one request may ask for."""
MEDIA_TYPE = "application/x-softvllm-rollouts"
MAX_FRAME = 2**31 - 1
"""Bytes of one frame at most; anything larger is taken for a broken stream."""
_LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, tag="start", kw_only=True):
    """What the whole stream has in common."""

    version: int = VERSION
    request_id: str
    model: str
    weight_version: str | None = None
    """Version in service when the request arrived; each sample's trace has its own spans."""
    num_prompts: int
    num_samples: int
    """Samples per prompt (n)."""


class Sample(msgspec.Struct, tag="sample", kw_only=True):
    """One finished sample."""

    prompt: int
    """Index of the prompt in the request."""
    sample: int
    """Index of the sample within its prompt's group."""
    prompt_ids: bytes
    """Token ids of the prompt as fed, int32 little-endian."""
    trace_bytes: bytes = msgspec.field(name="trace")
    """The encoded trace (docs/wire.md): output ids, kinds, log-probs, soft inputs, seed, sigma,
    tau, weight versions."""
    text: str
    answer_start: int
    """Character of `text` where forced text and answer begin."""
    finish_reason: str
    """stop or length, as vLLM reports it; abort if the engine gave the sample up."""
    stop_reason: int | str | None = None

    @property
    def prompt_token_ids(self) -> np.ndarray:
        """int32 [Tp]."""
        return np.frombuffer(self.prompt_ids, "<i4")

    @property
    def trace(self) -> Trace:
        """The decoded trace; its `token` are the output ids. Raises ValueError if it is broken."""
        return decode(self.trace_bytes)

    @property
    def answer(self) -> str:
        """Forced text and answer."""
        return self.text[self.answer_start :]


class Failure(msgspec.Struct, tag="error", kw_only=True):
    """A sample that has no trustworthy result."""

    prompt: int
    sample: int
    code: str
    """nan: the model produced NaN logits; aborted: the engine dropped it; engine: any other
    error of the engine; limit: the answer is too large for a frame."""
    message: str


class End(msgspec.Struct, tag="end", kw_only=True):
    """The last frame."""

    samples: int
    errors: int


Frame = Start | Sample | Failure | End
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Frame)


def encode_frame(frame: Frame) -> bytes:
    """Length and msgpack. Raises ValueError above `MAX_FRAME` bytes."""
    body = _encoder.encode(frame)
    if len(body) > MAX_FRAME:
        raise ValueError(f"a frame of {len(body)} bytes; record sparse or steps instead of dense")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream, in whatever pieces it arrives, into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.ended = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Frames completed by `data`. Raises ValueError on anything that is not a frame."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_FRAME:
                raise ValueError(f"broken rollout stream: a frame of {size} bytes")
            if len(self._buffer) < _LENGTH.size + size:
                return
            body = bytes(self._buffer[_LENGTH.size : _LENGTH.size + size])
            del self._buffer[: _LENGTH.size + size]
            try:
                frame = _decoder.decode(body)
            except msgspec.MsgspecError as error:
                raise ValueError(f"broken rollout stream: {error}") from None
            if isinstance(frame, Start) and frame.version != VERSION:
                raise ValueError(
                    f"rollout frames of version {frame.version}; this softvllm reads {VERSION}"
                )
            self.ended = self.ended or isinstance(frame, End)
            yield frame

    def close(self) -> None:
        """Call at the end of the stream. Raises ValueError if it was cut short."""
        if not self.ended:
            raise ValueError(
                f"the rollout stream was cut ({len(self._buffer)} bytes of an unfinished frame); "
                "samples received so far are whole"
            )


def read_frames(chunks: Iterable[bytes]) -> Iterator[Frame]:
    """All frames of a stream; raises ValueError if it breaks off or is not one."""
    reader = FrameReader()
    for chunk in chunks:
        yield from reader.feed(chunk)
    reader.close()
