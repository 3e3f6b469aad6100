"""Body of `POST /v1/rollouts`: its fields, their limits, and how it is read."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import msgspec
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from server.metrics import FIELDS
from server.protocol import MODE_FIELD, OPTIONS_FIELD, CoTField, CoTMode, shown
from softvllm.core.params import MAX_SEED
from softvllm.core.rollout import MAX_PROMPTS, MAX_SAMPLES, MAX_TOTAL
from softvllm.engine.errors import FieldRefusal


class RolloutPrompt(BaseModel):
    """One prompt: exactly one of the three."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt_token_ids: list[int] | None = Field(default=None, description="Token ids, fed as given.")
    messages: list[dict[str, Any]] | None = Field(
        default=None, description="A chat; the model's template is applied."
    )
    prompt: str | None = Field(default=None, description="Text, tokenised as /v1/completions does.")

    @model_validator(mode="after")
    def _exactly_one(self) -> RolloutPrompt:
        if sum(v is not None for v in (self.prompt_token_ids, self.messages, self.prompt)) != 1:
            raise ValueError("give exactly one of prompt_token_ids, messages and prompt")
        return self


class RolloutSampling(BaseModel):
    """How the answer is decoded: vLLM's sampling parameters of the same names."""

    model_config = ConfigDict(extra="forbid", strict=True)

    temperature: float = Field(default=1.0, description="0 decodes the answer greedily.")
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = Field(default=None, description="Think, forced and answer tokens.")
    min_tokens: int = 0
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = Field(default_factory=list)
    skip_special_tokens: bool = True

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        wrong = [key for key in bias or () if not key.isdecimal()]
        if wrong:
            raise ValueError(f"keys are token ids, got {wrong[0][:100]!r}")
        if not all(math.isfinite(value) for value in (bias or {}).values()):
            raise ValueError("values must be finite numbers")
        return bias


class RolloutRequest(BaseModel):
    """Body of `POST /v1/rollouts`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(default=None, description="Served model or LoRA adapter.")
    prompts: list[RolloutPrompt] = Field(min_length=1, max_length=MAX_PROMPTS)
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES, description="Samples per prompt.")
    seed: int | None = Field(
        default=None, ge=0, lt=MAX_SEED, description="Seed of the whole request; absent: random."
    )
    seeds: list[list[int]] | None = Field(
        default=None, description="One seed per sample, [prompts][n], in place of `seed`."
    )
    cot_mode: CoTMode = MODE_FIELD
    cot: CoTField = OPTIONS_FIELD
    sampling: RolloutSampling = Field(default_factory=RolloutSampling)
    chat_template_kwargs: dict[str, Any] | None = None
    request_id: str | None = Field(default=None, max_length=200)
    priority: int = 0
    stream: Literal[True] = True

    @model_validator(mode="after")
    def _fits(self) -> RolloutRequest:
        total = len(self.prompts) * self.n
        if total > MAX_TOTAL:
            raise ValueError(f"{total} samples in one request, at most {MAX_TOTAL}; split it")
        if self.seeds is not None:
            if self.seed is not None:
                raise ValueError("give seed or seeds, not both")
            if [len(s) for s in self.seeds] != [self.n] * len(self.prompts):
                raise ValueError(f"seeds must hold {len(self.prompts)} lists of n = {self.n}")
            if not all(0 <= s < MAX_SEED for row in self.seeds for s in row):
                raise ValueError("seeds must be in [0, 2**53)")
        return self


for _model in (RolloutRequest, RolloutPrompt, RolloutSampling):
    FIELDS.update(_model.model_fields)


async def parse_body(raw: Request) -> RolloutRequest:
    """The body, from JSON or msgpack; raises `FieldRefusal` (status 400)."""
    kind = raw.headers.get("content-type", "").split(";")[0].strip().lower()
    body = await raw.body()
    try:
        if kind in ("application/msgpack", "application/x-msgpack"):
            data = msgspec.msgpack.decode(body)
        elif kind == "application/json":
            data = json.loads(body)
        else:
            raise ValueError(f"content-type must be application/json or msgpack, got {kind!r}")
        return RolloutRequest.model_validate(data)
    except ValidationError as failed:
        error = failed.errors()[0]
        place = ".".join(shown(part) for part in error["loc"]) or "body"
        text = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            text = "unknown field"
        elif error["type"] != "value_error":
            text = f"{text}, got {str(error['input'])[:100]!r}"
        raise FieldRefusal(place, text) from None
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise FieldRefusal("body", f"cannot be read: {error}") from None
