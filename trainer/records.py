"""Recorded rollouts: `--record` writes them, `--replay` trains on them without a server.

One file a step: problems, prompt ids and the samples as they came over the wire, so a replay runs
through the same code from the reading of traces on. Rewards are computed anew.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from softvllm.core.rollout import Sample, encode_frame, read_frames
from trainer.data import Problem
from trainer.files import write_whole

FORMAT = 1


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


def write(folder: Path, record: Record) -> None:
    """Write a step's file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"step_{record.step:06d}.msgpack", msgspec.msgpack.encode(record))


def read(folder: Path, step: int) -> Record:
    """A step's file.

    Raises:
        ValueError: there is none, or it is not a record.
    """
    path = folder / f"step_{step:06d}.msgpack"
    try:
        record = msgspec.msgpack.decode(path.read_bytes(), type=Record)
    except OSError:
        raise ValueError(
            f"{folder} has no rollouts for step {step}; lower --steps to what was recorded"
        ) from None
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is not a record of rollouts: {error}") from None
    if record.format != FORMAT:
        raise ValueError(f"{path} has format {record.format}; this trainer reads {FORMAT}")
    return record
