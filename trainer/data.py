"""Problems with golds: GSM8K, MATH, reasoning-gym, JSONL and parquet files, hub data sets.

A `Problems` list is fixed for a run; `order` turns a running position into an item, so that the
data cursor is one number and a resumed run goes on with exactly the next item.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trainer import checks, gym, rows
from trainer.config import DataConfig
from trainer.rewards.base import boxed
from trainer.rewards.pool import RewardPool

Reader = Callable[[Any], Any]
"""From a row's gold to a text or a number."""


def as_it_is(gold: Any) -> Any:
    """The gold of a data set that has texts or numbers."""
    return gold


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


def load(
    config: DataConfig, pool: RewardPool | None, held_out: int, read: Reader = as_it_is
) -> Problems:
    """Load, drop what cannot be scored, and split off validation problems.

    Args:
        pool: scores golds to see whether they can be; None: every gold is taken.
        held_out: number of validation problems; from `config.validation_path` (or the
            validation split) if given, else the last ones of the shuffled training data.
        read: makes a text or a number of golds that a data set has in another form.

    Raises:
        ValueError: files or fields are missing, a question or gold is neither text nor number, or
            nothing is left.
    """
    checks.at_least("data.seed", config.seed, 0)
    _require_other_validation(config)
    train = _read(config, config.path, config.split, read)
    if config.validation_path or config.validation_split:
        path = config.validation_path or config.path
        validation = _read(config, path, config.validation_split or config.split, read)
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


def _read(config: DataConfig, path: str | None, split: str, read: Reader) -> list[Problem]:
    if config.source == "reasoning_gym":
        return list(_reasoning_gym(config, split))
    if not path:
        needed = "the data set's name" if config.source == "hub" else "a file or a folder"
        raise ValueError(f"data.source = {config.source} needs data.path, {needed}")
    hub = config.source == "hub"
    found = rows.of_hub(path, config.hub_config, split) if hub else rows.of_file(path, split)
    problems = [_problem(config, row, i, split, read) for i, row in enumerate(found)]
    if not problems:
        raise ValueError(f"{path}{f', split {split},' if hub else ''} holds no problems")
    return problems


def _reasoning_gym(config: DataConfig, split: str) -> Iterator[Problem]:
    # Different splits must not overlap: each has a seed of its own.
    seed = config.seed + (0 if split == "train" else 1_000_003)
    made = gym.entries(config.task, config.size, seed, config.task_parameters)
    for i, entry in enumerate(made):
        metadata = {"task": config.task, "entry": entry}
        yield Problem(
            f"{config.task}-{split}-{i}", entry["question"], str(entry["answer"]), metadata
        )


_FIELDS = {"gsm8k": ("question", "answer"), "math": ("problem", "solution")}


def _problem(config: DataConfig, row: rows.Row, index: int, split: str, read: Reader) -> Problem:
    where, fields = row
    question_field, gold_field = _FIELDS.get(config.style, ("question", "answer"))
    question_field = config.question_field or question_field
    gold_field = config.gold_field or gold_field
    for name in (question_field, gold_field):
        if name not in fields:
            raise ValueError(
                f"{where} has no field {name!r} but {', '.join(fields)}; set "
                "data.question_field and data.gold_field"
            )
    try:
        question = rows.text(fields[question_field], question_field)
        gold = rows.text(read(fields[gold_field]), gold_field)
        if not question.strip():
            raise ValueError(f"{question_field!r} is empty")
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}; mend or drop it, or name another field (data.question_field, "
            "data.gold_field)"
        ) from None
    if config.style == "gsm8k":
        gold = gold.rpartition("####")[2].strip().replace(",", "")
    elif config.style == "math":
        # The final result is what the solution boxes last; without a box it cannot be scored.
        gold = boxed(gold[gold.rfind("\\boxed{") :]) or ""
    extra = {k: v for k, v in fields.items() if k not in (question_field, gold_field)}
    extra = json.loads(json.dumps(extra, default=str))
    return Problem(f"{split}-{index}", question, gold, extra)
