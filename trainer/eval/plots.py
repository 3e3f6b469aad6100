"""Pictures of an evaluation, each as PNG and SVG, from the plain data of `results.json`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Results = Mapping[str, Any]
FORMATS = ("png", "svg")
PLAIN: dict[str, Any] = {"parse_math": False}
"""For names that people gave: a dollar sign in one begins no formula."""


def draw(results: Results, folder: Path) -> list[Path]:
    """pass@k curves, entropy profiles and length histograms of every task. A picture that cannot be
    drawn or written is left out and told on standard error: the numbers are worth more.

    Returns:
        The SVG files that were written.

    Raises:
        ImportError: no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    # Fixed ids: the same results give the same file. Text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "softvllm", "svg.fonttype": "none"})
    out = []
    for task in (entry["name"] for entry in results["tasks"]):
        for name, panel in (("pass_at_k", _passes), ("entropy", _entropy), ("lengths", _lengths)):
            path = folder / f"{task}_{name}"
            files = [path.with_name(f"{path.name}.{kind}") for kind in FORMATS]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if _figure(results, task, name, panel, files):
                    out.append(files[-1])
            except Exception as error:
                print(f"no plot {path.name}: {error}", file=sys.stderr)
                _remove(files)
    return out


def _remove(files: Sequence[Path]) -> None:
    """An older picture would be taken for one of these numbers."""
    with suppress(OSError, ValueError):
        for file in files:
            file.unlink(missing_ok=True)


def _figure(
    results: Results,
    task: str,
    name: str,
    panel: Callable[[Any, Mapping[str, Any], Any], None],
    files: Sequence[Path],
) -> bool:
    """One panel a setting, one line a checkpoint, of one colour in all panels; False: none to
    show."""
    from matplotlib import pyplot

    cells = [cell for cell in results["cells"] if cell["task"] == task]
    settings = [
        s["name"]
        for s in results["settings"]
        if name != "pass_at_k" or any(c["setting"] == s["name"] and c["samples"] > 1 for c in cells)
    ]
    if not settings:
        return False
    columns = min(3, len(settings))
    lines = -(-len(settings) // columns)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(4.6 * columns, 3.4 * lines + 0.3),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    try:
        colours = _colours(list(dict.fromkeys(cell["checkpoint"] for cell in cells)))
        for axis, setting in zip(axes.flat, settings):
            for cell in cells:
                if cell["setting"] == setting:
                    panel(axis, cell, colours[cell["checkpoint"]])
            axis.set_title(setting, **PLAIN)
            axis.grid(alpha=0.3)
        for axis in list(axes.flat)[len(settings) :]:
            axis.set_axis_off()
        figure.suptitle(f"{task}: {name.replace('_', ' ')}", **PLAIN)
        # Below the panels: in them it would hide curves.
        found = {
            label: line
            for axis in axes.flat
            for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        legend = figure.legend(
            [found[label] for label in colours if label in found],
            [label for label in colours if label in found],
            loc="outside lower center",
            ncols=2 * columns,
            fontsize=8,
        )
        for text in legend.get_texts():
            text.set(**PLAIN)
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else {"Software": None}
            figure.savefig(file, dpi=110, metadata=metadata)
    finally:
        pyplot.close(figure)
    return True


def _colours(checkpoints: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(checkpoints) <= 10 else "tab20"]
    return {name: palette(i % palette.N) for i, name in enumerate(checkpoints)}


def _passes(axis: Any, cell: Mapping[str, Any], colour: Any) -> None:
    ks = [int(k) for k in cell["pass"]]
    mean, low, high = zip(*cell["pass"].values())
    axis.plot(ks, mean, label=cell["checkpoint"], color=colour)
    axis.fill_between(ks, low, high, alpha=0.15, color=colour)
    majority = cell["majority"] or {}  # none where the scorer does not say what it read
    votes = [values[0] for values in majority.values()]
    axis.plot([int(k) for k in majority], votes, "--", color=colour, lw=1)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel("k")
    axis.set_ylabel("pass@k (dashed: majority@k)")


def _entropy(axis: Any, cell: Mapping[str, Any], colour: Any) -> None:
    counts = cell["samples_by_position"]
    # Positions that few samples reach say more about those samples than about the position.
    least = min(max(counts, default=0), max(2, 0.05 * max(counts, default=0)))
    shown = [i for i, count in enumerate(counts) if count >= least]
    entropy = [cell["entropy_by_position"][i] for i in shown]
    axis.plot(shown, entropy, label=cell["checkpoint"], color=colour)
    axis.set_xlabel("CoT position")
    axis.set_ylabel("entropy, nats")


def _lengths(axis: Any, cell: Mapping[str, Any], colour: Any) -> None:
    counts, edges = cell["lengths"]["counts"], cell["lengths"]["edges"]
    total = max(1, sum(counts))
    shares = [count / total for count in counts]
    axis.stairs(shares, edges, label=cell["checkpoint"], color=colour)
    axis.set_xlabel("think tokens")
    axis.set_ylabel("share of samples")
