"""Our cells and differences beside the paper's."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.eval import paper
from trainer.eval.summary import BEST_HARD, HARD, PAPER_K
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
from trainer.eval.tables_paired import signed

ARC_NOTE = '; arc_challenge: the paper says "ARC" without the part, which may be another'


def with_paper(results: Results, model: str, data: str) -> list[Table]:
    """Tables of cells and of differences, as far as the paper has them. Out of domain only
    differences compare, since the paper's prompts are not known.

    Args:
        model: L3B, L8B or Q3B.
        data: what the paper's rows were trained on.

    Raises:
        ValueError: the paper did not train that model on it.
    """
    paper.require_training(model, data)
    title = f"the paper's {paper.MODELS[model]}, trained on {data}"
    choice = list(_choice(results, model, data))
    arc = ARC_NOTE if any(row[1] == "arc_challenge" for row in choice) else ""
    tables = (
        Table(
            "paper",
            f"Ours beside {title}{_k_note(results)}",
            ["training", "task", "cell", "ours, %", "paper, %"],
            list(_cells(results, model, data)),
        ),
        Table(
            "paper-choice",
            "Out of domain: paired differences [95 % interval over items] beside differences of "
            f"{title}; accuracy in percentage points, NLL per token in nats{arc}",
            ["trainings", "set", "number", "ours", "paper"],
            choice,
        ),
        Table(
            "paper-differences",
            f"Differences beside {title} (its GSM8K where it has no such task){_k_note(results)}",
            ["difference", "task", "cell", "ours, points", "paper, points"],
            list(_differences(results, model, data)),
        ),
    )
    found = [table for table in tables if table.rows]
    return found or [_nothing(results, title)]


def _nothing(results: Results, title: str) -> Table:
    """Said in a table's place, since a comparison was asked for."""
    return Table(
        "paper",
        f"Nothing to set beside {title}: it has the trainings none, hard, soft and fuzzy "
        f"(here {', '.join(trainings(results))}), the tasks {', '.join(paper.TABLES)} and the six "
        "settings",
        ["training", "task", "cell", "ours, %", "paper, %"],
        [],
    )


def _k_note(results: Results) -> str:
    """Says so where ours have too few samples for the paper's k."""
    ns = {cell["samples"] for cell in results["cells"]} - {1}
    few = sorted(n for n in ns if n < PAPER_K)
    if not few:
        return ""
    return f"; with {', '.join(map(str, few))} samples a problem ours is pass@{few[0]} beside " + (
        f"its pass@{PAPER_K}"
    )


def _cells(results: Results, model: str, data: str) -> Iterator[list[str]]:
    for task in (entry["name"] for entry in results["tasks"]):
        for training in trainings(results):
            row = paper.row_name(model, data, training)
            for setting, k in paper.COLUMNS:
                theirs = paper.cell(task, row, setting, k)
                ours_k = min(k, samples(results, task, setting))
                if theirs is None or setting not in setting_names(results) or ours_k < min(k, 2):
                    continue
                ours = score(results, training, task, setting, ours_k)
                yield [training, task, f"{SHORT[setting]}@{ours_k}", ours, f"{theirs} (@{k})"]


def _choice(results: Results, model: str, data: str) -> Iterator[list[str]]:
    for entry in results.get("drift", {}).get("differences", []):
        if "checkpoint" in entry:  # the paper has means over its seeds only
            continue
        rows = [paper.row_name(model, data, entry[side]) for side in ("training", "minus")]
        for number in ("accuracy", "nll_per_token"):
            after, before = (paper.out_of_domain(entry["set"], row, number) for row in rows)
            if after is not None and before is not None:
                ours = entry[number]
                text = percent(ours, sign=True) if number == "accuracy" else signed(ours)
                names = f"{entry['training']} - {entry['minus']}"
                yield [names, entry["set"], number, text, f"{after - before:+.2f}"]


def _differences(results: Results, model: str, data: str) -> Iterator[list[str]]:
    for entry in results["differences"]:
        task = entry["task"] if entry["task"] in paper.TABLES else "gsm8k"
        ks = [int(name[5:]) for name in entry if name.startswith("pass@")]
        for k in (1, PAPER_K):
            ours_k = min(k, max(ks))
            after, before = (
                _cell(task, paper.row_name(model, data, entry[training]), entry[setting], k)
                for training, setting in (("training", "setting"), ("minus", "minus_setting"))
            )
            if after is None or before is None or ours_k < min(k, 2):
                continue
            theirs = f"{after - before:+.1f} (@{k}" + (
                ")" if task == entry["task"] else f", {task})"
            )
            ours = percent(entry[f"pass@{ours_k}"], sign=True)
            yield [*_name(entry, ours_k), ours, theirs]


def _cell(task: str, row: str, setting: str, k: int) -> float | None:
    """A cell of the paper; of its best hard inference, the better one."""
    if setting != BEST_HARD:
        return paper.cell(task, row, setting, k)
    found = [paper.cell(task, row, hard, 1) for hard in HARD] if k == 1 else [None]
    return None if None in found else max(value for value in found if value is not None)


def _name(entry: Results, k: int) -> list[str]:
    """Difference, task and cell."""
    ours, theirs = (SHORT.get(entry[s], entry[s]) for s in ("setting", "minus_setting"))
    if entry["training"] == entry["minus"]:
        return [f"{entry['training']}: {ours} - {theirs}", entry["task"], f"@{k}"]
    return [f"{entry['training']} - {entry['minus']}", entry["task"], f"{ours}@{k}"]
