"""From what a user asked (`CoTParams`, texts) to what the device needs (`ResolvedCoT`, ids).

Runs once per request at the front end, with the model's tokenizer; the oracle uses the same
function, so both decode the same request.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from softvllm.core import policies
from softvllm.core.params import (
    ANSWER_RESERVE,
    DEFAULT_MAX_THINK,
    MAX_END_LENGTH,
    MAX_END_SEQUENCES,
    MAX_FORCED_LENGTH,
    MAX_SEED,
    MAX_STOP_IDS,
    CoTParams,
    CoTParamsError,
)

_BEFORE = ("", " ", "\n", "\n\n", ".", ". ", ".\n", ".\n\n", ":", ")", "**", "$", "\t")
_AFTER = ("", " ", "\n", "\n\n", " $", " \\", "**", "$", "\\", " 1")
"""Neighbours that tokenizers merge with an end string's first or last character."""


@dataclass(frozen=True, slots=True)
class ResolvedCoT:
    """One request's think phase in numbers and ids. Plain data: `dataclasses.asdict` ships it."""

    policy: str
    policy_values: list[float]
    num_extra: int
    """The policy's `num_extra`: the engine core sizes records without knowing the policy."""
    tau: float
    gamma: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_think: int
    min_think: int
    cold_entropy: float
    """0 means off: an entropy is never below it."""
    cold_steps: int
    end_sequences: list[list[int]]
    after_end: list[int]
    after_cut: list[int]
    stop_ids: list[int]
    """Tokens that would end the request (EOS, stop_token_ids); in the think phase they end
    the think phase instead."""
    greedy_answer: bool
    """Whether the answer is decoded at temperature 0."""
    answer_max: int
    """0 means no limit of its own."""
    record: str
    record_top: int
    mode: str
    nonce: int
    """Random per sample: keys the KV cache of soft positions, so that no other request, and no
    later prompt made of the shadow tokens, ever matches them."""

    def with_seed(self, seed: int) -> ResolvedCoT:
        """The same request for a sibling sample (n > 1), with its own cache nonce."""
        return dataclasses.replace(self, seed=seed, nonce=secrets.randbits(63))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ResolvedCoT:
        return cls(**raw)


def resolve(
    params: CoTParams,
    tokenizer: Any,
    *,
    stop_ids: Iterable[int],
    vocab_size: int,
    greedy_answer: bool,
    request_seed: int | None = None,
    max_tokens: int | None = None,
    think_limit: int | None = None,
) -> ResolvedCoT:
    """Resolve texts to ids and draw a seed where none was given.

    Args:
        params: the validated parameters.
        tokenizer: Hugging Face tokenizer, or None if only ids are used.
        stop_ids: the request's EOS and stop token ids.
        vocab_size: number of real vocabulary rows V; ids beyond it are refused.
        greedy_answer: whether the answer phase runs at temperature 0.
        request_seed: the request's own sampling seed, used where params has none.
        max_tokens: tokens the request may generate in all, None = unbounded.
        think_limit: think tokens the engine can hold a record of, None = unbounded.

    Raises:
        CoTParamsError: a text needs a tokenizer, a list is too long, or a forced text holds a
            token that would end the request.
    """
    ends = [list(s) for s in params.end_token_ids]
    for text in params.end_strings:
        ends += [list(s) for s in _end_variants(_need(tokenizer, "end_strings"), text)]
    ends = [list(s) for s in dict.fromkeys(tuple(e) for e in ends)]
    if len(ends) > MAX_END_SEQUENCES:
        raise CoTParamsError(
            "end_strings",
            f"give {len(ends)} token sequences, at most {MAX_END_SEQUENCES} fit; use fewer texts",
        )
    stops = sorted(set(stop_ids))
    if len(stops) > MAX_STOP_IDS:
        raise CoTParamsError(
            "mode",
            f"needs at most {MAX_STOP_IDS} EOS and stop token ids, the request has {len(stops)}",
        )
    after_end = _forced(params, "force_after_end", tokenizer, stops)
    after_cut = _forced(params, "force_after_cut", tokenizer, stops)
    for name, ids in (
        ("end_token_ids", [i for e in ends for i in e]),
        ("force_after_end", after_end),
        ("force_after_cut", after_cut),
    ):
        if ids and max(ids) >= vocab_size:
            raise CoTParamsError(name, f"id {max(ids)} is outside the vocabulary of {vocab_size}")
    if params.seed is not None:
        seed = params.seed
    elif request_seed is not None:
        seed = request_seed % MAX_SEED
    else:
        seed = secrets.randbelow(MAX_SEED)
    return ResolvedCoT(
        policy=params.policy_name,
        policy_values=policies.values(params.policy_name, params.policy_params),
        num_extra=policies.get(params.policy_name).num_extra,
        tau=params.tau,
        gamma=params.gamma,
        top_k=min(params.top_k, vocab_size),
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        seed=seed,
        max_think=_budget(params, max(len(after_end), len(after_cut)), max_tokens, think_limit),
        min_think=params.min_think_tokens,
        cold_entropy=params.cold_stop_entropy or 0.0,
        cold_steps=params.cold_stop_steps,
        end_sequences=ends,
        after_end=after_end,
        after_cut=after_cut,
        stop_ids=stops,
        greedy_answer=greedy_answer or params.answer_greedy,
        answer_max=params.answer_max_tokens or 0,
        record=params.record,
        record_top=params.record_top,
        mode=params.mode,
        nonce=secrets.randbits(63),
    )


def _budget(params: CoTParams, forced: int, max_tokens: int | None, think_limit: int | None) -> int:
    """The think budget: as asked if it fits, else derived from what fits."""
    if params.max_think_tokens is not None:
        budget = params.max_think_tokens
        if max_tokens is not None and budget + forced + 1 > max_tokens:
            raise CoTParamsError(
                "max_think_tokens",
                f"{budget} think + {forced} forced tokens leave no room for an answer within "
                f"max_tokens={max_tokens}; raise max_tokens or lower the budget",
            )
        if think_limit is not None and budget > think_limit:
            raise CoTParamsError(
                "max_think_tokens",
                f"{budget} exceeds {think_limit}, what this engine can record per request; lower "
                "the budget, or start with a larger trace_memory_gib or fewer max_num_seqs",
            )
        return budget
    room = DEFAULT_MAX_THINK
    if max_tokens is not None:
        reserve = min(params.answer_max_tokens or ANSWER_RESERVE, ANSWER_RESERVE)
        # A short max_tokens is shared: half to think, half to answer.
        reserve = max(1, min(reserve, (max_tokens - forced) // 2))
        room = min(room, max_tokens - forced - reserve)
    if think_limit is not None:
        room = min(room, think_limit)
    if 1 <= room < params.min_think_tokens:
        raise CoTParamsError(
            "min_think_tokens",
            f"{params.min_think_tokens} exceeds the derived budget of {room} think tokens; set "
            "max_think_tokens (and max_tokens, if it is what leaves so few)",
        )
    if room < 1:
        raise CoTParamsError(
            "max_think_tokens",
            f"max_tokens={max_tokens} leaves {max(room, 0)} tokens to think in; raise max_tokens "
            "or set max_think_tokens",
        )
    return room


def _need(tokenizer: Any, field: str) -> Any:
    if tokenizer is None:
        raise CoTParamsError(
            field, "a text needs a tokenizer, and this engine runs without one; give token ids"
        )
    return tokenizer


def _forced(params: CoTParams, field: str, tokenizer: Any, stops: list[int]) -> list[int]:
    value = getattr(params, field)
    if isinstance(value, str):
        ids = encode(_need(tokenizer, field), value) if value else []
    else:
        ids = list(value)
    if len(ids) > MAX_FORCED_LENGTH:
        raise CoTParamsError(field, f"has {len(ids)} tokens, at most {MAX_FORCED_LENGTH} fit")
    bad = sorted(set(ids) & set(stops))
    if bad:
        raise CoTParamsError(
            field, f"holds token {bad[0]}, which ends the request (EOS or stop_token_ids)"
        )
    return ids


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in the middle of a sequence: no BOS, no template."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def _encode_all(tokenizer: Any, texts: list[str]) -> list[tuple[int, ...]]:
    """`encode` of each text, in one call where the tokenizer takes several: a request may bring
    32 end strings of 130 texts each, and the event loop serves nobody meanwhile."""
    if getattr(tokenizer, "is_fast", False):
        return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return [tuple(encode(tokenizer, text)) for text in texts]


def _end_variants(tokenizer: Any, text: str) -> tuple[tuple[int, ...], ...]:
    hashable = type(tokenizer).__hash__ is not None
    return (_cached_variants if hashable else _variants)(tokenizer, text)


@lru_cache(maxsize=256)
def _cached_variants(tokenizer: Any, text: str) -> tuple[tuple[int, ...], ...]:
    return _variants(tokenizer, text)


def _variants(tokenizer: Any, text: str) -> tuple[tuple[int, ...], ...]:
    """Token sequences that can spell `text` inside a longer text.

    A tokenizer merges an end string's edges with their neighbours (" The", ":\\n"), so the
    string is encoded between typical neighbours and each time the fewest tokens that still
    spell it are kept.
    """

    @cache  # the same few sequences are left of nearly every neighbourhood
    def spelt(ids: tuple[int, ...]) -> bool:
        return text in tokenizer.decode(list(ids))

    found: dict[tuple[int, ...], None] = {}
    for ids in _encode_all(tokenizer, [b + text + a for b in _BEFORE for a in _AFTER]):
        while ids and spelt(ids[1:]):
            ids = ids[1:]
        while ids and spelt(ids[:-1]):
            ids = ids[:-1]
        if ids and spelt(ids) and len(ids) <= MAX_END_LENGTH:
            found[ids] = None
    if not found:
        raise CoTParamsError(
            "end_strings",
            f"{text!r} is longer than {MAX_END_LENGTH} tokens or cannot be spelt by the tokenizer",
        )
    # A sequence that contains another one as its suffix can never fire first.
    kept = [s for s in found if not any(o != s and s[-len(o) :] == o for o in found)]
    return tuple(kept[:MAX_END_SEQUENCES])
