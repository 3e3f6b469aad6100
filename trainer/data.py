"""Problems with golds: GSM8K, MATH, reasoning-gym, JSONL and parquet files, hub data sets.

A `Problems` list is fixed for a run; `order` turns a running position into an item, so that the
data cursor is one number and a resumed run goes on with exactly the next item.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trainer import gym
from trainer.config import DataConfig
from trainer.rewards.base import boxed
from trainer.rewards.pool import RewardPool


class Problem(msgspec.Struct, frozen=True):
    """One problem."""

    id: str
    """Unique in the data set and stable between runs."""
    question: str
    gold: str
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)
    """JSON for the reward."""


@dataclass(frozen=True)
class Problems:
    """Problems that can be scored, and what was left out."""

    train: list[Problem]
    held_out: list[Problem]
    """For validation; never trained on."""
    dropped: list[Problem] = field(default_factory=list)
    """Their golds cannot be scored."""
    repeated: int = 0
    """Training problems left out because a held-out one asks the same question."""

    @property
    def fingerprint(self) -> str:
        """Hash of what is trained and validated on, in order: a resumed run must have the same."""
        parts = [[(p.id, p.question, p.gold) for p in some] for some in (self.train, self.held_out)]
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:16]

    def order(self, seed: int, position: int) -> Problem:
        """The problem at a running position of the endless training sequence.

        Every epoch is a permutation of its own, made from seed and epoch number.
        """
        epoch, index = divmod(position, len(self.train))
        permutation = np.random.default_rng([seed, epoch]).permutation(len(self.train))
        return self.train[int(permutation[index])]


def load(config: DataConfig, pool: RewardPool | None, held_out: int) -> Problems:
    """Load, drop what cannot be scored, and split off validation problems.

    Args:
        pool: scores golds to see whether they can be; None: every gold is taken.
        held_out: number of validation problems; from `config.validation_path` (or the
            validation split) if given, else the last ones of the shuffled training data.

    Raises:
        ValueError: files or fields are missing, or nothing is left.
    """
    _require_other_validation(config)
    train = _read(config, config.path, config.split)
    if config.validation_path or config.validation_split:
        path = config.validation_path or config.path
        validation = _read(config, path, config.validation_split or config.split)
        validation = _shuffled(validation, config.seed)
    else:
        mixed = _shuffled(train, config.seed)
        if held_out and len(mixed) <= held_out:
            raise ValueError(
                f"{len(mixed)} problems leave none to train on after {held_out} for validation; "
                "lower validation.problems or give data.validation_path"
            )
        train, validation = mixed[: len(mixed) - held_out], mixed[len(mixed) - held_out :]
    validation = validation[:held_out]
    repeated = 0
    if config.repeated == "drop":  # generated and scraped data ask some questions twice
        asked = {key(problem.question) for problem in validation}
        rest = [problem for problem in train if key(problem.question) not in asked]
        repeated, train = len(train) - len(rest), rest
        if not train:
            raise ValueError(
                f"validation asks every question that there is to train on ({repeated}); lower "
                "validation.problems, or set data.repeated = keep"
            )
    train = train[: config.limit] if config.limit else train
    dropped: list[Problem] = []
    if pool is not None and config.check_golds:
        train, bad = _scorable(train, pool)
        validation, worse = _scorable(validation, pool)
        dropped = bad + worse
    if not train:
        raise ValueError(
            f"no problem of {config.source} can be trained on ({len(dropped)} golds cannot be "
            "scored); check data.source and reward.function"
        )
    return Problems(train, validation, dropped, repeated)


def key(question: str) -> str:
    """What makes two questions the same: their text, whatever its white space."""
    return " ".join(question.split())


def _require_other_validation(config: DataConfig) -> None:
    """Refuse settings under which validation problems would be the training ones.

    Raises:
        ValueError: see the messages.
    """
    if config.source == "reasoning_gym":
        if config.validation_path:
            raise ValueError(
                "data.validation_path is of no use to reasoning_gym, which makes its problems; "
                "give data.validation_split = test, or neither"
            )
        if config.validation_split == config.split:
            raise ValueError(
                f"data.validation_split = {config.split} are the training problems; give another "
                "name (each split has a seed of its own), or none to hold problems out"
            )
        return
    named = config.validation_split and not config.validation_path
    if named and config.source == "file" and config.path and Path(config.path).is_file():
        raise ValueError(
            f"data.validation_split = {config.validation_split} has no meaning for one file, "
            f"{config.path}; give data.validation_path, a folder with SPLIT.jsonl, or neither "
            "to hold problems out"
        )


def _scorable(problems: Sequence[Problem], pool: RewardPool) -> tuple[list[Problem], list[Problem]]:
    good = pool.verifiable([(p.gold, p.metadata) for p in problems]) if problems else []
    return (
        [p for p, ok in zip(problems, good) if ok],
        [p for p, ok in zip(problems, good) if not ok],
    )


def _shuffled(problems: list[Problem], seed: int) -> list[Problem]:
    order = np.random.default_rng([seed, 2**31]).permutation(len(problems))
    return [problems[int(i)] for i in order]


def _read(config: DataConfig, path: str | None, split: str) -> list[Problem]:
    if config.source == "reasoning_gym":
        return list(_reasoning_gym(config, split))
    rows = _hub(config, path, split) if config.source == "hub" else _rows(config, path, split)
    return [_problem(config, row, i, split) for i, row in enumerate(rows)]


def _reasoning_gym(config: DataConfig, split: str) -> Iterator[Problem]:
    # Different splits must not overlap: each has a seed of its own.
    seed = config.seed + (0 if split == "train" else 1_000_003)
    made = gym.entries(config.task, config.size, seed, config.task_parameters)
    for i, entry in enumerate(made):
        metadata = {"task": config.task, "entry": entry}
        yield Problem(
            f"{config.task}-{split}-{i}", entry["question"], str(entry["answer"]), metadata
        )


def _rows(config: DataConfig, path: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    if not path:
        raise ValueError(f"data.source = {config.source} needs data.path, a file or a folder")
    file = Path(path).expanduser()
    if file.is_dir():
        found = [f for f in (file / f"{split}.jsonl", file / f"{split}.parquet") if f.exists()]
        if not found:
            raise ValueError(f"{file} holds neither {split}.jsonl nor {split}.parquet")
        file = found[0]
    if not file.is_file():
        raise ValueError(f"data file {file} does not exist")
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(
                "parquet files need the package pyarrow: pip install datasets; or give JSONL"
            ) from None
        return pyarrow.parquet.read_table(file).to_pylist()
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: not a JSON object")
        rows.append(row)
    return rows


def _hub(config: DataConfig, path: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "data.source = hub needs the package datasets: pip install datasets; or download the "
            "data and give it as JSONL"
        ) from None
    if not path:
        raise ValueError("data.source = hub needs data.path, the data set's name")
    try:
        return datasets.load_dataset(path, config.hub_config, split=split)
    except Exception as error:  # its errors without a network, name, configuration or split vary
        raise ValueError(
            f"the hub does not give {path}, split {split}: {error}. Correct data.path, "
            "data.hub_config and data.split, or download the data elsewhere and give the file: "
            "data.source = file, data.path = FILE.jsonl (or .parquet)"
        ) from None


_FIELDS = {"gsm8k": ("question", "answer"), "math": ("problem", "solution")}


def _problem(config: DataConfig, row: Mapping[str, Any], index: int, split: str) -> Problem:
    question_field, gold_field = _FIELDS.get(config.style, ("question", "answer"))
    question_field = config.question_field or question_field
    gold_field = config.gold_field or gold_field
    for name in (question_field, gold_field):
        if name not in row:
            raise ValueError(
                f"item {index} has no field {name!r} but {', '.join(row)}; set "
                "data.question_field and data.gold_field"
            )
    gold = str(row[gold_field])
    if config.style == "gsm8k":
        gold = gold.rpartition("####")[2].strip().replace(",", "")
    elif config.style == "math":
        # The final result is what the solution boxes last; without a box it cannot be scored.
        gold = boxed(gold[gold.rfind("\\boxed{") :]) or ""
    extra = {k: v for k, v in row.items() if k not in (question_field, gold_field)}
    extra = json.loads(json.dumps(extra, default=str))
    return Problem(f"{split}-{index}", str(row[question_field]), gold, extra)
