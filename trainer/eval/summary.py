"""From rows to `results.json`: every number of a cell, of a training, and paired differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.eval import metrics
from trainer.eval.checkpoints import Checkpoint
from trainer.eval.plan import Cell
from trainer.eval.store import Row

LENGTH_BINS = 32
REFERENCES = ("hard", "none")
"""Trainings that others are compared with."""
HARD = ("hard-greedy", "hard-sample")
BEST_HARD = "best hard"
"""The better of `HARD`, as an entry of `differences` names it."""
PAPER_K = 32
"""The paper's pass@k of sampled settings."""


@dataclass(frozen=True)
class CellResult:
    """A cell's numbers, and per problem what pairs with other checkpoints."""

    checkpoint: Checkpoint
    cell: Cell
    numbers: dict[str, Any]
    per_problem: np.ndarray
    """pass@k, float64 [P, n]."""


def interval(values: np.ndarray, replicates: int, seed: int, bounded: bool = True) -> list[Any]:
    """[mean, low, high] of one number per problem; no ends of a single unbounded one."""
    ends = (0.0, 1.0) if bounded else (-np.inf, np.inf)
    mean, low, high = metrics.mean_interval(np.asarray(values)[:, None], replicates, seed, *ends)
    return [rounded(mean[0]), rounded(low[0]), rounded(high[0])]


def of_cell(
    checkpoint: Checkpoint, cell: Cell, rows: Sequence[Row], replicates: int, seed: int
) -> CellResult:
    """All numbers of one cell; docs/evaluation.md says what each means."""
    n, problems = cell.samples, cell.task.problems
    groups = [rows[at : at + n] for at in range(0, len(rows), n)]
    correct = np.array([sum(row.correct for row in group) for group in groups])
    passes = metrics.pass_at_k(correct, n)
    mean, low, high = metrics.mean_interval(passes, replicates, seed, 0.0, 1.0)
    readable = _answers_are_read(cell, rows)
    votes = [metrics.vote_classes([r.extracted for r in g], [r.correct for r in g]) for g in groups]
    whole = [row for row in rows if row.error is None]
    think = np.array([row.think_tokens for row in whole])
    entropies = [row.entropy for row in whole]
    curve, counts = metrics.profile(entropies)
    seen = np.array([p.id in cell.task.seen for p in problems])

    def per_problem(number: Any) -> np.ndarray:
        return np.array([number(group) for group in groups], dtype=np.float64)

    boxed = per_problem(lambda g: np.mean([r.extracted is not None for r in g]))
    thought = [[r.end == "budget" for r in g if r.error is None] for g in groups]
    capped = np.array([np.mean(ends) for ends in thought if ends])  # as `end`: of whole samples
    numbers: dict[str, Any] = {
        "problems": len(problems),
        "samples": n,
        "pass": {
            str(k): [rounded(mean[k - 1]), rounded(low[k - 1]), rounded(high[k - 1])]
            for k in range(1, n + 1)
        },
        "majority": {
            str(k): interval(np.array([metrics.majority(v, k) for v in votes]), replicates, seed)
            for k in metrics.ks(n)
        }
        if readable
        else None,
        "boxed": interval(boxed, replicates, seed) if readable else None,
        # Nothing is cut where no thought was asked for.
        "capped": interval(capped, replicates, seed)
        if cell.task.max_think_tokens and whole
        else None,
        "distinct": interval(
            np.array([metrics.distinct(v) for v in votes], float), replicates, seed, bounded=False
        )
        if readable
        else None,
        "end": {
            k: c / max(1, len(whole)) for k, c in sorted(Counter(r.end for r in whole).items())
        },
        "think_tokens": _spread(think),
        "answer_tokens": rounded(np.mean([r.answer_tokens for r in whole]) if whole else None),
        "answer_cut": rounded(np.mean([r.finish == "length" for r in whole]) if whole else None),
        "entropy": _mean_entropy(groups, replicates, seed),
        "entropy_by_position": [rounded(value) for value in curve],
        "samples_by_position": counts,
        "lengths": _histogram(think, cell.task.max_think_tokens),
        "failed_samples": sum(row.error is not None for row in rows),
        "failed_verifications": sum(row.judge is not None for row in rows),
        "seen_problems": int(seen.sum()),
    }
    if seen.any():
        for name, part in (("seen", seen), ("unseen", ~seen)):
            if part.any():
                numbers[f"pass1_{name}"] = interval(passes[part, 0], replicates, seed)
                numbers[f"passn_{name}"] = interval(passes[part, -1], replicates, seed)
    return CellResult(checkpoint, cell, numbers, passes)


def _answers_are_read(cell: Cell, rows: Sequence[Row]) -> bool:
    """Whether the scorer says what it read. One that returns a number only does not: its wrong
    answers would never vote, and every majority would be pass@k."""
    if any(row.correct and row.extracted is None for row in rows):
        return False
    own = ":" in cell.task.reward  # a function of the user's
    return not own or any(row.extracted is not None for row in rows)


def _mean_entropy(groups: Sequence[Sequence[Row]], replicates: int, seed: int) -> list[Any] | None:
    """[mean, low, high] over think steps, problems resampled; None where nothing was thought."""
    steps = [[e for row in group if row.error is None for e in row.entropy] for group in groups]
    sums, counts = np.array([sum(part) for part in steps]), np.array([len(part) for part in steps])
    if not counts.sum():
        return None
    return [rounded(v) for v in metrics.ratio_interval(sums, counts, replicates, seed)]


def groups(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """[mean, standard deviation] over training seeds, for trainings with several."""
    out = []
    for (training, task, setting), members in _by_training(results).items():
        if len(members) < 2:
            continue
        values = np.stack([member.per_problem.mean(axis=0) for member in members])  # [seeds, n]
        votes = [member.numbers["majority"] for member in members]
        entropies = [member.numbers["entropy"] for member in members]
        out.append(
            {
                "training": training,
                "task": task,
                "setting": setting,
                "seeds": [member.checkpoint.seed for member in members],
                "pass": {str(k + 1): over_seeds(values[:, k]) for k in range(values.shape[1])},
                "majority": {k: over_seeds([v[k][0] for v in votes]) for k in votes[0]}
                if all(votes)
                else None,
                "entropy": over_seeds([e[0] for e in entropies]) if all(entropies) else None,
            }
        )
    return out


def over_seeds(values: Sequence[float] | np.ndarray) -> list[Any]:
    """[mean, standard deviation] of at least two."""
    return [rounded(np.mean(values)), rounded(np.std(values, ddof=1))]


def differences(results: Sequence[CellResult], replicates: int, seed: int) -> list[dict[str, Any]]:
    """Paired differences of pass@1, pass@n and the paper's pass@32, with intervals over problems.

    An entry is (training, setting) minus (minus, minus_setting) on one task: first trainings minus
    `hard` and minus `none` in the same setting, and of their best hard inference (pass@1); then, of
    every training, settings minus hard inference of the same kind. Several seeds of a training are
    averaged first; the interval does not contain the spread between seeds.
    """
    averaged = {
        key: np.mean([member.per_problem for member in members], axis=0)  # [P, n]
        for key, members in _by_training(results).items()
    }
    greedy = {r.cell.setting.name: r.cell.setting.greedy for r in results}
    out, best, within = [], [], []
    for (training, task, setting), ours in averaged.items():
        for reference in REFERENCES:
            theirs = averaged.get((reference, task, setting))
            if training not in (reference, "none") and theirs is not None:
                names = _names(training, reference, task, setting, setting)
                out.append(names | _paired(ours, theirs, replicates, seed))
        hard = "hard-greedy" if greedy[setting] else "hard-sample"
        theirs = averaged.get((training, task, hard))
        if setting not in HARD and theirs is not None:
            names = _names(training, training, task, setting, hard)
            within.append(names | _paired(ours, theirs, replicates, seed))
    for training, task in dict.fromkeys(key[:2] for key in averaged):
        for reference in REFERENCES:
            columns = [
                [averaged[at][:, 0] for s in HARD if (at := (of, task, s)) in averaged]
                for of in (training, reference)
            ]
            if training not in (reference, "none") and all(len(c) == len(HARD) for c in columns):
                pair = [np.stack(c, axis=1) for c in columns]  # [P, 2] each
                values = metrics.best_difference(pair[0], pair[1], replicates, seed)
                names = _names(training, reference, task, BEST_HARD, BEST_HARD)
                best.append(names | {"pass@1": [rounded(v) for v in values]})
    return out + best + within


def _names(
    training: str, minus: str, task: str, setting: str, minus_setting: str
) -> dict[str, Any]:
    return {
        "training": training,
        "minus": minus,
        "task": task,
        "setting": setting,
        "minus_setting": minus_setting,
    }


def _paired(
    ours: np.ndarray, theirs: np.ndarray, replicates: int, seed: int
) -> dict[str, list[Any]]:
    n = ours.shape[1]
    out = {}
    for k in sorted({1, min(PAPER_K, n), n}):
        values = (ours - theirs)[:, k - 1 : k]
        ends = metrics.mean_interval(values, replicates, seed, -1.0, 1.0)
        out[f"pass@{k}"] = [rounded(end[0]) for end in ends]
    return out


def _by_training(
    results: Sequence[CellResult],
) -> Mapping[tuple[str, str, str], list[CellResult]]:
    out: dict[tuple[str, str, str], list[CellResult]] = {}
    for r in results:
        key = (r.checkpoint.training, r.cell.task.name, r.cell.setting.name)
        out.setdefault(key, []).append(r)
    return out


def _spread(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {}
    p5, p50, p95 = np.percentile(values, [5, 50, 95])
    return {"mean": rounded(values.mean()), "p5": p5, "median": p50, "p95": p95}


def _histogram(values: np.ndarray, limit: int) -> dict[str, list[Any]]:
    counts, edges = np.histogram(values, bins=min(LENGTH_BINS, limit + 1), range=(0, limit + 1))
    return {"edges": [rounded(edge) for edge in edges], "counts": counts.tolist()}


def rounded(value: Any) -> float | None:
    """Ten digits: enough to be exact for people, few enough to hide the order of a sum."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.10g}")
