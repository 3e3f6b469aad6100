"""The typed request fields `cot_mode` and `cot`, and what they become for the engine.

The fields of `cot` are those of `CoTParams`, generated from it, so that `/openapi.json` never
disagrees with the engine. Types are checked here (strictly: no "5" for 5), ranges and
contradictions by `CoTParams`, once for every way into the engine.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from functools import cache
from typing import Annotated, Any, Literal, Optional

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, create_model

from server.metrics import FIELDS, METRICS
from server.options import ServerOptions
from softvllm.core.params import CoTParams, CoTParamsError
from softvllm.core.recipe import FORCED, recipe_for
from softvllm.engine.errors import CoTRequestError, FieldRefusal, ThinkRefusal

RECORD_TRACE = "trace"
"""`record` of the server only: everything there is, as the mode and support allow."""

PENALTY = 1e-6, 1e6
"""Range of `repetition_penalty` in which products with logits stay far from float32's limits."""

_WIRE_TYPES: dict[str, Any] = {
    "end_strings": list[str],
    "end_token_ids": list[list[int]],
    "force_after_end": str | list[int],
    "force_after_cut": str | list[int],
    "policy_params": dict[str, float],
    "record": Literal["steps", "top", "sparse", "dense", "trace"],
}
"""Where JSON's types differ from the dataclass's."""


@cache
def _docs() -> dict[str, str]:
    """The sentence below each field of `CoTParams`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(CoTParams)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            value = text.value
            if isinstance(value, ast.Constant) and isinstance(field.target, ast.Name):
                docs[field.target.id] = " ".join(str(value.value).split())
    return docs


def _options_model() -> type[BaseModel]:
    hints = inspect.get_annotations(CoTParams, eval_str=True)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(CoTParams):
        kind = _WIRE_TYPES.get(field.name, hints[field.name])
        fields[field.name] = (
            Optional[kind],  # noqa: UP045  (a computed type)
            Field(default=None, description=_docs().get(field.name)),
        )
    model = create_model("CoTOptions", __config__=ConfigDict(extra="forbid", strict=True), **fields)
    model.__doc__ = "How this request thinks (docs/parameters.md). What is absent is the server's."
    return model


CoTOptions = _options_model()
FIELDS.update(CoTOptions.model_fields, ("cot", "cot_mode"))


def shown(text: object) -> str:
    """What a client wrote, for a message: short, and valid Unicode even if it was not."""
    return str(text)[:100].encode(errors="backslashreplace").decode()


def _readable(name: str) -> WrapValidator:
    """One sentence with field and remedy instead of pydantic's list of errors.

    The exception is no `ValueError` on purpose: pydantic would wrap that into the list again.
    """

    def validate(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError as failed:
            error = failed.errors()[0]
            place = [str(p) for p in error["loc"] if str(p) in CoTOptions.model_fields]
            if error["type"] == "extra_forbidden":
                known = ", ".join(sorted(CoTOptions.model_fields))
                place, text = [shown(error["loc"][0])], f"unknown field; known fields: {known}"
            else:
                text = f"{error['msg']}, got {str(error['input'])[:100]!r}"
        field = ".".join([name, *place])
        METRICS.refuse(name if error["type"] == "extra_forbidden" else field)
        refusal = FieldRefusal(field, text)
        refusal.counted = True  # type: ignore[attr-defined]  # rollouts pass `counted()`, too
        raise refusal

    return WrapValidator(validate)


CoTMode = Annotated[Literal["hard", "soft", "fuzzy", "mixed"] | None, _readable("cot_mode")]
CoTField = Annotated[CoTOptions | None, _readable("cot")]  # type: ignore[valid-type]

MODE_FIELD = Field(
    default=None,
    description="How the request thinks: hard, soft, fuzzy or mixed. Absent: the server's "
    "default, or no think phase. hard without cot is stock vLLM.",
)
OPTIONS_FIELD = Field(default=None, description="Everything else about the think phase.")


def build_cot(
    mode: str | None,
    options: BaseModel | None,
    server: ServerOptions,
    tokenizer: Any,
    *,
    free_answer: bool = False,
) -> CoTParams | None:
    """The engine's parameters of a request, or None if it stays a stock vLLM request.

    Args:
        mode: the request's `cot_mode`.
        options: the request's `cot`.
        server: the server's defaults.
        tokenizer: the model's, for its recipe.
        free_answer: see `recipe_for`.

    Raises:
        CoTRequestError: out of range or contradictory (status 400).
    """
    given = {} if options is None else options.model_dump(exclude_none=True)
    asked = given.pop("mode", None)
    if mode is not None and asked is not None and mode != asked:
        raise CoTRequestError(
            CoTParamsError("mode", f"is {asked!r}, but cot_mode is {mode!r}; give one of them")
        )
    chosen = mode or asked or server.default_mode
    if options is None and chosen in (None, "hard"):
        return None
    chosen = chosen or "soft"
    try:
        return CoTParams.from_dict(_merged(chosen, given, server, tokenizer, free_answer))
    except CoTParamsError as error:
        raise CoTRequestError(error) from None


def _merged(
    mode: str, given: dict[str, Any], server: ServerOptions, tokenizer: Any, free_answer: bool
) -> dict[str, Any]:
    recipe = recipe_for(tokenizer, free_answer=free_answer)
    if {"end_strings", "end_token_ids"} & set(given):
        recipe.pop("end_strings")  # the request says itself how thinking ends
    defaults = {**recipe, **server.cot}
    if free_answer:
        defaults.update({k: recipe[k] for k in FORCED})
    if mode == "hard":  # defaults of soft decoding do not make a hard request wrong
        for name in ("noise", "noise_scale"):
            defaults.pop(name, None)
        if defaults.get("record") in ("sparse", "dense"):
            defaults.pop("record")
    if mode != "mixed":
        for name in ("policy", "policy_params"):
            defaults.pop(name, None)
    if "policy" in given:
        defaults.pop("policy_params", None)
    merged = {**defaults, **given, "mode": mode}
    if mode == "mixed":
        merged.setdefault("policy", "blend")
    if merged.get("record") == RECORD_TRACE:
        merged["record"] = trace_record(mode, merged.get("top_k", 0))
    return merged


def trace_record(mode: str, top_k: int) -> str:
    """The cheapest record that reproduces every fed input exactly."""
    if mode == "hard":
        return "steps"
    return "sparse" if top_k else "dense"


def wants_trace(options: BaseModel | None) -> bool:
    """Whether the response carries the binary trace."""
    record = getattr(options, "record", None)
    return record in (RECORD_TRACE, "sparse", "dense")


def check_sendable(params: msgspec.Struct, **others: Any) -> None:
    """Refuse what cannot reach the engine's process or makes its numbers NaN.

    Lone surrogates and huge numbers: msgpack cannot carry them, which vLLM finds out after it has
    noted the request; it answers 500 and never forgets it. A repetition penalty near float32's
    limits: the answer's logits become infinite and its probabilities NaN.

    Args:
        params: vLLM's `SamplingParams`.
        others: further fields of the request that travel with them.

    Raises:
        FieldRefusal: status 400.
    """
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    if not PENALTY[0] <= fields.get("repetition_penalty", 1.0) <= PENALTY[1]:
        raise ThinkRefusal("repetition_penalty", "must be in [1e-6, 1e6] for a think phase")
    for name, value in {**fields, **others}.items():
        try:
            msgspec.msgpack.encode(value)
        except (UnicodeEncodeError, OverflowError):
            reason = "holds text that is not valid Unicode or a number of more than 64 bits"
            raise FieldRefusal(name, reason) from None
        except TypeError:
            pass  # vLLM's own objects, for which it has its own encoding


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema without references, which would not resolve inside `/openapi.json`."""
    schema = model.model_json_schema()
    shared = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, list):
            return [resolved(item) for item in node]
        if not isinstance(node, dict):
            return node
        rest = {name: resolved(value) for name, value in node.items() if name != "$ref"}
        name = node.get("$ref", "").rpartition("/")[2]
        return {**resolved(shared[name]), **rest} if name else rest

    return dict(resolved(schema))
