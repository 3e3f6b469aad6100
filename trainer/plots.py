"""Pictures of runs.

`python -m trainer.plots RUN [RUN ...]` draws plots.png into every run's folder;
`python -m trainer.plots --together FILE RUN [RUN ...]` draws the runs' curves into one picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.logging import PROFILES, read_lines, read_metrics

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward/mean",)),
    ("solved", ("reward/correct", "reward/any_correct", "validation/accuracy")),
    ("think tokens", ("rollout/think_tokens",)),
    ("entropy, nats", ("rollout/entropy",)),
    ("gaussian distance (1)", ("agree/gaussian_distance",)),
    ("mean gap, sigmas", ("agree/mean_gap", "agree/rounding_floor")),
    ("gradient", ("grad/norm",)),
    ("seconds", ("time/rollout", "time/train", "time/sync")),
)

TOGETHER: tuple[tuple[str, str], ...] = (
    ("reward of the batch", "reward/mean"),
    ("share solved in the batch", "reward/correct"),
    ("greedy accuracy, held out", "validation/accuracy"),
    ("think tokens", "rollout/think_tokens"),
    ("entropy of think steps, nats", "rollout/entropy"),
    ("gradient", "grad/norm"),
)


def draw(run: Path, out: Path | None = None) -> Path:
    """One picture with the run's curves. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(run)
    figure, axes = pyplot.subplots(3, 3, figsize=(15, 11))
    _profiles(axes.flat[len(PANELS)], read_lines(run / PROFILES))
    for axis, (title, names) in zip(axes.flat, PANELS):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                dots = "o-" if name.startswith("validation") or len(points) < 3 else "-"
                axis.plot(*zip(*points), dots, label=name, markersize=4)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(run.name)
    figure.tight_layout()
    path = out or run / "plots.png"
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path


def draw_together(runs: Sequence[Path], out: Path, window: int = 5) -> Path:
    """One picture with a panel for each quantity and a line for each run.

    Lines are running means over `window` steps (fewer at the start), as single batches are noisy.
    The file's ending decides its format.

    Raises:
        ValueError: a folder holds no metrics, or two folders have one name.
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if len({run.name for run in runs}) < len(runs):
        raise ValueError(
            "two of these runs have the same name; the picture could not tell them apart"
        )
    curves = {run.name: read_metrics(run) for run in runs}
    for run in runs:
        if not curves[run.name]:
            raise ValueError(f"{run} holds no metrics.jsonl with steps; name a run's folder")
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8))
    for axis, (title, name) in zip(axes.flat, TOGETHER):
        for label, rows in curves.items():
            steps = [row["step"] for row in rows if name in row]
            values = [row[name] for row in rows if name in row]
            if name.startswith("validation"):
                axis.plot(steps, values, "o-", label=label, markersize=4)
            else:
                axis.plot(steps, running_mean(values, window), label=label)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if name == "grad/norm":
            axis.set_yscale("log")
    axes.flat[0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=90)
    pyplot.close(figure)
    return out


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to `window - 1` before it."""
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))
    ]


def _profiles(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Entropy along the chain at a few moments of the run, where half of the chains get."""
    for at in sorted({0, len(rows) // 3, 2 * len(rows) // 3, len(rows) - 1}) if rows else ():
        row = rows[at]
        enough = [e for e, n in zip(row["entropy"], row["count"]) if 2 * n >= row["count"][0]]
        axis.plot(enough, label=f"step {row['step']}")
    axis.set_title("entropy by think position, nats")
    axis.set_xlabel("position")
    axis.grid(alpha=0.3)
    if rows:
        axis.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; raises SystemExit with a clear word for a folder that is no run."""
    parser = argparse.ArgumentParser(prog="python -m trainer.plots", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--together", type=Path, metavar="FILE", help="one picture of all runs (.png, .svg, .pdf)"
    )
    asked = parser.parse_args(arguments)
    for run in asked.runs:
        if not (run / "metrics.jsonl").is_file():
            parser.error(f"{run} is not a run: it has no metrics.jsonl")
    if asked.together is None:
        for run in asked.runs:
            print(draw(run))
        return 0
    try:
        print(draw_together(asked.runs, asked.together))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
