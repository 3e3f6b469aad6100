"""Recorded rollouts: `--record` writes them, `--replay` trains on them without a server.

One file a step: problems, prompt ids and the samples as they came over the wire, so a replay runs
through the same code from the reading of traces on. Rewards are computed anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from softvllm.core.rollout import Sample, encode_frame, read_frames
from trainer.data import Problem
from trainer.files import write_whole

FORMAT = 2
"""2: problems as JSON."""


class Record(msgspec.Struct):
    """The rollouts of one step."""

    step: int
    problems: list[Problem]
    prompts: list[list[int]]
    version: str
    frames: bytes
    """Sample frames of docs/wire.md, without start and end."""
    dropped: int = 0
    """Samples that failed and were not trained on."""
    min_think: int = 0
    """min_think_tokens of the rollouts, which traces do not tell."""
    format: int = FORMAT

    @property
    def samples(self) -> list[Sample]:
        """In the order of (prompt, sample)."""
        from softvllm.core.rollout import End

        end = encode_frame(End(samples=0, errors=0))
        return [f for f in read_frames([self.frames, end]) if isinstance(f, Sample)]

    @classmethod
    def of(
        cls,
        step: int,
        problems: list[Problem],
        prompts: list[list[int]],
        version: str,
        samples: list[Sample],
        dropped: int,
        min_think: int = 0,
    ) -> Record:
        frames = b"".join(encode_frame(sample) for sample in samples)
        return cls(step, problems, prompts, version, frames, dropped, min_think)


def needs_table(samples: list[Sample]) -> bool:
    """Whether soft inputs are recorded as tokens and weights: only the table that fed them, bit by
    bit, gives them again."""
    return any(sample.trace.sparse_ids is not None for sample in samples)


def encode(record: Record) -> bytes:
    """A record in msgpack; its problems as JSON within, whose numbers may be of any size."""
    problems = json.dumps(record.problems, default=msgspec.structs.asdict)
    return msgspec.msgpack.encode(msgspec.structs.asdict(record) | {"problems": problems})


def decode(data: bytes) -> Record:
    """What `encode` made.

    Raises:
        ValueError: it is not a record, or of another format.
    """
    plain = msgspec.msgpack.decode(data)
    if not isinstance(plain, dict) or "format" not in plain:
        raise ValueError("not a record of rollouts")
    if plain["format"] != FORMAT:
        raise ValueError(f"format {plain['format']}; this trainer reads {FORMAT}")
    return msgspec.convert(plain | {"problems": json.loads(plain["problems"])}, Record)


def write(folder: Path, record: Record) -> None:
    """Write a step's file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"step_{record.step:06d}.msgpack", encode(record))


def read(folder: Path, step: int) -> Record:
    """A step's file.

    Raises:
        ValueError: there is none, or it is not a record.
    """
    path = folder / f"step_{step:06d}.msgpack"
    try:
        return decode(path.read_bytes())
    except OSError:
        raise ValueError(
            f"{folder} has no rollouts for step {step}; lower --steps to what was recorded"
        ) from None
    except (ValueError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} is not a record of rollouts: {error}") from None
