"""Numbers of cells, tables, LaTeX, plots and the HTML page."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from eval_results import TRAININGS, result, results, sample, task

from trainer.data import Problem
from trainer.eval import page, plots, settings, summary, tables
from trainer.eval.checkpoints import Checkpoint
from trainer.eval.plan import Cell
from trainer.eval.store import Row, Step
from trainer.eval.table import PAGE, Table


def test_the_numbers_of_a_cell_by_hand() -> None:
    right = [[True, True], [True, False], [False, False], [False, False]]
    found = result("soft", "soft-sample", right, end="budget", finish="length").numbers
    assert found["pass"]["1"][0] == 3 / 8
    assert found["pass"]["2"][0] == 1 / 2
    # p0: right; p1: one right, one wrong, a toss; p2, p3: two different wrong answers.
    assert found["majority"]["2"][0] == 3 / 8
    assert found["distinct"][0] == (1 + 2 + 2 + 2) / 4
    assert (found["boxed"][0], found["capped"][0], found["answer_cut"]) == (1, 1, 1)
    assert found["end"] == {"budget": 1.0}
    assert found["think_tokens"]["mean"] == 4
    assert found["entropy"] == [0.75, 0.75, 0.75]
    assert found["entropy_by_position"] == [1.0, 0.5]
    assert found["samples_by_position"] == [8, 8]
    assert sum(found["lengths"]["counts"]) == 8


def test_failed_samples_are_wrong_and_counted_but_have_no_length() -> None:
    cell = Cell.of(task(), settings.named(["hard-greedy"], {})[0], 1, 0, 0)
    rows = [sample(i, 0, True) for i in range(3)]
    rows += [Row(problem="p3", sample=0, seed=0, prompt="x", error="nan: broken")]
    rows[0].judge = "timeout"
    checkpoint = Checkpoint("a", "a", None, None, "w")
    found = summary.of_cell(checkpoint, cell, rows, 50, 0).numbers
    assert found["pass"]["1"][0] == 0.75
    assert (found["failed_samples"], found["failed_verifications"]) == (1, 1)
    assert found["think_tokens"]["mean"] == 4
    assert found["boxed"][0] == 0.75


def test_seen_problems_are_reported_apart() -> None:
    right = [[True, True], [True, True], [False, False], [False, False]]
    known = task(seen=frozenset({"p0", "p1"}))
    found = result("soft", "soft-sample", right, task=known).numbers
    assert (found["pass1_seen"][0], found["pass1_unseen"][0], found["seen_problems"]) == (1, 0, 2)
    mixed = [[True, False], [False, False], [True, False], [True, True]]
    found = result("soft", "soft-sample", mixed, task=known).numbers
    assert (found["pass1_seen"][0], found["passn_seen"][0]) == (0.25, 0.5)
    assert (found["pass1_unseen"][0], found["passn_unseen"][0]) == (0.75, 1)


def test_training_seeds_give_mean_and_deviation() -> None:
    a = result("soft", "hard-greedy", [[True], [True], [True], [False]], 0)
    b = result("soft", "hard-greedy", [[True], [False], [False], [False]], 1)
    (group,) = summary.groups([a, b])
    assert group["seeds"] == [0, 1]
    assert group["pass"]["1"] == pytest.approx([0.5, np.std([0.75, 0.25], ddof=1)])


def test_training_seeds_give_mean_and_deviation_of_votes_and_entropy() -> None:
    a = result("soft", "soft-sample", [[True] * 2] * 3 + [[False] * 2], 0, entropy=[1.0])
    b = result("soft", "soft-sample", [[True] * 2] + [[False] * 2] * 3, 1, entropy=[2.0, 4.0])
    (group,) = summary.groups([a, b])
    assert group["majority"]["2"] == pytest.approx([0.5, np.std([0.75, 0.25], ddof=1)])
    assert group["entropy"] == pytest.approx([2.0, np.std([1.0, 3.0], ddof=1)])


def test_a_scorer_that_returns_numbers_only_has_no_votes(tmp_path: Path) -> None:
    """Else wrong answers would abstain, right ones vote, and majority would be pass@n."""
    right = [[True, False], [True, False], [False, False], [False, False]]
    found = result("soft", "soft-sample", right, extracted=None).numbers
    assert found["pass"]["2"][0] == 0.5
    assert (found["majority"], found["boxed"], found["distinct"]) == (None, None, None)
    whole = results()
    for cell in whole["cells"]:
        cell |= {"majority": None, "boxed": None, "distinct": None}
    beside = next(t for t in tables.build(whole) if t.name == "beside-gsm8k")
    shown = dict(zip(beside.columns, next(r for r in beside.rows if "sample" in r[0])))
    assert (shown["majority@n"], shown["boxed"], shown["distinct"]) == ("–", "–", "–")
    assert plots.draw(whole, tmp_path)


def test_where_nothing_is_right_only_a_scorer_of_ones_own_can_be_one_of_numbers() -> None:
    wrong = [[False, False]] * 4
    own = dataclasses.replace(task(), reward="mine:score")
    found = result("soft", "soft-sample", wrong, extracted=None, task=own).numbers
    assert found["boxed"] is None
    found = result("soft", "soft-sample", wrong, extracted=None).numbers  # gsm8k's: nothing boxed
    assert found["boxed"][0] == 0 and found["majority"]["2"][0] == 0


def test_mean_entropy_has_an_interval_over_problems() -> None:
    cell = Cell.of(task(), settings.named(["hard-greedy"], {})[0], 1, 0, 0)
    entropies = [[0.0], [1.0, 1.0], [2.0], [9.0, 9.0]]
    rows = [sample(i, 0, True, entropy=e) for i, e in enumerate(entropies)]
    mean, low, high = summary.of_cell(
        Checkpoint("a", "a", None, None, "w"), cell, rows, 500, 0
    ).numbers["entropy"]
    assert mean == pytest.approx(22 / 6)  # over steps
    assert 0 < low < 1.5 and 6 < high < 9


def test_seeds_of_a_training_have_a_row_beside_the_accuracy() -> None:
    beside = next(t for t in tables.build(results((0, 1))) if t.name == "beside-gsm8k")
    row = dict(zip(beside.columns, next(r for r in beside.rows if r[0].endswith("soft-sample"))))
    assert "±" not in row["pass@1"]
    row = dict(
        zip(beside.columns, next(r for r in beside.rows if r[0] == "soft, 2 seeds, soft-sample"))
    )
    assert row["majority@n"] == "68.8 ± 8.8"  # 2.5 and 3 of 4, ties being tosses
    assert row["entropy"] == "0.75 ± 0.00"


def test_differences_are_paired_by_problem() -> None:
    hard = result("hard", "hard-greedy", [[True], [False], [False], [False]])
    soft = result("soft", "hard-greedy", [[True], [True], [False], [False]])
    (found,) = summary.differences([hard, soft], 500, 0)
    assert (found["training"], found["minus"]) == ("soft", "hard")
    mean, low, _ = found["pass@1"]
    assert mean == 0.25
    assert low >= 0  # no problem got worse: resampling pairs cannot show a loss


def test_the_tables_have_the_papers_layout() -> None:
    made = {t.name: t for t in tables.build(results())}
    hard = made["hard"]
    assert [row[0] for row in hard.rows] == list(TRAININGS)
    assert hard.columns[1] == "gsm8k: greedy@1 / sample@1 / sample pass@n"
    grid = made["grid-gsm8k"]
    heads = "HG@1 HS@1 HS@2 FG@1 FS@1 FS@2 SG@1 SS@1 SS@2"
    assert grid.columns[1:] == heads.split()
    soft = dict(zip(grid.columns, grid.rows[2]))
    assert soft["HG@1"].startswith("75.0 [") and soft["SS@1"].startswith("62.5 [")
    assert len(made["beside-gsm8k"].rows) == 18
    assert made["differences"].rows[0][0] == "hard - none"


def test_seen_problems_have_a_table_of_their_own() -> None:
    found = results()
    assert "seen-gsm8k" not in {t.name for t in tables.build(found)}
    found["cells"][0] |= {"seen_problems": 1, "pass1_seen": [1, 0.5, 1], "passn_seen": [1, 1, 1]}
    table = next(t for t in tables.build(found) if t.name == "seen-gsm8k")
    seen = ["100.0 [50.0, 100.0]", "–", "100.0 [100.0, 100.0]", "–"]
    assert table.rows == [["none, hard-greedy", *seen]]
    assert "1 problems" in table.caption and "3 others" in table.caption


def test_problems_that_were_left_out_are_named_beside_the_accuracy() -> None:
    found = results()
    beside = next(t for t in tables.build(found) if t.name == "beside-gsm8k")
    assert "Left out" not in beside.caption
    found["tasks"][0]["dropped"] = [f"test-{i}" for i in range(7)]
    beside = next(t for t in tables.build(found) if t.name == "beside-gsm8k")
    assert "cannot be used: 7 (test-0, test-1, test-2, test-3, test-4, ...)" in beside.caption


def test_several_seeds_show_as_mean_and_deviation_in_the_table() -> None:
    grid = next(t for t in tables.build(results((0, 1))) if t.name == "grid-gsm8k")
    assert grid.rows[0][1] == "25.0 [0.0, 75.0]"
    assert grid.rows[1][1] == "62.5 ± 17.7"  # 2 of 4 and 3 of 4
    assert "deviation over training seeds" in grid.caption


def test_markdown_tables_are_rectangular() -> None:
    for table in tables.build(results()):
        lines = table.markdown().strip().splitlines()[2:]
        assert len({line.count("|") for line in lines}) == 1
        assert lines[1].startswith("| --- | ---:")


def test_latex_is_balanced_and_escaped() -> None:
    text = tables.latex(tables.build(results(name="chain_sum")))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") > 2
    assert r"chain\_sum" in text
    assert not re.search(r"(?<!\\)[%&#](?![^\n]*booktabs)(?! )", text.split("\n", 1)[1])
    for line in text.splitlines():
        assert line.count("{") == line.count("}")
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) > 20


def test_a_long_latex_table_goes_on_in_a_further_one_and_loses_no_row() -> None:
    rows = [[f"row{i}.", "-1.5 [-2.0, 1.0]"] for i in range(2 * PAGE + 1)]
    text = Table("long", "Long", ["name", "value"], rows).latex()
    parts = text.split(r"\end{table}")[:-1]
    assert [len(re.findall(r"row\d", part)) for part in parts] == [PAGE, PAGE, 1]
    assert re.findall(r"row(\d+)", text) == [str(i) for i in range(len(rows))]
    assert "(2 of 3)" in parts[1] and text.count(r"\label{tab:long}") == 1
    assert all(part.count("name & value") == 1 for part in parts)
    assert "$-$1.5 [$-$2.0, 1.0]" in text


def test_a_wide_latex_table_has_intervals_below_their_numbers() -> None:
    row = ["soft-0", *["50.0 [36.0, 64.0]"] * 8, "1.0 [0, 2] / 3.0 ± 0.5 / –"]
    text = Table("wide", "Wide", [f"c{i}" for i in range(10)], [row] * 14).latex()
    assert text.count(r"\makecell[tr]{{50.0}\\{[36.0, 64.0]}}") == 8 * 14
    assert r"{1.0 [0, 2] /}\\{3.0 $\pm$ 0.5 /}\\{--}" in text
    assert not re.search(r"\\\\\s*\[", text), "LaTeX would take the bracket for a length"
    assert text.count("soft-0") == 14
    assert max(part.count("soft-0") for part in text.split(r"\end{table}")) == PAGE // 3
    assert "makecell" not in Table("narrow", "Narrow", ["a", "b"], [["x", "1 [0, 2]"]]).latex()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex with latex-extra")
def test_latex_compiles_and_no_table_runs_over_its_page(tmp_path: Path) -> None:
    long = Table("long", "50 % & more_", ["a", "b"], [["x", "-1 [0, 2]"]] * 100)
    wide = Table("wide", "Wide", ["a"] * 12, [["50.0 [36.0, 64.0]"] * 12] * 60)
    text = tables.latex([*tables.build(results((0, 1), name="chain_sum")), long, wide])
    packages = next(line for line in text.splitlines()).removeprefix("% needs ")
    document = [r"\documentclass{article}", packages, r"\begin{document}", text, r"\end{document}"]
    (tmp_path / "t.tex").write_text("\n".join(document))
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout[-2000:]
    assert not re.search(r"Float too large|Overfull", run.stdout), run.stdout


def test_names_that_look_like_formulas_are_drawn_as_they_are(tmp_path: Path) -> None:
    found = results(name="cost_$_to_$x^^")
    for cell in found["cells"]:
        cell["checkpoint"] = f"$\\{cell['checkpoint']}$"
    files = plots.draw(found, tmp_path)
    assert len(files) == 3
    assert all("cost_$_to_$x^^: " in file.read_text() for file in files)
    assert all("$\\soft$" in file.read_text() for file in files)


def test_a_picture_that_cannot_be_made_costs_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results()
    plots.draw(found, tmp_path)
    for cell in found["cells"]:
        cell["entropy_by_position"] = None
    names = ["gsm8k_pass_at_k.svg", "gsm8k_lengths.svg"]
    assert [path.name for path in plots.draw(found, tmp_path)] == names
    assert capsys.readouterr().err.startswith("no plot gsm8k_entropy: ")
    assert not (tmp_path / "gsm8k_entropy.png").exists()  # of numbers that hold no more
    (tmp_path / "file").touch()
    assert plots.draw(found, tmp_path / "file") == []


def test_plots_are_drawn_in_both_formats(tmp_path: Path) -> None:
    found = plots.draw(results(), tmp_path)
    assert [path.name for path in found] == [
        "gsm8k_pass_at_k.svg",
        "gsm8k_entropy.svg",
        "gsm8k_lengths.svg",
    ]
    for path in found:
        assert path.read_text().rstrip().endswith("</svg>")
        assert path.with_suffix(".png").stat().st_size > 5000


def test_a_checkpoint_has_one_colour_in_all_panels_and_one_entry_in_the_legend(
    tmp_path: Path,
) -> None:
    found = results()
    first = found["cells"][0]["checkpoint"]
    setting = found["settings"][0]["name"]
    cells = [c for c in found["cells"] if (c["checkpoint"], c["setting"]) != (first, setting)]
    whole = plots.draw(found, tmp_path / "whole")[1].read_text()
    fewer = plots.draw({**found, "cells": cells}, tmp_path / "fewer")[1].read_text()

    def colours(svg: str, panel: int) -> list[str]:
        part = svg.split(f'id="axes_{panel}"')[1].split('id="axes_')[0]
        return re.findall(r'style="fill: none; stroke: (#\w+); stroke-width: 1.5', part)

    # A line is drawn by a panel, and at the end by the legend.
    assert len(colours(whole, 1)) == len(set(colours(whole, 1))) == len(TRAININGS)
    assert colours(fewer, 1) == colours(whole, 1)[1:]
    assert colours(fewer, 2) == colours(whole, 2) == colours(whole, 1)
    names = {cell["checkpoint"] for cell in found["cells"]}
    assert all(fewer.count(f">{name}</text>") == 1 for name in names)


class Reader(html.parser.HTMLParser):
    """Checks that tags close and collects what is shown."""

    void = frozenset(("meta", "br", "img"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_think_steps_and_escapes_what_models_write(tmp_path: Path) -> None:
    steps = [
        Step("<b>", True, 2.0, [("<b>", 0.75), ('"', 0.25)]),
        Step(" two", False, 0.1),
    ]
    row = sample(0, 0, True, think="<b> two", answer="\\boxed{7}<script>", steps=steps)
    problem = Problem("p0", "Is 1 < 2 & 3?", "7")
    figure = tmp_path / "a.svg"
    figure.write_text("<?xml version='1.0'?><svg><text>curve</text></svg>")
    text = page.page(tables.build(results()), [figure], [("soft, x", problem, row)], {"seed": "0"})
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert "<script" not in text
    assert "Is 1 < 2 & 3?" in reader.text and "curve" in reader.text
    assert "<b> two" in reader.text.replace("\n", "")
    assert any("0.750  '<b>'" in title and "entropy 2.00" in title for title in reader.titles)
    assert text.count("class=soft") == 1


def test_results_survive_json() -> None:
    found = results()
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
