"""Pictures of a run: `python -m trainer.plots RUN [RUN ...]` draws plots.png."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.logging import read_metrics

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
    figure, axes = pyplot.subplots(2, 4, figsize=(18, 7))
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


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)))
