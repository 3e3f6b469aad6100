"""Whole rows of tables, plotted curves and the paper's tables, each with numbers of its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.eval import paper, plots, tables

Numbers = dict[str, Any]


def passes(*means: float) -> dict[str, list[float]]:
    """pass@1, pass@2 ... with intervals of one point less to two more."""
    return {str(k): [mean, mean - 0.01, mean + 0.02] for k, mean in enumerate(means, 1)}


def cell(training: str, task: str, setting: str, *means: float, **given: Any) -> Numbers:
    return {
        "checkpoint": f"{training}-0",
        "training": training,
        "task": task,
        "setting": setting,
        "problems": 50,
        "samples": len(means),
        "pass": passes(*means),
        "majority": {"1": [0.05] * 3, "2": [0.06] * 3, "4": [0.55, 0.51, 0.58]},
        "boxed": [0.61, 0.6, 0.63],
        "capped": [0.17, 0.16, 0.19],
        "distinct": [2.34, 2.3, 2.4],
        "end": {"budget": 0.14, "end_sequence": 0.72, "eos": 0.15},
        "think_tokens": {"mean": 30.4, "p5": 4.1, "median": 25.0, "p95": 63.0},
        "answer_cut": 0.09,
        "entropy": [1.85, 1.75, 1.95],
        "entropy_by_position": [1.2, 0.7, 1.9],
        "samples_by_position": [200, 40, 9],
        "lengths": {"edges": [0, 2, 4, 6], "counts": [5, 20, 15]},
        "failed_samples": 2,
        "failed_verifications": 3,
        "seen_problems": 0,
        **given,
    }


def evaluation(cells: list[Numbers], **given: Any) -> Numbers:
    def named(key: str, **more: Any) -> list[Numbers]:
        return [{"name": name, **more} for name in dict.fromkeys(c[key] for c in cells)]

    points = {c["checkpoint"]: c["training"] for c in cells}
    return {
        "checkpoints": [{"name": name, "training": of} for name, of in points.items()],
        "tasks": named("task", problems=50, dropped=[]),
        "settings": named("setting"),
        "cells": cells,
        "groups": [],
        "differences": [],
        "choice": [],
        "kl": [],
        **given,
    }


def rows(found: Numbers) -> dict[str, list[list[str]]]:
    built = tables.build(found)
    for table in built:
        assert {len(row) for row in table.rows} == {len(table.columns)}
    return {table.name: table.rows for table in built}


CELLS = [
    cell("none", "gsm8k", "hard-greedy", 0.11),
    cell("none", "gsm8k", "hard-sample", 0.12, 0.13, 0.14, 0.15),
    cell("none", "sums", "hard-greedy", 0.21),
    cell("none", "sums", "hard-sample", 0.22, 0.23, 0.24, 0.25),
    cell("soft", "gsm8k", "hard-greedy", 0.31),
    cell("soft", "gsm8k", "hard-sample", 0.32, 0.33, 0.34, 0.35),
    cell("soft", "sums", "hard-greedy", 0.41),
    cell("soft", "sums", "hard-sample", 0.42, 0.43, 0.44, 0.45),
]


def test_hard_inference_shows_greedy_then_sampled_then_any_of_n() -> None:
    made = rows(evaluation(CELLS))
    assert made["hard"] == [
        [
            "none",
            "11.0 [10.0, 13.0] / 12.0 [11.0, 14.0] / 15.0 [14.0, 17.0]",
            "21.0 [20.0, 23.0] / 22.0 [21.0, 24.0] / 25.0 [24.0, 27.0]",
        ],
        [
            "soft",
            "31.0 [30.0, 33.0] / 32.0 [31.0, 34.0] / 35.0 [34.0, 37.0]",
            "41.0 [40.0, 43.0] / 42.0 [41.0, 44.0] / 45.0 [44.0, 47.0]",
        ],
    ]
    numbers = ["41.0 [40.0, 43.0]", "42.0 [41.0, 44.0]", "45.0 [44.0, 47.0]"]
    assert made["grid-sums"][1] == ["soft", *numbers]


def test_beside_the_accuracy_stands_everything_in_its_column() -> None:
    group = {
        "training": "soft",
        "task": "gsm8k",
        "setting": "hard-sample",
        "seeds": [0, 1],
        "pass": {"1": [0.71, 0.01], "2": [0.72, 0.02], "4": [0.74, 0.04]},
        "majority": {"1": [0.81, 0.05], "2": [0.82, 0.06], "4": [0.84, 0.07]},
        "entropy": [1.31, 0.21],
    }
    made = rows(evaluation(CELLS, groups=[group]))["beside-gsm8k"]
    rest = ["61.0", "30.4 (4-63)", "17.0", "9.0", "end_sequence 72, eos 15", "1.85 [1.75, 1.95]"]
    rest += ["2.34", "5"]
    assert made[2] == ["soft-0, hard-greedy", "31.0 [30.0, 33.0]", "", *rest]
    assert made[3] == ["soft-0, hard-sample", "32.0 [31.0, 34.0]", "55.0 [51.0, 58.0]", *rest]
    name = "soft, 2 seeds, hard-sample"
    assert made[4:] == [[name, "71.0 ± 1.0", "84.0 ± 7.0", *[""] * 5, "1.31 ± 0.21", "", ""]]


def test_seen_problems_stand_before_the_others() -> None:
    parts = {
        "pass1_seen": [0.51, 0.5, 0.53],
        "pass1_unseen": [0.61, 0.6, 0.63],
        "passn_seen": [0.71, 0.7, 0.73],
        "passn_unseen": [0.81, 0.8, 0.83],
    }
    found = evaluation([CELLS[1] | parts | {"seen_problems": 7}])
    numbers = ["51.0 [50.0, 53.0]", "61.0 [60.0, 63.0]", "71.0 [70.0, 73.0]", "81.0 [80.0, 83.0]"]
    assert rows(found)["seen-gsm8k"] == [["none-0, hard-sample", *numbers]]


def test_differences_show_one_sample_and_any_of_n() -> None:
    names = {"training": "soft", "minus": "hard", "task": "gsm8k"}
    setting = {"setting": "hard-sample", "minus_setting": "hard-sample"}
    numbers = {"pass@1": [0.01, -0.02, 0.03], "pass@32": [0.04, -0.05, 0.06]}
    entry = names | setting | numbers | {"pass@64": [-0.07, -0.08, 0.09]}
    found = rows(evaluation(CELLS, differences=[entry]))["differences"]
    ours = ["+1.0 [-2.0, 3.0]", "@64: -7.0 [-8.0, 9.0]"]
    assert found == [["soft - hard", "gsm8k", "hard-sample", *ours]]


def choice(at: float) -> Numbers:
    return {
        "accuracy": [at, at - 0.01, at + 0.02],
        "accuracy_per_byte": [at + 0.1, at + 0.07, at + 0.14],
        "nll_per_token": [at + 1, at + 0.5, at + 2],
    }


def test_out_of_domain_every_number_stands_in_its_column() -> None:
    names = {"checkpoint": "soft-0", "training": "soft"}
    kl = {
        "kl": [0.011, 0.01, 0.012],
        "kl_reverse": [0.021, 0.02, 0.022],
        "nll": [2.5, None, None],  # of a single text
        "base_nll": [2.4, 2.3, 2.6],
    }
    seeds = {"training": "soft", "seeds": [0, 1]}
    spreads = {"accuracy": [0.41, 0.01], "accuracy_per_byte": [0.42, 0.02]}
    groups = [
        seeds | {"set": "arc"} | spreads | {"nll_per_token": [1.43, 0.03]},
        seeds | {"set": "mmlu"} | {k: choice(0.7)[k][:2] for k in choice(0.7)},
        seeds | {"set": "text", "kl": [0.1, 0.2], "kl_reverse": [0.3, 0.4], "nll": [1.5, 0.6]},
    ]
    pair = {"training": "soft", "minus": "none"}
    differences = [
        pair | {"set": "arc"} | choice(-0.2),
        pair | {"set": "text"} | kl,
    ]
    found = evaluation(
        [],
        choice=[names | {"set": "arc"} | choice(0.2), names | {"set": "mmlu"} | choice(0.5)],
        kl=[names | kl],
        drift={"groups": groups, "differences": differences},
    )
    made = rows(found)
    assert made["choice"] == [
        [
            "soft-0",
            *("20.0 [19.0, 22.0]", "30.0 [27.0, 34.0]", "1.200 [0.700, 2.200]"),
            *("50.0 [49.0, 52.0]", "60.0 [57.0, 64.0]", "1.500 [1.000, 2.500]"),
        ],
        [
            "soft, 2 seeds",
            *("41.0 ± 1.0", "42.0 ± 2.0", "1.430 ± 0.030"),
            *("70.0 ± 69.0", "80.0 ± 77.0", "1.700 ± 1.200"),
        ],
    ]
    numbers = ["0.011 [0.010, 0.012]", "0.021 [0.020, 0.022]", "2.500"]
    assert made["kl"] == [
        ["soft-0", *numbers, "2.400 [2.300, 2.600]"],
        ["soft, 2 seeds", "0.100 ± 0.200", "0.300 ± 0.400", "1.500 ± 0.600", ""],
    ]
    numbers = ["-20.0 [-21.0, -18.0]", "-10.0 [-13.0, -6.0]", "+0.800 [0.300, 1.800]"]
    assert made["choice-differences"] == [["soft - none", "arc", *numbers]]
    numbers = ["+0.011 [0.010, 0.012]", "+0.021 [0.020, 0.022]", "+2.500"]
    assert made["kl-differences"] == [["soft - none", *numbers]]


# ---- plots ---------------------------------------------------------------------------------------


def drawn(found: Numbers, folder: Path, patch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The axes of every plot by the panel's title."""
    from matplotlib import pyplot

    figures: list[Any] = []
    patch.setattr(plots, "FORMATS", ("svg",))
    patch.setattr(pyplot, "close", figures.append)
    names = [path.stem.partition("_")[2] for path in plots.draw(found, folder)]
    return {
        name: {axis.get_title(): axis for axis in figure.axes}
        for name, figure in zip(names, figures, strict=True)
    }


def test_plots_show_the_numbers_of_their_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {
        "majority": None,
        "entropy_by_position": [0.4, 0.6, 0.5],
        "samples_by_position": [3, 2, 1],
        "lengths": {"edges": [0, 3, 6], "counts": [1, 3]},
    }
    alone = {"entropy_by_position": [0.3, 0.2], "samples_by_position": [1, 1]}
    cells = [
        cell("none", "gsm8k", "hard-greedy", 0.2, **alone),
        cell("none", "gsm8k", "hard-sample", 0.12, 0.13, 0.14, 0.15),
        cell("soft", "gsm8k", "soft-sample", 0.32, 0.33, 0.35, 0.39, **other),
    ]
    made = drawn(evaluation(cells), tmp_path, monkeypatch)

    def lines(name: str, panel: str) -> list[tuple[list[float], list[float]]]:
        found = made[name][panel].get_lines()
        return [(list(line.get_xdata()), list(line.get_ydata())) for line in found]

    curve, votes = lines("pass_at_k", "hard-sample")
    assert curve == ([1, 2, 3, 4], [0.12, 0.13, 0.14, 0.15])
    assert votes == ([1, 2, 4], [0.05, 0.06, 0.55])
    (band,) = made["pass_at_k"]["hard-sample"].collections
    shown = {(int(k), round(float(y), 9)) for k, y in band.get_paths()[0].vertices}
    low, high = (list(enumerate(ys, 1)) for ys in ([11, 12, 13, 14], [14, 15, 16, 17]))
    assert shown == {(k, y / 100) for k, y in low + high}
    curve, votes = lines("pass_at_k", "soft-sample")
    assert curve == ([1, 2, 3, 4], [0.32, 0.33, 0.35, 0.39]) and votes == ([], [])
    assert "hard-greedy" not in made["pass_at_k"]

    # A position that a single sample reached, or less than a twentieth of all, is not shown ...
    assert lines("entropy", "hard-sample") == [([0, 1], [1.2, 0.7])]
    assert lines("entropy", "soft-sample") == [([0, 1], [0.4, 0.6])]
    # ... but for one problem's only sample.
    assert lines("entropy", "hard-greedy") == [([0, 1], [0.3, 0.2])]

    for panel, label, shares, edges in (
        ("hard-sample", "none-0", [0.125, 0.5, 0.375], [0, 2, 4, 6]),
        ("soft-sample", "soft-0", [0.25, 0.75], [0, 3, 6]),
    ):
        (steps,) = made["lengths"][panel].patches
        values = steps.get_data()
        assert steps.get_label() == label
        assert (list(values.values), list(values.edges)) == (shares, edges)


# ---- the paper's tables --------------------------------------------------------------------------

TRAINED = [("L3B", "gsm8k"), ("L3B", "math"), ("L3B", "deepscaler"), ("L8B", "gsm8k")]
TRAINED += [("Q3B", "math")]


@pytest.mark.parametrize(
    ("setting", "k", "training", "gain", "wins"),
    [
        # The same as from the paper's Table 1, whose single samples differ by up to 0.4.
        ("hard-sample", 32, "fuzzy", 8.6, 14),
        ("hard-sample", 32, "soft", 8.9, 14),
        ("hard-greedy", 1, "fuzzy", 2.9, 7),
        ("hard-greedy", 1, "soft", 1.9, 6),
        ("hard-sample", 1, "fuzzy", -3.2, 4),
        ("hard-sample", 1, "soft", -2.6, 4),
    ],
)
def test_the_papers_soft_trainings_gain_at_32_samples_what_they_lose_at_one(
    setting: str, k: int, training: str, gain: float, wins: int
) -> None:
    gains = []
    for model, data in TRAINED:
        for task in paper.TABLES:
            ours, hard = (
                paper.cell(task, paper.row_name(model, data, name), setting, k)
                for name in (training, "hard")
            )
            assert ours is not None and hard is not None
            gains.append(ours - hard)
    assert len(gains) == 15
    assert np.mean(gains) == pytest.approx(gain, abs=0.05)
    assert sum(g > 0 for g in gains) == wins


def test_every_rate_of_the_paper_grows_with_samples_and_out_of_domain_hard_training_costs() -> None:
    for text in paper.TABLES.values():
        for values in paper._rows(text).values():
            assert all(values[at] < values[at + 1] for at in (1, 4, 7))
    for model, data in TRAINED:
        nll = {
            training: paper.out_of_domain(
                "arc_challenge", paper.row_name(model, data, training), "nll_per_token"
            )
            for training in ("none", "hard", "fuzzy", "soft")
        }
        assert nll["hard"] == max(value for value in nll.values() if value is not None)


def test_no_digit_of_the_papers_tables_has_changed() -> None:
    """A program compared all 594 with the project's notes on the paper, sections 4.3 and 4.4."""
    found = {name: paper._rows(text) for name, text in {**paper.TABLES, "ood": paper.OOD}.items()}
    assert sum(len(row) for table in found.values() for row in table.values()) == 594
    text = json.dumps([found, paper.COLUMNS, paper.OOD_COLUMNS], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "080cc2ec01ab24bde6e5a7bc1c220a972a87c57d57e9e7c0a6853d26dafe45f6"
    )
