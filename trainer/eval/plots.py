"""Pictures of an evaluation, each as PNG and SVG, from the plain data of `results.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Results = Mapping[str, Any]
FORMATS = ("png", "svg")


def draw(results: Results, folder: Path) -> list[Path]:
    """pass@k curves, entropy profiles and length histograms of every task.

    Returns:
        The SVG files.

    Raises:
        ImportError: no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    # Fixed ids: the same results give the same file. Text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "softvllm", "svg.fonttype": "none"})
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for task in (entry["name"] for entry in results["tasks"]):
        for name, panel in (("pass_at_k", _passes), ("entropy", _entropy), ("lengths", _lengths)):
            path = _figure(results, task, name, panel, folder)
            out += [path] if path else []
    return out


def _figure(
    results: Results,
    task: str,
    name: str,
    panel: Callable[[Any, Mapping[str, Any]], bool],
    folder: Path,
) -> Path | None:
    """One panel a setting, one line a checkpoint."""
    from matplotlib import pyplot

    cells = [cell for cell in results["cells"] if cell["task"] == task]
    settings = [
        s["name"]
        for s in results["settings"]
        if name != "pass_at_k" or any(c["setting"] == s["name"] and c["samples"] > 1 for c in cells)
    ]
    if not settings:
        return None
    columns = min(3, len(settings))
    lines = -(-len(settings) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns, 3.4 * lines), squeeze=False, sharey=True
    )
    for axis, setting in zip(axes.flat, settings):
        drawn = [panel(axis, cell) for cell in cells if cell["setting"] == setting]
        axis.set_title(setting)
        axis.grid(alpha=0.3)
        if any(drawn):
            axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(settings) :]:
        axis.set_axis_off()
    figure.suptitle(f"{task}: {name.replace('_', ' ')}")
    figure.tight_layout()
    path = folder / f"{task}_{name}"
    for kind in FORMATS:
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(path.with_name(f"{path.name}.{kind}"), dpi=110, metadata=metadata)
    pyplot.close(figure)
    return path.with_name(f"{path.name}.svg")


def _passes(axis: Any, cell: Mapping[str, Any]) -> bool:
    ks = [int(k) for k in cell["pass"]]
    mean, low, high = zip(*cell["pass"].values())
    (line,) = axis.plot(ks, mean, label=cell["checkpoint"])
    axis.fill_between(ks, low, high, alpha=0.15, color=line.get_color())
    majority = cell["majority"] or {}  # none where the scorer does not say what it read
    votes = [values[0] for values in majority.values()]
    axis.plot([int(k) for k in majority], votes, "--", color=line.get_color(), lw=1)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("k")
    axis.set_ylabel("pass@k (dashed: majority@k)")
    return True


def _entropy(axis: Any, cell: Mapping[str, Any]) -> bool:
    counts = cell["samples_by_position"]
    # Positions that few samples reach say more about those samples than about the position.
    shown = [i for i, count in enumerate(counts) if count >= max(2, 0.05 * max(counts))]
    axis.plot(shown, [cell["entropy_by_position"][i] for i in shown], label=cell["checkpoint"])
    axis.set_xlabel("CoT position")
    axis.set_ylabel("entropy, nats")
    return True


def _lengths(axis: Any, cell: Mapping[str, Any]) -> bool:
    counts, edges = cell["lengths"]["counts"], cell["lengths"]["edges"]
    total = max(1, sum(counts))
    axis.stairs([count / total for count in counts], edges, label=cell["checkpoint"])
    axis.set_xlabel("think tokens")
    axis.set_ylabel("share of samples")
    return True
