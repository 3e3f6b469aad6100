"""How trainings differ out of domain: paired differences, and the spread over training seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

from trainer.eval import metrics
from trainer.eval.store import ChoiceRow, KlRow
from trainer.eval.summary import REFERENCES, over_seeds, rounded

TEXTS = "held-out text"
"""Name of the KL texts where others have that of a set."""
CHOICE = ("accuracy", "accuracy_per_byte", "nll_per_token")
KL = ("kl", "kl_reverse", "nll")
Values = dict[str, np.ndarray]
"""Float [items] of every number."""
R = TypeVar("R", ChoiceRow, KlRow)


class Named(Protocol):
    @property
    def id(self) -> str: ...


def choice_values(rows: Sequence[ChoiceRow]) -> Values:
    """Every item's part of `likelihood.choice_numbers`, which is the mean of these."""

    def right(row: ChoiceRow, sizes: Sequence[float]) -> float:
        return float(np.argmax(np.array(row.log_likelihood) / sizes) == row.gold)

    nll = [-row.log_likelihood[row.gold] / row.tokens[row.gold] for row in rows]
    return {
        "accuracy": np.array([right(row, [1.0] * len(row.bytes)) for row in rows]),
        "accuracy_per_byte": np.array([right(row, row.bytes) for row in rows]),
        "nll_per_token": np.array(nll),
    }


def kl_values(rows: Sequence[KlRow]) -> Values:
    """Every text's part of `likelihood.kl_numbers`, nats per token."""
    fields = dict(zip(KL, ("forward", "reverse", "nll")))
    return {
        name: np.array([getattr(row, field) / row.tokens for row in rows])
        for name, field in fields.items()
    }


def summary(
    results: Mapping[str, Any],
    sets: Mapping[str, Sequence[Named]],
    texts: Sequence[tuple[str, str]],
    out: Path,
) -> dict[str, list[dict[str, Any]]]:
    """What `results.json` holds as `drift`, from the files under `out`/likelihood.

    Args:
        results: with `checkpoints`, `choice`, `kl`, `replicates` and `seed`.
        sets: the items of every set that was evaluated.
        texts: (number, text) of the held-out texts.

    Returns:
        `groups`: [mean, standard deviation] over the seeds of a training; `differences`: every
        training, and every `checkpoint` of those with several seeds, minus `hard` and minus `none`
        on the same items, [mean, low, high] over items.
    """
    members: dict[tuple[str, str], dict[str, Values]] = {}
    for checkpoint in results["checkpoints"]:
        folder = out / "likelihood" / checkpoint["name"]
        for name, items in sets.items():
            choices = _rows(folder / f"choice-{name}.jsonl", ChoiceRow, [i.id for i in items])
            key = (checkpoint["training"], name)
            members.setdefault(key, {})[checkpoint["name"]] = choice_values(choices)
        if texts:
            divergences = _rows(folder / "kl.jsonl", KlRow, [number for number, _ in texts])
            key = (checkpoint["training"], TEXTS)
            members.setdefault(key, {})[checkpoint["name"]] = kl_values(divergences)
    return {
        "groups": groups(results["choice"], results["kl"]),
        "differences": differences(members, results["replicates"], results["seed"]),
    }


def differences(
    members: Mapping[tuple[str, str], Mapping[str, Values]], replicates: int, seed: int
) -> list[dict[str, Any]]:
    """Trainings minus `hard` and minus `none`, paired by item. Seeds are averaged first; where
    there are several, each of them minus the reference's average follows: how far they lie apart
    is what the interval over items does not say.

    Args:
        members: of each (training, set), the values of its checkpoints by name.
    """
    averaged = {key: _mean(list(parts.values())) for key, parts in members.items()}
    out = []
    for (training, name), ours in averaged.items():
        for reference in REFERENCES:
            theirs = averaged.get((reference, name))
            if training in (reference, "none") or theirs is None:
                continue
            pair: dict[str, Any] = {"training": training, "minus": reference, "set": name}
            out.append(pair | _difference(ours, theirs, replicates, seed))
            parts = members[training, name]
            out += [
                {**pair, "checkpoint": one, **_difference(values, theirs, replicates, seed)}
                for one, values in parts.items()
                if len(parts) > 1
            ]
    return out


def _mean(parts: Sequence[Values]) -> Values:
    return {number: np.mean([part[number] for part in parts], axis=0) for number in parts[0]}


def _difference(
    ours: Values, theirs: Values, replicates: int, seed: int
) -> dict[str, list[float | None]]:
    out = {}
    for number, values in ours.items():
        bound = 1.0 if number.startswith("accuracy") else np.inf
        paired = (values - theirs[number])[:, None]
        ends = metrics.mean_interval(paired, replicates, seed, -bound, bound)
        out[number] = [rounded(end[0]) for end in ends]
    return out


def groups(
    choices: Sequence[Mapping[str, Any]], divergences: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """[mean, standard deviation] over seeds, for trainings with several."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in choices:
        found.setdefault((entry["training"], entry["set"]), []).append(entry)
    for entry in divergences:
        found.setdefault((entry["training"], TEXTS), []).append(entry)
    return [
        {
            "training": training,
            "set": name,
            "seeds": [entry["training_seed"] for entry in entries],
            **{
                number: over_seeds([entry[number][0] for entry in entries])
                for number in (KL if name == TEXTS else CHOICE)
            },
        }
        for (training, name), entries in found.items()
        if len(entries) > 1
    ]


def _rows(path: Path, kind: type[R], names: Sequence[str]) -> list[R]:
    """The rows of these items. The stores that wrote the file have checked what made it."""
    decoder = msgspec.json.Decoder(kind)
    with path.open("rb") as file:
        next(file)
        found = {row.key[0]: row for row in map(decoder.decode, file)}
    return [found[name] for name in names]
