"""`POST /v1/completions` with a think phase: vLLM's handler and our `cot` blocks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request
from pydantic import PrivateAttr
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve.engine.protocol import CompletionTokenUsageInfo, ErrorResponse
from vllm.sampling_params import SamplingParams

from server.metrics import FIELDS
from server.phases import answer_start
from server.protocol import MODE_FIELD, OPTIONS_FIELD, CoTField, CoTMode, check_sendable
from server.turn import Source, Turn, watch_all
from softvllm.engine.keys import USER_KEY

DEFAULT_MAX_TOKENS = 1024
"""`max_tokens` of a completion that thinks and does not say, if the prompt leaves that much:
OpenAI's 16 leave no room to think."""


class SoftCompletionRequest(CompletionRequest):
    """A completion request that may think."""

    cot_mode: CoTMode = MODE_FIELD
    cot: CoTField = OPTIONS_FIELD
    _turn: Turn | None = PrivateAttr(default=None)

    @property
    def turn(self) -> Turn:
        assert self._turn is not None
        return self._turn

    def to_sampling_params(self, max_tokens: int, *args: Any, **kwargs: Any) -> SamplingParams:
        if self._turn is not None and self.max_tokens is None:
            max_tokens = min(max_tokens, DEFAULT_MAX_TOKENS)
        params = super().to_sampling_params(max_tokens, *args, **kwargs)
        if self._turn is not None:
            params.extra_args = {**(params.extra_args or {}), USER_KEY: self._turn.cot.to_dict()}
            check_sendable(params, request_id=self.request_id, priority=self.priority)
        return params


FIELDS.update(SoftCompletionRequest.model_fields)


def wants_free_answer(request: CompletionRequest) -> bool:
    """Whether a grammar constrains the answer."""
    kind = getattr(request.response_format, "type", "text")
    return request.structured_outputs is not None or kind != "text"


class SoftServingCompletion(OpenAIServingCompletion):
    """vLLM's completion handler; requests with a `turn` get a think phase."""

    stock: OpenAIServingCompletion
    """vLLM's own handler: requests without a think phase never meet our code."""

    @classmethod
    def beside(cls, stock: OpenAIServingCompletion) -> SoftServingCompletion:
        """A handler that shares everything with vLLM's own."""
        handler = cls.__new__(cls)
        handler.__dict__.update(stock.__dict__)
        handler.stock = stock
        return handler

    async def create_completion(
        self, request: CompletionRequest, raw_request: Request | None = None
    ) -> AsyncGenerator[str, None] | CompletionResponse | ErrorResponse:
        if not isinstance(request, SoftCompletionRequest) or request._turn is None:
            return await self.stock.create_completion(request, raw_request)
        result = await super().create_completion(request, raw_request)
        if request.turn.source is not None:
            await request.turn.source.prime()
        return result

    def completion_stream_generator(  # type: ignore[override]
        self,
        request: Any,
        engine_inputs: Any,
        result_generator: AsyncIterator[Any],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        turn: Turn = request.turn
        _settle(request)
        turn.source = Source(result_generator, turn, request.n or 1)
        events = super().completion_stream_generator(
            request, engine_inputs, turn.source.items(), *args, **kwargs
        )
        return turn.annotated(events)

    def request_output_to_completion_response(
        self, final_res_batch: list[Any], request: Any, *args: Any, **kwargs: Any
    ) -> CompletionResponse:
        turn: Turn = request.turn
        _settle(request)
        watch_all(turn, enumerate(final_res_batch), request.n or 1)
        response = super().request_output_to_completion_response(
            final_res_batch, request, *args, **kwargs
        )
        texts = [output.text for result in final_res_batch for output in result.outputs]
        for choice in response.choices:
            block = turn.final(choice.index)
            shown = texts[choice.index]
            prompt = len(choice.text) - len(shown)  # with echo, the prompt comes first
            block["answer_start"] = prompt + answer_start(turn.stream(choice.index), shown)
            choice.cot = block  # type: ignore[attr-defined]
        response.usage.completion_tokens_details = CompletionTokenUsageInfo(
            reasoning_tokens=turn.total_think_tokens()
        )
        return response


def _settle(request: CompletionRequest) -> None:
    """vLLM's generators want a number, though only 0 would mean anything to them."""
    if request.max_tokens is None:
        request.max_tokens = DEFAULT_MAX_TOKENS
