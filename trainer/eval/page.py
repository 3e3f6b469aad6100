"""The HTML report: tables, plots and transcripts with their think steps, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from trainer.data import Problem
from trainer.eval.store import Row, Step
from trainer.eval.table import Table

FULL_COLOUR = 4.0
"""Entropy, nats, from which on a step has the strongest colour."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
table { border-collapse: collapse; font-size: 13px } .wide { overflow-x: auto; margin: 1rem 0 }
th, td { border: 1px solid #ccc; padding: .2rem .5rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { background: #f3f3f3 }
caption { text-align: left; font-weight: 600; padding: .3rem 0; min-width: min(40rem, 90vw) }
details { border: 1px solid #ddd; border-radius: 4px; margin: .4rem 0; padding: .3rem .8rem }
summary { cursor: pointer } pre { white-space: pre-wrap; margin: .3rem 0; font-size: 13px }
.steps { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.steps span { border-radius: 2px; background: rgba(230, 120, 0, calc(var(--e) * .6)) }
.steps .soft { border-bottom: 2px solid #3572b0 } .good { color: #17752f } .bad { color: #a61c1c }
img, svg { max-width: 100%; height: auto }
"""


def page(
    tables: Sequence[Table],
    figures: Sequence[Path],
    transcripts: Sequence[tuple[str, Problem, Row]],
    facts: Mapping[str, str],
) -> str:
    """The whole page.

    Args:
        figures: SVG files, put into the page.
        transcripts: (cell's title, problem, sample) of every sample to show.
        facts: what the reader should know of the run, by name.
    """
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>Evaluation</title><style>{STYLE}</style></head><body><h1>Evaluation</h1><dl>",
        *(f"<dt><b>{escape(k)}</b></dt><dd>{escape(v)}</dd>" for k, v in facts.items()),
        "</dl><h2>Tables</h2>",
        *map(_table, tables),
    ]
    if figures:
        parts += ["<h2>Plots</h2>", *(_svg(figure) for figure in figures)]
    if transcripts:
        parts += [
            "<h2>Transcripts</h2><p>Think steps as shadow tokens. Orange: entropy of the next "
            f"token ({FULL_COLOUR:g} nats at full strength). Blue line: a mixture was fed. Point "
            "at a step for its likely tokens.</p>",
            *(_transcript(*entry) for entry in transcripts),
        ]
    return "\n".join([*parts, "</body></html>\n"])


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    return (
        f"<div class=wide><table id='{escape(table.name)}'><caption>{escape(table.caption)}"
        f"</caption>{row(table.columns, 'th')}{body}</table></div>"
    )


def _svg(figure: Path) -> str:
    text = figure.read_text(encoding="utf-8")
    return f"<div class=wide>{text[text.index('<svg') :]}</div>"


def _transcript(title: str, problem: Problem, row: Row) -> str:
    verdict, colour = ("correct", "good") if row.correct else ("wrong", "bad")
    steps = "".join(map(_step, row.steps or ())) or escape(row.think)
    extracted = "nothing" if row.extracted is None else repr(row.extracted)
    return (
        f"<details><summary>{escape(title)} · {escape(problem.id)} · <b class={colour}>{verdict}"
        f"</b>, {row.think_tokens} think tokens, ended by {escape(row.end)}</summary>"
        f"<b>Question</b><pre>{escape(problem.question)}</pre>"
        f"<b>Think steps</b><div class=steps>{steps}</div>"
        f"<b>Answer</b><pre>{escape(row.answer)}</pre>"
        f"<p>read: {escape(extracted)}; gold: {escape(problem.gold)}; seed {row.seed}</p></details>"
    )


def _step(step: Step) -> str:
    likely = "\n".join(f"{weight:.3f}  {token!r}" for token, weight in step.top)
    title = f"entropy {step.entropy:.2f}\n{likely}"
    strength = min(1.0, max(0.0, step.entropy / FULL_COLOUR))
    kind = " class=soft" if step.soft else ""
    return (
        f'<span{kind} style="--e:{strength:.2f}" title="{escape(title, quote=True)}">'
        f"{escape(step.token)}</span>"
    )
