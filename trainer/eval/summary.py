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


@dataclass(frozen=True)
class CellResult:
    """A cell's numbers, and per problem what pairs with other checkpoints."""

    checkpoint: Checkpoint
    cell: Cell
    numbers: dict[str, Any]
    per_problem: np.ndarray
    """pass@k, float64 [P, n]."""


def interval(values: np.ndarray, replicates: int, seed: int, bounded: bool = True) -> list[Any]:
    """[mean, low, high] of one number per problem."""
    ends = (0.0, 1.0) if bounded else (-np.inf, np.inf)
    mean, low, high = metrics.mean_interval(np.asarray(values)[:, None], replicates, seed, *ends)
    return [_round(mean[0]), _round(low[0]), _round(high[0])]


def of_cell(
    checkpoint: Checkpoint, cell: Cell, rows: Sequence[Row], replicates: int, seed: int
) -> CellResult:
    """All numbers of one cell; docs/evaluation.md says what each means."""
    n, problems = cell.samples, cell.task.problems
    groups = [rows[at : at + n] for at in range(0, len(rows), n)]
    correct = np.array([sum(row.correct for row in group) for group in groups])
    passes = metrics.pass_at_k(correct, n)
    mean, low, high = metrics.mean_interval(passes, replicates, seed, 0.0, 1.0)
    votes = [metrics.vote_classes([r.extracted for r in g], [r.correct for r in g]) for g in groups]
    whole = [row for row in rows if row.error is None]
    think = np.array([row.think_tokens for row in whole])
    entropies = [row.entropy for row in whole]
    curve, counts = metrics.profile(entropies)
    seen = np.array([p.id in cell.task.seen for p in problems])

    def per_problem(number: Any) -> np.ndarray:
        return np.array([number(group) for group in groups], dtype=np.float64)

    boxed = per_problem(lambda g: np.mean([r.extracted is not None for r in g]))
    capped = per_problem(lambda g: np.mean([r.end == "budget" for r in g]))
    numbers: dict[str, Any] = {
        "problems": len(problems),
        "samples": n,
        "pass": {
            str(k): [_round(mean[k - 1]), _round(low[k - 1]), _round(high[k - 1])]
            for k in range(1, n + 1)
        },
        "majority": {
            str(k): interval(np.array([metrics.majority(v, k) for v in votes]), replicates, seed)
            for k in metrics.ks(n)
        },
        "boxed": interval(boxed, replicates, seed),
        "capped": interval(capped, replicates, seed),
        "distinct": interval(
            np.array([metrics.distinct(v) for v in votes], float), replicates, seed, bounded=False
        ),
        "end": {
            k: c / max(1, len(whole)) for k, c in sorted(Counter(r.end for r in whole).items())
        },
        "think_tokens": _spread(think),
        "answer_tokens": _round(np.mean([r.answer_tokens for r in whole]) if whole else None),
        "answer_cut": _round(np.mean([r.finish == "length" for r in whole]) if whole else None),
        "entropy": _round(np.mean(np.concatenate(entropies)) if any(entropies) else None),
        "entropy_by_position": [_round(value) for value in curve],
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
    return CellResult(checkpoint, cell, numbers, passes)


def groups(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """Mean and standard deviation over training seeds, for trainings with several."""
    out = []
    for (training, task, setting), members in _by_training(results).items():
        if len(members) < 2:
            continue
        values = np.stack([member.per_problem.mean(axis=0) for member in members])  # [seeds, n]
        out.append(
            {
                "training": training,
                "task": task,
                "setting": setting,
                "seeds": [member.checkpoint.seed for member in members],
                "pass": {
                    str(k + 1): [_round(values[:, k].mean()), _round(values[:, k].std(ddof=1))]
                    for k in range(values.shape[1])
                },
            }
        )
    return out


def differences(results: Sequence[CellResult], replicates: int, seed: int) -> list[dict[str, Any]]:
    """pass@1 and pass@n of every training minus those of `hard` and of `none`, on the same
    problems, with intervals over problems. Several seeds of a training are averaged first; the
    interval does not contain the spread between seeds."""
    out = []
    by_training = _by_training(results)
    for (training, task, setting), members in by_training.items():
        for reference in ("hard", "none"):
            others = by_training.get((reference, task, setting))
            if training in (reference, "none") or not others:
                continue
            ours, theirs = (np.mean([m.per_problem for m in g], axis=0) for g in (members, others))
            n = ours.shape[1]
            entry: dict[str, Any] = {
                "training": training,
                "minus": reference,
                "task": task,
                "setting": setting,
            }
            for k in sorted({1, n}):
                values = (ours - theirs)[:, k - 1]
                mean, low, high = metrics.mean_interval(
                    values[:, None], replicates, seed, -1.0, 1.0
                )
                entry[f"pass@{k}"] = [_round(mean[0]), _round(low[0]), _round(high[0])]
            out.append(entry)
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
    return {"mean": _round(values.mean()), "p5": p5, "median": p50, "p95": p95}


def _histogram(values: np.ndarray, limit: int) -> dict[str, list[Any]]:
    counts, edges = np.histogram(values, bins=min(LENGTH_BINS, limit + 1), range=(0, limit + 1))
    return {"edges": [_round(edge) for edge in edges], "counts": counts.tolist()}


def _round(value: Any) -> float | None:
    """Ten digits: enough to be exact for people, few enough to hide the order of a sum."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.10g}")
