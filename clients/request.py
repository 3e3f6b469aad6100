"""From a caller's arguments to request bodies; the same for the sync and the async client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clients.types import SoftReply

if TYPE_CHECKING:
    from softvllm.core.params import CoTParams

    CoT = str | Mapping[str, Any] | CoTParams | None

Messages = str | Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A rollout prompt: text, token ids, chat messages, or the route's own object."""


def cot_fields(cot: CoT) -> dict[str, Any]:
    """The request's `cot_mode` and `cot`.

    Args:
        cot: a mode; fields of `CoTParams` (with "mode" among them, if the server's default is not
            meant); a `CoTParams`, of which the mode and every field that differs from its default
            are sent (the rest is left to the server, whose recipe fits the model; to insist on a
            value that is the default, give a dict); or None, for the server's default.
    """
    if cot is None:
        return {}
    if isinstance(cot, str):
        return {"cot_mode": cot}
    if not isinstance(cot, Mapping):
        from softvllm.core.params import CoTParams

        if not isinstance(cot, CoTParams):
            raise TypeError(
                f"cot must be a mode, a dict of fields or CoTParams, got {type(cot).__name__}"
            )
        defaults = CoTParams().to_dict()
        cot = {k: v for k, v in cot.to_dict().items() if k == "mode" or v != defaults[k]}
    fields = dict(cot)
    mode = fields.pop("mode", None)
    return {"cot": fields} if mode is None else {"cot_mode": mode, "cot": fields}


def asks_to_think(fields: Mapping[str, Any]) -> bool:
    """Whether a response to these fields must have a `cot` block."""
    mode = fields.get("cot_mode")
    return "cot" in fields if mode in (None, "hard") else True


def create_arguments(
    ask: Mapping[str, Any], cot: CoT, arguments: Mapping[str, Any], *, stream: bool = False
) -> dict[str, Any]:
    """Keyword arguments of openai's `create`.

    Args:
        ask: `messages` or `prompt`.
        cot: see `cot_fields`.
        arguments: the caller's further arguments; an `extra_body` is kept.
    """
    if "stream" in arguments:
        raise ValueError("stream is not an argument here; use .stream() for a streamed chat")
    fields = cot_fields(cot)
    extra = dict(arguments.get("extra_body") or {})
    for name in ("cot_mode", "cot"):
        if name in extra:
            raise ValueError(f"extra_body must not hold {name}; use the argument cot")
    out = {**arguments, **ask}
    if fields or extra:
        out["extra_body"] = {**extra, **fields}
    if stream:
        options = dict(arguments.get("stream_options") or {})
        out |= {"stream": True, "stream_options": {"include_usage": True, **options}}
    return out


def as_messages(messages: Messages) -> list[Mapping[str, Any]]:
    """A text is one user message."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return list(messages)


def repeat_arguments(reply: SoftReply, index: int) -> dict[str, Any]:
    """See `SoftReply.again`."""
    choice = next((c for c in reply.choices if c.index == index), None)
    if choice is None:
        raise ValueError(f"the reply has {len(reply.choices)} choices, none with index {index}")
    if choice.cot is None:
        raise ValueError(
            "a reply of stock vLLM cannot be repeated, for its seed is not reported; give seed= "
            "yourself, or ask with a cot"
        )
    arguments = dict(reply.request)
    num_samples = arguments.pop("n", None) or 1
    fields = cot_fields(arguments.pop("cot", None)).get("cot") or {}
    arguments["cot"] = {**fields, "mode": choice.cot.mode, "seed": choice.cot.seed}
    if reply.kind == "complete":
        prompt = arguments["prompt"]
        if not isinstance(prompt, str) and prompt and not isinstance(prompt[0], int):
            arguments["prompt"] = prompt[index // num_samples]
    return arguments


def rollout_body(
    prompts: Iterable[Prompt],
    *,
    n: int,
    cot: CoT,
    sampling: Mapping[str, Any] | None,
    seed: int | None,
    seeds: Sequence[Sequence[int]] | None,
    model: str | None,
) -> dict[str, Any]:
    """The JSON of `POST /v1/rollouts`; what is None is left out."""
    if isinstance(prompts, (str, bytes, Mapping)):
        raise TypeError("prompts must be a list of prompts, even if there is only one")
    body: dict[str, Any] = {"prompts": [_rollout_prompt(p) for p in prompts], "n": n}
    body |= cot_fields(cot)
    for name, value in (("sampling", sampling), ("seed", seed), ("model", model)):
        if value is not None:
            body[name] = value
    if seeds is not None:
        body["seeds"] = [[int(s) for s in row] for row in seeds]
    return body


def _rollout_prompt(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Mapping):
        return dict(prompt)
    # Arrays have no JSON of their own.
    items: list[Any] = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if items and isinstance(items[0], Mapping):
        return {"messages": [dict(m) for m in items]}
    return {"prompt_token_ids": items}
