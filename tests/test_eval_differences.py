"""Paired differences against hand-made examples and a plain bootstrap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_results import result, results

from trainer.eval import drift, metrics, page, summary, tables
from trainer.eval.choice import Item
from trainer.eval.likelihood import choice_numbers, kl_numbers
from trainer.eval.store import ChoiceRow, KlRow, Store


def of(entries: list[dict[str, Any]], **wanted: str) -> dict[str, Any]:
    (entry,) = [e for e in entries if all(e[k] == v for k, v in wanted.items())]
    return entry


def test_settings_are_compared_with_hard_inference_of_the_same_kind() -> None:
    right, wrong = [True, False], [False, False]
    cells = [
        result("soft", "hard-greedy", [[True], [False], [False], [False]]),
        result("soft", "hard-sample", [right, wrong, wrong, [True, True]]),
        result("soft", "fuzzy-sample", [right, right, right, wrong]),
        result("soft", "soft-greedy", [[True], [True], [True], [False]]),
    ]
    found = summary.differences(cells, 200, 0)
    assert [(e["setting"], e["minus_setting"]) for e in found] == [
        ("fuzzy-sample", "hard-sample"),
        ("soft-greedy", "hard-greedy"),
    ]
    assert {(e["training"], e["minus"]) for e in found} == {("soft", "soft")}
    assert found[0]["pass@1"][0] == 0  # 1/2, 1/2, 1/2, 0 less 1/2, 0, 0, 1
    assert found[0]["pass@2"][0] == 0.25
    low, high = found[0]["pass@1"][1:]
    assert low < 0 < high
    assert found[1]["pass@1"][0] == 0.5
    assert "pass@2" not in found[1]


def test_best_hard_inference_of_two_trainings_is_compared() -> None:
    cells = [
        result("hard", "hard-greedy", [[True], [False], [False], [False]]),
        result("hard", "hard-sample", [[True, True], [True, False], [False] * 2, [False] * 2]),
        result("soft", "hard-greedy", [[True], [True], [True], [False]]),
        result("soft", "hard-sample", [[True, True], [True, False], [False] * 2, [False] * 2]),
    ]
    found = of(summary.differences(cells, 200, 0), setting=summary.BEST_HARD)
    assert (found["training"], found["minus"]) == ("soft", "hard")
    assert found["pass@1"][0] == 0.75 - 0.375


def test_the_best_columns_are_chosen_in_every_replicate() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.random((30, 2)), rng.random((30, 2))
    mean, low, high = metrics.best_difference(ours, theirs, 300, 5)
    assert mean == pytest.approx(max(ours.mean(0)) - max(theirs.mean(0)))
    draws = np.random.default_rng([5, 30]).multinomial(30, np.full(30, 1 / 30), size=300)
    means = []
    for draw in draws:
        again = np.repeat(np.arange(30), draw)
        columns = [[part[again, i].mean() for i in (0, 1)] for part in (ours, theirs)]
        means.append(max(columns[0]) - max(columns[1]))
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_equal_trainings_differ_by_what_chance_may_hide() -> None:
    same = np.random.default_rng(0).random((20, 2))
    mean, low, high = metrics.best_difference(same, same, 100, 0)
    hidden = 1 - 0.025 ** (1 / 20)
    assert (mean, low, high) == pytest.approx((0, -hidden, hidden))


def test_a_mean_over_steps_is_resampled_by_problem() -> None:
    sums, counts = np.array([2.0, 0.0, 12.0]), np.array([4, 0, 3])
    mean, low, high = metrics.ratio_interval(sums, counts, 400, 1)
    assert mean == pytest.approx(2.0)
    draws = np.random.default_rng([1, 3]).multinomial(3, np.full(3, 1 / 3), size=400)
    means = [draw @ sums / (draw @ counts) for draw in draws if draw @ counts]
    assert len(means) < 400  # a problem without steps, drawn three times, says nothing
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    assert np.isnan(metrics.ratio_interval(sums, 0 * counts, 10, 0)).all()


# ---- out of domain -------------------------------------------------------------------------------


def choices(right: str, nll: float = 2.0) -> list[ChoiceRow]:
    """Items of two choices; `1` right, `0` wrong. Two tokens of the gold's `nll` each."""
    return [
        ChoiceRow(
            item=str(i),
            gold=0,
            log_likelihood=[-2 * nll, -2 * nll + (-1 if c == "1" else 1)],
            tokens=[2, 2],
            bytes=[4, 4],
        )
        for i, c in enumerate(right)
    ]


def texts(kl: float) -> list[KlRow]:
    return [
        KlRow(text=str(i), tokens=10, forward=kl * (i + 1), reverse=kl, nll=20.0, base_nll=10.0)
        for i in range(2)
    ]


def evaluation(out: Path, made: dict[tuple[str, int | None], tuple[str, float]]) -> dict[str, Any]:
    """Files and results of checkpoints with such answers and so much KL."""
    points, choice, kl = [], [], []
    for (training, seed), (right, divergence) in made.items():
        name = training if seed is None else f"{training}-{seed}"
        folder = out / "likelihood" / name
        for kind, path, rows in (
            (ChoiceRow, "choice-own.jsonl", choices(right, 2.0 + divergence)),
            (KlRow, "kl.jsonl", texts(divergence)),
        ):
            store: Store[Any] = Store(folder / path, {}, kind)
            for row in reversed(rows):  # order does not matter
                store.append(row)
            store.close()
        facts = {"checkpoint": name, "training": training, "training_seed": seed}
        points.append({"name": name, "training": training})
        choice.append(facts | {"set": "own"} | choice_numbers(choices(right), 50, 0))
        kl.append(facts | kl_numbers(texts(divergence), 50, 0))
    found = results() | {"checkpoints": points, "choice": choice, "kl": kl}
    found |= {"replicates": 200, "seed": 0}
    items = [Item(str(i), "", ["a", "b"], 0) for i in range(4)]
    found["drift"] = drift.summary(found, {"own": items}, [("0", "x"), ("1", "y")], out)
    return found


THREE: dict[tuple[str, int | None], tuple[str, float]] = {
    ("none", None): ("1100", 0.0),
    ("hard", None): ("1000", 0.5),
    ("soft", 0): ("1110", 0.1),
    ("soft", 1): ("1111", 0.3),
}


def test_values_of_items_are_the_parts_of_their_mean() -> None:
    rows = [
        ChoiceRow(item="a", gold=0, log_likelihood=[-4.0, -5.0], tokens=[2, 5], bytes=[8, 20]),
        ChoiceRow(item="b", gold=1, log_likelihood=[-6.0, -9.0], tokens=[2, 3], bytes=[6, 18]),
    ]
    values = drift.choice_values(rows)
    assert values["accuracy"].tolist() == [1, 0]
    assert values["accuracy_per_byte"].tolist() == [0, 1]
    assert values["nll_per_token"].tolist() == [2, 3]
    numbers = choice_numbers(rows, 50, 0)
    assert all(numbers[name][0] == part.mean() for name, part in values.items())
    parts, numbers = drift.kl_values(texts(0.5)), kl_numbers(texts(0.5), 50, 0)
    assert all(numbers[name][0] == pytest.approx(part.mean()) for name, part in parts.items())


def test_out_of_domain_differences_are_paired_by_item_and_average_seeds(tmp_path: Path) -> None:
    whole = evaluation(tmp_path, THREE)["drift"]["differences"]
    found = [e for e in whole if "checkpoint" not in e]
    names = [(e["training"], e["minus"], e["set"]) for e in found]
    assert sorted(names) == [
        (*pair, name)
        for pair in (("hard", "none"), ("soft", "hard"), ("soft", "none"))
        for name in (drift.TEXTS, "own")
    ]
    entry = of(found, training="soft", minus="none", set="own")
    mean, low, _ = entry["accuracy"]  # per item 0, 0, 1, 1/2
    assert mean == 0.375
    assert low >= 0  # no item got worse: resampling pairs cannot show a loss
    assert entry["nll_per_token"] == pytest.approx([0.2] * 3)
    entry = of(found, training="soft", minus="hard", set=drift.TEXTS)
    assert entry["kl"][0] == pytest.approx(-0.3 * (1 + 2) / 2 / 10)
    assert entry["kl"][1] == pytest.approx(-0.3 * 2 / 10)
    assert entry["kl_reverse"] == pytest.approx([-0.03] * 3)
    assert entry["nll"][0] == 0


def test_where_a_training_has_several_seeds_each_is_compared_on_its_own(tmp_path: Path) -> None:
    found = evaluation(tmp_path, THREE)["drift"]["differences"]
    each = [e for e in found if "checkpoint" in e]
    assert {(e["checkpoint"], e["minus"]) for e in each} == {
        (f"soft-{seed}", minus) for seed in (0, 1) for minus in ("hard", "none")
    }
    one = of(each, checkpoint="soft-0", minus="none", set="own")
    two = of(each, checkpoint="soft-1", minus="none", set="own")
    assert (one["accuracy"][0], two["accuracy"][0]) == (0.25, 0.5)
    assert (one["nll_per_token"][0], two["nll_per_token"][0]) == pytest.approx((0.1, 0.3))
    made = {t.name: t for t in tables.build(evaluation(tmp_path / "again", THREE))}
    names = [row[0] for row in made["choice-differences"].rows if row[0].endswith("- none")]
    assert names == ["hard - none", "soft - none", "soft-0 - none", "soft-1 - none"]


def test_only_the_items_of_this_evaluation_count(tmp_path: Path) -> None:
    whole = evaluation(tmp_path, THREE)
    items = [Item("0", "", ["a", "b"], 0), Item("1", "", ["a", "b"], 0)]
    found = drift.summary(whole, {"own": items}, [], tmp_path)["differences"]
    found = [e for e in found if "checkpoint" not in e]
    assert of(found, training="soft", minus="none")["accuracy"][0] == 0
    assert of(found, training="soft", minus="hard")["accuracy"][0] == 0.5


def test_seeds_give_mean_and_deviation_out_of_domain(tmp_path: Path) -> None:
    found = evaluation(tmp_path, THREE)["drift"]["groups"]
    own = of(found, set="own")
    assert (own["training"], own["seeds"]) == ("soft", [0, 1])
    assert own["accuracy"] == pytest.approx([0.875, np.std([0.75, 1.0], ddof=1)])
    kl = of(found, set=drift.TEXTS)
    assert kl["kl"] == pytest.approx([0.03, np.std([0.015, 0.045], ddof=1)])


def test_differences_and_seeds_are_shown_out_of_domain_and_between_settings(tmp_path: Path) -> None:
    built = tables.build(evaluation(tmp_path, THREE))
    made = {t.name: t for t in built}
    assert made["choice"].rows[-1][:2] == ["soft, 2 seeds", "87.5 ± 17.7"]
    assert made["kl"].rows[-1][:2] == ["soft, 2 seeds", "0.030 ± 0.021"]
    row = next(r for r in made["choice-differences"].rows if r[0] == "soft - none")
    assert row[1] == "own" and row[2].startswith("+37.5 [") and row[4].startswith("+0.200 [")
    assert made["kl-differences"].rows[0][0] == "hard - none"
    within = made["setting-differences"].rows
    assert ["soft", "gsm8k", "soft-sample - hard-sample"] in [r[:3] for r in within]
    assert ["soft - hard", "gsm8k", "best hard"] in [r[:3] for r in made["differences"].rows]
    for table in built:
        assert {len(row) for row in table.rows} == {len(table.columns)}
    assert "choice-differences" in page.page(built, [], [], {})
    assert "choice-differences" in tables.latex(built)
