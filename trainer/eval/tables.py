"""Tables in the paper's layout, as Markdown and LaTeX, from the plain data of `results.json`."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.eval import tables_paired
from trainer.eval.config import SIX
from trainer.eval.table import (
    SHORT,
    Results,
    Table,
    number,
    only,
    percent,
    samples,
    score,
    setting_names,
    spread,
    spread_note,
    trainings,
)


def build(results: Results) -> list[Table]:
    """All tables of an evaluation, but for those of `compare`."""
    out: list[Table] = []
    tasks = [task["name"] for task in results["tasks"]]
    if tasks:
        out += _hard_inference(results, tasks)
        out += [table for task in tasks if (table := _grid(results, task))]
        out += [table for task in tasks if (table := _other(results, task))]
        out += [_beside(results, task) for task in tasks]
        out += [table for task in tasks if (table := _seen(results, task))]
        out += tables_paired.differences(results)
    return [*out, *_out_of_domain(results), *tables_paired.drift(results)]


def markdown(tables: Sequence[Table]) -> str:
    return "\n".join(table.markdown() for table in tables)


def latex(tables: Sequence[Table]) -> str:
    return "% needs \\usepackage{booktabs,makecell,adjustbox}\n" + "\n".join(
        table.latex() for table in tables
    )


# ---- the paper's tables --------------------------------------------------------------------------


def _hard_inference(results: Results, tasks: Sequence[str]) -> list[Table]:
    """Table 1: hard inference on every task."""
    hard = [name for name in ("hard-greedy", "hard-sample") if name in setting_names(results)]
    if len(hard) < 2:
        return []
    rows = []
    for training in trainings(results):
        row = [training]
        for task in tasks:
            n = samples(results, task, "hard-sample")
            wanted = (("hard-greedy", 1), ("hard-sample", 1), ("hard-sample", n))
            row.append(" / ".join(score(results, training, task, *at) for at in wanted))
        rows.append(row)
    columns = ["training"]
    columns += [f"{t}: greedy@1 / sample@1 / sample pass@n" for t in tasks]
    return [Table("hard", "Hard inference, %. " + spread_note(results), columns, rows)]


def _grid(results: Results, task: str) -> Table | None:
    """Tables 3 to 5: all settings of one task."""
    names = [name for name in SIX if name in setting_names(results)]
    columns: list[tuple[str, int]] = []
    for name in names:
        n = samples(results, task, name)
        columns += [(name, 1)] if n == 1 else [(name, 1), (name, n)]
    if not columns:
        return None
    rows = [
        [training, *(score(results, training, task, name, k) for name, k in columns)]
        for training in trainings(results)
    ]
    heads = [f"{SHORT[name]}@{k}" for name, k in columns]
    info = next(t for t in results["tasks"] if t["name"] == task)
    caption = (
        f"{task}, {info['problems']} problems: inference hard (H), fuzzy (F), soft (S), greedy (G) "
        f"or sampled (S), pass@k in %. {spread_note(results)}"
    )
    return Table(f"grid-{task}", caption, ["training", *heads], rows)


def _other(results: Results, task: str) -> Table | None:
    """Settings of the user's own."""
    names = [name for name in setting_names(results) if name not in SIX]
    columns = []
    for name in names:
        n = samples(results, task, name)
        columns += [(name, k) for k in sorted({1, n})]
    rows = [
        [training, *(score(results, training, task, name, k) for name, k in columns)]
        for training in trainings(results)
    ]
    heads = [f"{name}@{k}" for name, k in columns]
    caption = f"{task}: further settings, pass@k in %. {spread_note(results)}"
    return Table(f"other-{task}", caption, ["training", *heads], rows) if names else None


def _out_of_domain(results: Results) -> list[Table]:
    """Table 2, and the divergence from the base model."""
    out = []
    sets = list(dict.fromkeys(entry["set"] for entry in results["choice"]))
    if sets:
        rows = []
        for name in dict.fromkeys(entry["checkpoint"] for entry in results["choice"]):
            row = [name]
            for of in sets:
                entry = only(results["choice"], checkpoint=name, set=of)
                row += [
                    percent(entry["accuracy"]),
                    percent(entry["accuracy_per_byte"]),
                    number(entry["nll_per_token"]),
                ]
            rows.append(row)
        rows += _choice_seeds(results, sets)
        heads = ["checkpoint"]
        heads += [f"{of} {what}" for of in sets for what in ("accuracy", "per byte", "NLL")]
        caption = (
            "Out of domain: accuracy in % (also with likelihoods divided by the choice's bytes), "
            "NLL per token of the correct answer in nats [95 % interval over items]"
            + _seed_note(results)
        )
        out.append(Table("choice", caption, heads, rows))
    if results["kl"]:
        rows = [
            [e["checkpoint"], *(number(e[k]) for k in ("kl", "kl_reverse", "nll", "base_nll"))]
            for e in results["kl"]
        ]
        rows += [
            [_of_seeds(g), *(spread(g[k], 1, 3) for k in ("kl", "kl_reverse", "nll")), ""]
            for g in _seed_groups(results)
            if "kl" in g
        ]
        heads = ["checkpoint", "KL(base, it)", "KL(it, base)", "NLL", "base's NLL"]
        caption = "Held-out text: nats per token [95 % interval over texts]" + _seed_note(results)
        out.append(Table("kl", caption, heads, rows))
    return out


def _choice_seeds(results: Results, sets: Sequence[str]) -> list[list[str]]:
    """A row for every training with several seeds."""
    found = [g for g in _seed_groups(results) if "accuracy" in g]
    rows = []
    for training in dict.fromkeys(g["training"] for g in found):
        of = [only(found, training=training, set=name) for name in sets]
        row = [_of_seeds(of[0])]
        for g in of:
            row += [spread(g["accuracy"], 100), spread(g["accuracy_per_byte"], 100)]
            row.append(spread(g["nll_per_token"], 1, 3))
        rows.append(row)
    return rows


def _seed_groups(results: Results) -> Sequence[Results]:
    groups: Sequence[Results] = results.get("drift", {}).get("groups", [])
    return groups


def _seed_note(results: Results) -> str:
    return "; ± standard deviation over training seeds" if _seed_groups(results) else ""


def _of_seeds(group: Results) -> str:
    return f"{group['training']}, {len(group['seeds'])} seeds"


# ---- what stands beside every accuracy -----------------------------------------------------------


def _beside(results: Results, task: str) -> Table:
    """Boxed rate, lengths, endings: a shorter chain may be a cut one."""
    rows = []
    for cell in results["cells"]:
        if cell["task"] != task:
            continue
        n = str(cell["samples"])
        think = cell["think_tokens"]
        rows.append(
            [
                f"{cell['checkpoint']}, {cell['setting']}",
                percent(cell["pass"]["1"]),
                percent(cell["majority"] and cell["majority"][n]) if n != "1" else "",
                percent(cell["boxed"], ends=False),
                f"{think['mean']:.1f} ({think['p5']:.0f}-{think['p95']:.0f})" if think else "",
                percent(cell["capped"], ends=False),
                f"{100 * (cell['answer_cut'] or 0):.1f}",
                ", ".join(f"{k} {100 * v:.0f}" for k, v in cell["end"].items() if k != "budget"),
                _interval(cell["entropy"]),
                "–" if cell["distinct"] is None else f"{cell['distinct'][0]:.2f}",
                str(cell["failed_samples"] + cell["failed_verifications"]),
            ]
        )
    for group in results["groups"]:
        if group["task"] == task:
            votes, n = group["majority"], list(group["pass"])[-1]
            row = [f"{_of_seeds(group)}, {group['setting']}", spread(group["pass"]["1"], 100)]
            row += [spread(votes and votes[n], 100) if n != "1" else "", *[""] * 5]
            rows.append([*row, spread(group["entropy"], 1, 2), "", ""])
    heads = ["checkpoint, setting", "pass@1", "majority@n", "boxed", "think tokens (5-95 %)"]
    heads += ["capped", "answer cut", "other endings", "entropy", "distinct", "failed"]
    caption = (
        f"{task}, beside the accuracy: rates in %; capped: thinking ended at the budget; answer "
        "cut: at its last token; entropy in nats; distinct: different answers a problem; –: "
        f"the scorer does not say what it read. {spread_note(results)}"
    )
    if dropped := only(results["tasks"], name=task)["dropped"]:
        names = ", ".join(dropped[:5]) + (", ..." if len(dropped) > 5 else "")
        caption += f". Left out, as gold or prompt cannot be used: {len(dropped)} ({names})"
    return Table(f"beside-{task}", caption, heads, rows)


def _interval(value: Sequence[float | None] | None) -> str:
    return "" if value is None else number(value, 2)


def _seen(results: Results, task: str) -> Table | None:
    """Problems that also occur in training apart from those that do not."""
    cells = [c for c in results["cells"] if c["task"] == task and c["seen_problems"]]
    parts = ("pass1_seen", "pass1_unseen", "passn_seen", "passn_unseen")
    rows = [
        [
            f"{cell['checkpoint']}, {cell['setting']}",
            *(percent(cell.get(part)) for part in parts),
        ]
        for cell in cells
    ]
    if not cells:
        return None
    seen, total = cells[0]["seen_problems"], cells[0]["problems"]
    caption = (
        f"{task}: pass@1 and pass@n of the {seen} problems that occur in training, and of the "
        f"{total - seen} others, %. [95 % bootstrap interval over problems]"
    )
    heads = ["checkpoint, setting", "seen@1", "not seen@1", "seen@n", "not seen@n"]
    return Table(f"seen-{task}", caption, heads, rows)
