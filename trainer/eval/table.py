"""One table as Markdown and LaTeX, and the text of its cells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHORT = {
    "hard-greedy": "HG",
    "hard-sample": "HS",
    "fuzzy-greedy": "FG",
    "fuzzy-sample": "FS",
    "soft-greedy": "SG",
    "soft-sample": "SS",
}
"""The paper's abbreviations."""
LINE = 90
"""Characters in a row of a LaTeX table beyond which intervals go below their numbers."""
PAGE = 40
"""Lines of a LaTeX table on a page of the standard classes, beside its caption."""
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A caption, column names and cells of text."""

    name: str
    caption: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [f"**{self.caption}**", "", _bar(self.columns)]
        lines.append(_bar(["---"] + ["---:"] * (len(self.columns) - 1)))
        return "\n".join([*lines, *map(_bar, self.rows)]) + "\n"

    def latex(self) -> str:
        """Tables of booktabs, makecell and adjustbox that fit a line and a page.

        Rows wider than a line get their intervals below the numbers, and are shrunk as far as they
        still must be. What does not fit a page goes on in further tables: LaTeX lets a float run
        over the page's end, and rows there are lost.
        """
        grid = [self.columns, *self.rows]
        wide = sum(max(map(len, column)) for column in zip(*grid, strict=True)) > LINE
        cells = [[_lines(cell) if wide else [cell] for cell in row] for row in grid]
        step = max(1, PAGE // max(len(lines) for row in cells for lines in row))
        body = [" & ".join(map(_cell, row)) + r" \\" for row in cells]
        parts = [body[at : at + step] for at in range(1, len(body), step)] or [[]]
        return "\n".join(
            self._float(
                f" ({i} of {len(parts)})" if len(parts) > 1 else "",
                rf"\label{{tab:{self.name}}}" if i == 1 else "",
                [body[0], r"\midrule", *rows],
            )
            for i, rows in enumerate(parts, 1)
        )

    def _float(self, number: str, label: str, lines: Sequence[str]) -> str:
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering\small",
                rf"\caption{{{_tex(self.caption)}{number}}}{label}",
                r"\begin{adjustbox}{max width=\linewidth}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
                r"\toprule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{adjustbox}",
                r"\end{table}",
                "",
            ]
        )


def score(results: Results, training: str, task: str, setting: str, k: int) -> str:
    """pass@k of a training: mean ± deviation over seeds, else the value with its interval."""
    at = {"training": training, "task": task, "setting": setting}
    group = only(results["groups"], **at)
    if group is not None:
        return spread(group["pass"][str(k)], 100)
    cell = only(results["cells"], **at)
    return "–" if cell is None else percent(cell["pass"][str(k)])


def spread_note(results: Results) -> str:
    note = "[95 % bootstrap interval over problems]"
    return note + ("; ± standard deviation over training seeds" if results["groups"] else "")


def percent(value: Sequence[float | None] | None, *, ends: bool = True, sign: bool = False) -> str:
    """[mean, low, high] in per cent; a dash where there is no number."""
    if value is None:
        return "–"
    scaled = [None if v is None else 100 * v for v in value]
    return number(scaled if ends else scaled[:1], 1, sign=sign)


def spread(value: Sequence[float] | None, scale: float = 1.0, digits: int = 1) -> str:
    """[mean, standard deviation] over training seeds; a dash where there is no number."""
    if value is None:
        return "–"
    mean, deviation = (scale * v for v in value)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def number(value: Sequence[float | None], digits: int = 3, *, sign: bool = False) -> str:
    """[mean, low, high]; of a single item there is no interval."""
    mean, *ends = value
    text = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    interval = [f"{end:.{digits}f}" for end in ends if end is not None]
    return f"{text} [{', '.join(interval)}]" if interval else text


def only(entries: Sequence[Results], **wanted: str) -> Any:
    for entry in entries:
        if all(entry[key] == value for key, value in wanted.items()):
            return entry
    return None


def samples(results: Results, task: str, setting: str) -> int:
    cell = only(results["cells"], task=task, setting=setting)
    return 1 if cell is None else int(cell["samples"])


def setting_names(results: Results) -> list[str]:
    return [setting["name"] for setting in results["settings"]]


def trainings(results: Results) -> list[str]:
    return list(dict.fromkeys(c["training"] for c in results["checkpoints"]))


def _bar(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_TEX: dict[str, str] = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "–": "--",
    **{c: "\\" + c for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
}


def _tex(text: str) -> str:
    text = "".join(_TEX.get(c, c) for c in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", text)


def _lines(text: str) -> list[str]:
    """A wide cell's lines: its parts between slashes, or a number and the interval below it."""
    parts = text.split(" / ")
    if len(parts) > 1:
        return [part + " /" for part in parts[:-1]] + parts[-1:]
    value, bracket, interval = text.partition(" [")
    return [value, "[" + interval] if bracket else [text]


def _cell(lines: Sequence[str]) -> str:
    # braces: a bracket behind a line break would be taken for the break's length
    inner = r"\\".join(f"{{{_tex(line)}}}" for line in lines)
    return rf"\makecell[tr]{{{inner}}}" if len(lines) > 1 else _tex(lines[0])
