"""Tables of paired differences, from the plain data of `results.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.eval.table import Results, Table, number, percent

NOTE = "the spread between training seeds is not in it]"


def differences(results: Results) -> list[Table]:
    """Between trainings, and between settings of one training."""
    entries = results["differences"]
    between = [e for e in entries if e["training"] != e["minus"]]
    within = [e for e in entries if e["training"] == e["minus"]]
    heads = ["task", "setting", "pass@1", "pass@n"]
    caption = "Paired differences {} in percentage points on the same problems [95 % interval over "
    caption += "problems; " + NOTE
    best = "; best hard: the better of both hard settings, chosen in every replicate anew"
    tables = (
        Table(
            "differences",
            caption.format("between trainings") + best,
            ["trainings", *heads],
            [[f"{e['training']} - {e['minus']}", *_row(e, e["setting"])] for e in between],
        ),
        Table(
            "setting-differences",
            caption.format("between settings"),
            ["training", *heads],
            [[e["training"], *_row(e, f"{e['setting']} - {e['minus_setting']}")] for e in within],
        ),
    )
    return [table for table in tables if table.rows]


def _row(entry: Results, setting: str) -> list[str]:
    last = [name for name in entry if name.startswith("pass@")][-1]
    many = "" if last == "pass@1" else f"@{last[5:]}: {percent(entry[last], sign=True)}"
    return [entry["task"], setting, percent(entry["pass@1"], sign=True), many]


def drift(results: Results) -> list[Table]:
    """Between trainings, out of domain."""
    entries: Sequence[Any] = results.get("drift", {}).get("differences", [])
    choices = [e for e in entries if "accuracy" in e]
    texts = [e for e in entries if "kl" in e]
    between = "Paired differences between trainings "
    tables = (
        Table(
            "choice-differences",
            between + "out of domain: accuracies in percentage points, NLL per token in nats "
            "[95 % interval over items; " + NOTE,
            ["trainings", "set", "accuracy", "per byte", "NLL"],
            [
                [
                    f"{e.get('checkpoint', e['training'])} - {e['minus']}",
                    e["set"],
                    percent(e["accuracy"], sign=True),
                    percent(e["accuracy_per_byte"], sign=True),
                    signed(e["nll_per_token"]),
                ]
                for e in choices
            ],
        ),
        Table(
            "kl-differences",
            between + "on held-out text: nats per token [95 % interval over texts; " + NOTE,
            ["trainings", "KL(base, it)", "KL(it, base)", "NLL"],
            [
                [
                    f"{e.get('checkpoint', e['training'])} - {e['minus']}",
                    *map(signed, (e["kl"], e["kl_reverse"], e["nll"])),
                ]
                for e in texts
            ],
        ),
    )
    return [table for table in tables if table.rows]


def signed(value: Sequence[float | None]) -> str:
    return number(value, sign=True)
