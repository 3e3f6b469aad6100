"""Likelihoods in torch: choices of a question, and KL between two models on a text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import rows
from trainer.eval.choice import Item
from trainer.eval.config import KlConfig, ModelConfig
from trainer.eval.drift import choice_values
from trainer.eval.store import ChoiceRow, KlRow
from trainer.eval.summary import interval

POSITIONS = 64
"""Positions whose distributions are compared at a time: two models' V float32 numbers each."""


def load_model(path: str, config: ModelConfig) -> Any:
    """A model for inference.

    Raises:
        ValueError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {path!r}: {error}") from None
    return model.to(device).eval()


@torch.no_grad()
def choice_row(model: Any, tokenizer: Any, item: Item) -> ChoiceRow:
    """Log-likelihood of every choice after the context.

    Raises:
        ValueError: a choice has no token of its own.
    """
    context = tokenizer(item.context)["input_ids"]
    rows = []
    for choice in item.choices:
        ids = tokenizer(item.context + choice)["input_ids"]
        # A tokenizer may merge across the border: what differs from the context is the choice.
        start = next((i for i, (a, b) in enumerate(zip(ids, context)) if a != b), len(context))
        if start < 1:  # no token before it: nothing predicts it
            raise ValueError(f"item {item.id}: the context is not a prefix of {choice!r}")
        if len(ids) <= start:
            raise ValueError(f"item {item.id}: choice {choice!r} has no token of its own")
        rows.append((ids, start))
    first = min(start for _, start in rows)
    # What all choices share is read once; its last logits predict every choice's first token.
    shared = torch.tensor([rows[0][0][:first]], device=model.device)
    longest = max(len(ids) for ids, _ in rows)
    out = model(input_ids=shared, use_cache=longest > first + 1, logits_to_keep=1)
    logits = out.logits.expand(len(rows), -1, -1)  # [C, 1, V]
    if longest > first + 1:
        logits = torch.cat((logits, _rest(model, out.past_key_values, rows, first, longest)), 1)
    sums, tokens = [], []
    for at, (ids, start) in enumerate(rows):
        part = logits[at, start - first : len(ids) - first].float().log_softmax(-1)
        target = torch.tensor(ids[start:], device=model.device)
        sums.append(float(part.gather(1, target[:, None]).double().sum()))
        tokens.append(len(target))
    sizes = [len(choice.encode()) for choice in item.choices]
    return ChoiceRow(item=item.id, gold=item.gold, log_likelihood=sums, tokens=tokens, bytes=sizes)


def _rest(
    model: Any, cache: Any, rows: Sequence[tuple[list[int], int]], first: int, longest: int
) -> torch.Tensor:
    """Logits [C, longest - first - 1, V] after each choice's own tokens, from position first on."""
    batch = torch.zeros(len(rows), longest - first - 1, dtype=torch.long, device=model.device)
    mask = torch.ones(len(rows), longest - 1, dtype=torch.long, device=model.device)
    for at, (ids, _) in enumerate(rows):  # padding on the right leaves positions alone
        batch[at, : len(ids) - 1 - first] = torch.tensor(ids[first:-1])
        mask[at, len(ids) - 1 :] = 0
    cache.batch_repeat_interleave(len(rows))
    out = model(input_ids=batch, attention_mask=mask, past_key_values=cache, use_cache=True)
    logits: torch.Tensor = out.logits
    return logits


@torch.no_grad()
def kl_row(model: Any, base: Any, name: str, ids: list[int]) -> KlRow:
    """KL divergences and NLL over the tokens of one text, from the second on."""
    inputs = torch.tensor([ids])
    logits = [
        m(input_ids=inputs.to(m.device), use_cache=False).logits[0, :-1] for m in (model, base)
    ]  # [T - 1, V] each
    size = min(part.shape[1] for part in logits)  # padded vocabularies may differ in length
    sums = np.zeros(4)
    for at in range(0, len(ids) - 1, POSITIONS):
        ours, theirs = (
            part[at : at + POSITIONS, :size].float().cpu().log_softmax(-1) for part in logits
        )
        target = inputs[0, at + 1 : at + 1 + len(ours), None]
        sums += [
            float((theirs.exp() * (theirs - ours)).double().sum()),
            float((ours.exp() * (ours - theirs)).double().sum()),
            -float(ours.gather(1, target).double().sum()),
            -float(theirs.gather(1, target).double().sum()),
        ]
    return KlRow(
        text=name,
        tokens=len(ids) - 1,
        forward=float(sums[0]),
        reverse=float(sums[1]),
        nll=float(sums[2]),
        base_nll=float(sums[3]),
    )


def choice_numbers(rows: Sequence[ChoiceRow], replicates: int, seed: int) -> dict[str, Any]:
    """Accuracies and NLL of one set, each [mean, low, high] over items.

    `accuracy`: the likeliest choice is the correct one; `accuracy_per_byte`: after dividing by the
    choice's length; `nll_per_token`: of the correct answer, the mean over items of NLL / tokens.
    """
    values = choice_values(rows)
    return {
        "items": len(rows),
        "accuracy": interval(values["accuracy"], replicates, seed),
        "accuracy_per_byte": interval(values["accuracy_per_byte"], replicates, seed),
        "nll_per_token": interval(values["nll_per_token"], replicates, seed, bounded=False),
    }


def kl_numbers(rows: Sequence[KlRow], replicates: int, seed: int) -> dict[str, Any]:
    """Nats per token, each [mean, low, high] over texts, which count alike.

    `kl`: KL(base || checkpoint), healthy below 0.1 after a mild training; `kl_reverse`:
    KL(checkpoint || base); `nll`, `base_nll`: of the text itself.
    """
    names = {"kl": "forward", "kl_reverse": "reverse", "nll": "nll", "base_nll": "base_nll"}
    out: dict[str, Any] = {"texts": len(rows), "tokens": sum(row.tokens for row in rows)}
    for name, field in names.items():
        values = np.array([getattr(row, field) / row.tokens for row in rows])
        out[name] = interval(values, replicates, seed, bounded=False)
    return out


def texts(config: KlConfig, seed: int) -> tuple[list[tuple[str, str]], str]:
    """(number, text) of the held-out texts, chosen by the seed, and a short name of the whole
    file's content.

    Raises:
        ValueError: the file is missing or holds none.
    """
    assert config.texts is not None
    path = Path(config.texts).expanduser()
    try:
        raw = rows.text_of(path)
    except ValueError as error:
        raise ValueError(f"kl.texts: {error}") from None
    except OSError as error:
        raise ValueError(f"kl.texts: cannot read {path}: {error.strerror}") from None
    found: list[str] = []
    if path.suffix == ".jsonl":
        for number, line in enumerate(raw.split("\n"), 1):
            if not line.strip():
                continue
            try:
                found.append(_text_of(json.loads(line)))
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"kl.texts: {path}, line {number} has neither `text` nor `question`, `answer` "
                    f"({error})"
                ) from None
    else:
        found = [part.strip() for part in raw.split("\n\n") if part.strip()]
    if not found:
        raise ValueError(f"kl.texts: {path} holds no text")
    order = np.random.default_rng([seed, 2**31]).permutation(len(found))[: config.limit]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]
    return [(str(i), found[i]) for i in sorted(order.tolist())], digest


def require_tokens(found: Sequence[tuple[str, str]], tokenizer: Any) -> None:
    """Refuse texts in which no token has one before it to predict it from.

    Raises:
        ValueError: there is one; the message names it.
    """
    for name, text in found:
        if len(tokenizer(text)["input_ids"]) < 2:
            raise ValueError(
                f"kl.texts: text {name} ({text[:40]!r}) is shorter than two tokens; drop it"
            )


def _text_of(row: Any) -> str:
    if given := row.get("text"):
        text = rows.text(given, "text")
    else:
        text = "\n".join(rows.text(row[name], name) for name in ("question", "answer"))
    if not text.strip():
        raise ValueError("the text is empty")
    return text
