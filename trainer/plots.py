"""Pictures of a run: `python -m trainer.plots RUN [RUN ...]` draws plots.png."""

from __future__ import annotations

import sys
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


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)))
