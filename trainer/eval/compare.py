"""Our cells beside the paper's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.eval import paper
from trainer.eval.table import (
    SHORT,
    Results,
    Table,
    percent,
    samples,
    score,
    setting_names,
    trainings,
)


def with_paper(results: Results, model: str, data: str) -> list[Table]:
    """Tables of cells, out-of-domain numbers and differences, as far as the paper has them.

    Args:
        model: L3B, L8B or Q3B.
        data: what the paper's rows were trained on.
    """
    title = f"the paper's {paper.MODELS[model]}, trained on {data}"
    tables = (
        Table(
            "paper",
            f"Ours beside {title}",
            ["training", "task", "cell", "ours, %", "paper, %"],
            list(_cells(results, model, data)),
        ),
        Table(
            "paper-choice",
            f"Out of domain beside {title}",
            ["checkpoint", "set", "number", "ours", "paper"],
            list(_choice(results, model, data)),
        ),
        Table(
            "paper-differences",
            f"Differences beside {title} (its GSM8K where it has no such task)",
            ["trainings", "task", "cell", "ours, points", "paper, points"],
            list(_differences(results, model, data)),
        ),
    )
    return [table for table in tables if table.rows]


def _cells(results: Results, model: str, data: str) -> Iterator[list[str]]:
    for task in (entry["name"] for entry in results["tasks"]):
        for training in trainings(results):
            row = paper.row_name(model, data, training)
            for setting, k in paper.COLUMNS:
                theirs = paper.cell(task, row, setting, k)
                if theirs is None or setting not in setting_names(results):
                    continue
                ours_k = 1 if k == 1 else samples(results, task, setting)
                ours = score(results, training, task, setting, ours_k)
                yield [training, task, f"{SHORT[setting]}@{ours_k}", ours, f"{theirs} (@{k})"]


def _choice(results: Results, model: str, data: str) -> Iterator[list[str]]:
    for entry in results["choice"]:
        row = paper.row_name(model, data, entry["training"])
        for number, scale in (("accuracy", 100.0), ("nll_per_token", 1.0)):
            value = paper.out_of_domain(entry["set"], row, number)
            if value is not None:
                ours = f"{entry[number][0] * scale:.2f}"
                yield [entry["checkpoint"], entry["set"], number, ours, f"{value}"]


def _differences(results: Results, model: str, data: str) -> Iterator[list[str]]:
    for entry in results["differences"]:
        task = entry["task"] if entry["task"] in paper.TABLES else "gsm8k"
        rows = [paper.row_name(model, data, entry[side]) for side in ("training", "minus")]
        for k in (1, 32):
            ours: Any = entry.get(f"pass@{k}")
            after, before = (paper.cell(task, row, entry["setting"], k) for row in rows)
            if ours is None or after is None or before is None:
                continue
            theirs = f"{after - before:+.1f}" + ("" if task == entry["task"] else f" ({task})")
            names = f"{entry['training']} - {entry['minus']}"
            cell = f"{SHORT[entry['setting']]}@{k}"
            yield [names, entry["task"], cell, percent(ours, sign=True), theirs]
