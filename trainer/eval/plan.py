"""What is asked for, and with which seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from softvllm.core.params import MAX_SEED, CoTParams
from trainer.data import Problem
from trainer.eval.settings import Setting
from trainer.eval.store import Key
from trainer.eval.tasks import Task


def sample_seed(seed: int, task: str, setting: str, problem: str, sample: int) -> int:
    """Seed of one sample, below 2**53: a hash, so that nothing else in the plan matters."""
    return _hash([str(seed), task, setting, problem, str(sample)]) % MAX_SEED


def prompt_digest(ids: Sequence[int]) -> str:
    """Short name of a prompt's token ids, to notice when one has changed."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:8]


def gold_digest(problem: Problem) -> str:
    """Short name of what an answer is judged by, so that no verdict outlives a corrected gold."""
    facts = [problem.gold, problem.metadata]
    try:
        judged_by = msgspec.json.encode(facts, order="deterministic")
    except UnicodeEncodeError:  # JSON may hold half a character, which UTF-8 does not
        judged_by = json.dumps(facts, sort_keys=True).encode()
    return hashlib.sha256(judged_by).hexdigest()[:8]


@dataclass(frozen=True)
class Cell:
    """One task in one setting; with a checkpoint, one file of samples."""

    task: Task
    setting: Setting
    samples: int
    """A problem."""
    seed: int
    transcripts: int
    """The first so many problems show the think steps of their first sample."""

    @classmethod
    def of(cls, task: Task, setting: Setting, samples: int, seed: int, transcripts: int) -> Cell:
        return cls(task, setting, 1 if setting.greedy else samples, seed, transcripts)

    def all_keys(self) -> list[Key]:
        """(problem, sample) of the whole cell, in order."""
        return [(p.id, k) for p in self.task.problems for k in range(self.samples)]

    def seed_of(self, key: Key) -> int:
        return sample_seed(self.seed, self.task.name, self.setting.name, *key)

    def shows_steps(self, key: Key) -> bool:
        """Whether the sample's think steps are kept."""
        first = {p.id for p in self.task.problems[: self.transcripts]}
        return key[1] == 0 and key[0] in first

    def body(self, steps: bool) -> dict[str, Any]:
        """The rollout request besides prompts and seeds."""
        cot = {
            **self.setting.cot,
            "max_think_tokens": self.task.max_think_tokens,
            "answer_max_tokens": self.task.answer_max_tokens,
            "record": "top" if steps else "steps",
        }
        sampling = {
            **self.setting.sampling,
            "stop": self.task.stop,
            "include_stop_str_in_output": True,
        }
        return {"cot_mode": self.setting.mode, "cot": cot, "sampling": sampling}

    def check(self) -> None:
        """Raise ValueError if setting and budgets contradict each other."""
        body = self.body(steps=True)
        try:
            CoTParams.from_dict({"mode": body["cot_mode"], **body["cot"]})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"task {self.task.name}, setting {self.setting.name}: {error}"
            ) from None


@dataclass(frozen=True)
class Part:
    """A piece of a cell that goes out as one request."""

    cell: Cell
    steps: bool
    keys: list[Key]


def parts(cell: Cell, missing: Sequence[Key], size: int) -> Iterator[Part]:
    """What is missing of a cell, in requests of about `size` samples.

    Samples whose steps are shown go first and apart: recording them costs the server a little.
    """
    shown = [key for key in missing if cell.shows_steps(key)]
    if shown:
        yield Part(cell, True, shown)
    others = [key for key in missing if not cell.shows_steps(key)]
    for at in range(0, len(others), size):
        yield Part(cell, False, others[at : at + size])


def _hash(words: Sequence[str]) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(words).encode()).digest()[:8], "little")
