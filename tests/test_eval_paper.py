"""Our numbers beside the paper's."""

from __future__ import annotations

from typing import Any

import pytest
from eval_results import result, results

from trainer.eval import compare, paper, summary
from trainer.eval.table import Table


def beside(found: dict[str, Any], model: str = "L3B", data: str = "gsm8k") -> dict[str, Table]:
    return {t.name: t for t in compare.with_paper(found, model, data)}


def with_samples(n: int) -> dict[str, Any]:
    """Two trainings; soft solves one of four problems by one of n samples, hard none."""
    found = results()
    cells = [
        result("hard", "soft-sample", [[False] * n] * 4),
        result("soft", "soft-sample", [[True] + [False] * (n - 1)] + [[False] * n] * 3),
    ]
    found["checkpoints"] = [{"name": t, "training": t} for t in ("hard", "soft")]
    found["settings"] = [{"name": "soft-sample"}]
    found["cells"] = [
        {
            "checkpoint": r.checkpoint.name,
            "training": r.checkpoint.training,
            "task": "gsm8k",
            "setting": "soft-sample",
            **r.numbers,
        }
        for r in cells
    ]
    return found | {"differences": summary.differences(cells, 100, 0)}


def test_the_papers_tables_are_whole() -> None:
    for text in (*paper.TABLES.values(), paper.OOD):
        rows = paper._rows(text)
        assert len(rows) == 18
        assert {len(values) for values in rows.values()} <= {6, 9}
    assert paper.cell("gsm8k", "L3B gsm8k soft", "hard-sample", 32) == 97.9
    assert paper.cell("math500", "Q3B none", "soft-sample", 32) == 73.6
    assert paper.cell("olympiadbench", "L8B gsm8k hard", "fuzzy-greedy", 1) == 3.8
    assert paper.cell("gsm8k", "L3B gsm8k odd", "hard-sample", 32) is None
    assert paper.out_of_domain("arc_challenge", "L3B math hard", "nll_per_token") == 3.19


def test_our_cells_stand_beside_the_papers() -> None:
    made = beside(results())
    rows = made["paper"].rows
    assert len(rows) == 27
    assert rows[0] == ["none", "gsm8k", "HG@1", "25.0 [0.0, 75.0]", "71.4 (@1)"]
    differences = {tuple(row[:3]): row for row in made["paper-differences"].rows}
    assert differences["soft - hard", "gsm8k", "HG@1"][-1] == "+1.3 (@1)"  # 77.2 - 75.9
    # best of 77.2 and 70.5, less the better of 75.9 and 74.3
    assert differences["soft - hard", "gsm8k", "best hard@1"][-1] == "+1.3 (@1)"
    assert differences["soft: SS - HS", "gsm8k", "@1"][-1] == "+3.6 (@1)"  # 74.1 - 70.5
    other = beside(results(name="sums"))
    assert "paper" not in other  # the paper has no such task, only differences to look at
    assert other["paper-differences"].rows[0][-1].endswith("gsm8k)")


def test_pass_at_32_of_64_samples_stands_beside_the_papers_pass_at_32() -> None:
    made = beside(with_samples(64))
    cells = {(row[0], row[2]): row for row in made["paper"].rows}
    ours = cells["soft", "SS@32"]
    assert ours[3].startswith("12.5 [") and ours[4] == "94.2 (@32)"  # 32 / 64 of one in four
    (row,) = [r for r in made["paper-differences"].rows if r[2] == "SS@32"]
    assert row[3].startswith("+12.5 [") and row[4] == "+1.6 (@32)"  # 94.2 - 92.6
    assert "@64" not in "".join("".join(r) for table in made.values() for r in table.rows)
    assert not any("samples a problem" in table.caption for table in made.values())


def test_with_fewer_samples_the_header_says_which_k_is_ours() -> None:
    made = beside(with_samples(8))
    for name in ("paper", "paper-differences"):
        assert "with 8 samples a problem ours is pass@8 beside its pass@32" in made[name].caption
    (row,) = [r for r in made["paper-differences"].rows if r[2] == "SS@8"]
    assert row[3].startswith("+25.0 [") and row[4] == "+1.6 (@32)"  # 94.2 - 92.6


@pytest.mark.parametrize(("model", "data"), [("Q3B", "gsm8k"), ("L8B", "math")])
def test_a_training_that_the_paper_never_did_is_refused(model: str, data: str) -> None:
    with pytest.raises(ValueError, match=f"did not train {model} on {data}.*Q3B on math") as error:
        beside(results(), model, data)
    assert "L3B on gsm8k, math, deepscaler; L8B on gsm8k; Q3B on math" in str(error.value)


def test_every_training_of_the_papers_tables_can_be_chosen() -> None:
    pairs = {tuple(row.split()[:2]) for row in paper._rows(paper.OOD) if not row.endswith("none")}
    for model, data in pairs:
        paper.require_training(model, data)
    assert len(pairs) == 5


def test_out_of_domain_only_differences_stand_beside_the_papers() -> None:
    entry = {"checkpoint": "none", "training": "none", "set": "arc_challenge", "accuracy": [0.5]}
    difference = {
        "training": "soft",
        "minus": "none",
        "set": "arc_challenge",
        "accuracy": [0.02, -0.01, 0.05],
        "accuracy_per_byte": [0.0, 0.0, 0.0],
        "nll_per_token": [-0.1, -0.2, 0.3],
    }
    names = {"accuracy": [0.5] * 3, "accuracy_per_byte": [0.5] * 3, "nll_per_token": [1.0] * 3}
    found = results() | {"choice": [entry | names]}
    assert "paper-choice" not in beside(found)
    made = beside(found | {"drift": {"groups": [], "differences": [difference]}})["paper-choice"]
    assert made.rows == [
        ["soft - none", "arc_challenge", "accuracy", "+2.0 [-1.0, 5.0]", "+0.20"],  # 72.99 - 72.79
        ["soft - none", "arc_challenge", "nll_per_token", "-0.100 [-0.200, 0.300]", "+0.03"],
    ]
    assert '"ARC" without the part' in made.caption


def test_a_comparison_without_any_common_cell_says_so() -> None:
    found = results()
    for entry in (*found["checkpoints"], *found["cells"]):
        entry["training"] = "sft"
    (table,) = compare.with_paper({**found, "differences": [], "drift": {}}, "L3B", "gsm8k")
    assert not table.rows
    assert "trainings none, hard, soft and fuzzy (here sft)" in table.caption
