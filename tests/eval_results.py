"""Small evaluations made by hand, for tests of numbers and tables."""

from __future__ import annotations

from typing import Any

from trainer.data import Problem
from trainer.eval import settings, summary
from trainer.eval.checkpoints import Checkpoint
from trainer.eval.config import SIX
from trainer.eval.plan import Cell
from trainer.eval.store import Row
from trainer.eval.tasks import Task

TRAININGS = ("none", "hard", "soft")


def sample(problem: int, k: int, correct: bool, **given: Any) -> Row:
    facts = {"end": "end_sequence", "finish": "stop", "think_tokens": 4, "entropy": [1.0, 0.5]}
    extracted = "7" if correct else f"{k}"
    return Row(
        problem=f"p{problem}",
        sample=k,
        seed=k,
        prompt="x",
        correct=correct,
        **{"extracted": extracted, **facts, **given},
    )


def task(name: str = "gsm8k", seen: frozenset[str] = frozenset()) -> Task:
    problems = [Problem(f"p{i}", f"What is {i}?", "7") for i in range(4)]
    return Task(name, "gsm8k", 8, 4, [], {}, problems, [[i] for i in range(4)], [], seen)


def result(
    training: str, setting: str, correct: list[list[bool]], seed: int | None = None, **given: Any
) -> summary.CellResult:
    name = training if seed is None else f"{training}-{seed}"
    checkpoint = Checkpoint(name, training, seed, None, "w")
    samples = len(correct[0])
    cell = Cell.of(given.pop("task", task()), settings.named([setting], {})[0], samples, 0, 1)
    rows = [
        sample(p, k, right, **given)
        for p, row in enumerate(correct)
        for k, right in enumerate(row[: cell.samples])
    ]
    return summary.of_cell(checkpoint, cell, rows, 200, 0)


def results(seeds: tuple[int | None, ...] = (None,), name: str = "gsm8k") -> dict[str, Any]:
    """An evaluation of three trainings in all six settings; the more trained the better."""
    found = []
    for number, training in enumerate(TRAININGS):
        for seed in seeds if training != "none" else (None,):
            for setting in SIX:
                right = [[i < number + 1 + (seed or 0) % 2, i < number] for i in range(4)]
                found.append(result(training, setting, right, seed, task=task(name)))
    return {
        "format": 1,
        "checkpoints": [
            {"name": r.checkpoint.name, "training": r.checkpoint.training} for r in found
        ],
        "tasks": [{"name": name, "problems": 4, "dropped": []}],
        "settings": [{"name": n} for n in SIX],
        "cells": [
            {
                "checkpoint": r.checkpoint.name,
                "training": r.checkpoint.training,
                "task": name,
                "setting": r.cell.setting.name,
                **r.numbers,
            }
            for r in found
        ],
        "groups": summary.groups(found),
        "differences": summary.differences(found, 200, 0),
        "choice": [],
        "kl": [],
    }
