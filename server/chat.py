"""`POST /v1/chat/completions` with a think phase: vLLM's handler, our parser and `cot` blocks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request
from pydantic import PrivateAttr
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.parser import ParserManager
from vllm.parser.abstract_parser import Parser
from vllm.sampling_params import SamplingParams

from server.metrics import FIELDS
from server.parser import PhaseParser
from server.protocol import MODE_FIELD, OPTIONS_FIELD, CoTField, CoTMode, check_sendable
from server.turn import Source, Turn, watch_all
from softvllm.engine.keys import USER_KEY


class SoftChatRequest(ChatCompletionRequest):
    """A chat request that may think."""

    cot_mode: CoTMode = MODE_FIELD
    cot: CoTField = OPTIONS_FIELD
    _turn: Turn | None = PrivateAttr(default=None)

    @property
    def turn(self) -> Turn:
        assert self._turn is not None
        return self._turn

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        params = super().to_sampling_params(*args, **kwargs)
        if self._turn is not None:
            params.extra_args = {**(params.extra_args or {}), USER_KEY: self._turn.cot.to_dict()}
            check_sendable(params, request_id=self.request_id, priority=self.priority)
        return params


FIELDS.update(SoftChatRequest.model_fields)


def wants_free_answer(request: ChatCompletionRequest) -> bool:
    """Whether a grammar or a tool parser reads the answer side."""
    kind = getattr(request.response_format, "type", "text")
    tools = bool(request.tools) and request.tool_choice != "none"
    return tools or request.structured_outputs is not None or kind != "text"


class SoftServingChat(OpenAIServingChat):
    """vLLM's chat handler; requests with a `turn` get a think phase."""

    @classmethod
    def beside(cls, stock: OpenAIServingChat, args: Any) -> SoftServingChat:
        """A handler that shares everything with vLLM's own, with phases instead of markers."""
        handler = cls.__new__(cls)
        handler.__dict__.update(stock.__dict__)
        handler.stock = stock
        handler._include_reasoning_tokens_details = True
        handler.tool_parser_only = ParserManager.get_parser(
            tool_parser_name=args.tool_call_parser,
            reasoning_parser_name=None,
            enable_auto_tools=args.enable_auto_tool_choice,
            tool_strict_level=args.tool_strict_level,
            model_name=stock.model_config.model,
            tokenizer=stock.renderer.tokenizer,
        )
        tools = getattr(handler.tool_parser_only, "tool_parser_cls", None)
        handler.parser_cls = type("PhaseParser", (PhaseParser,), {"tool_parser_cls": tools})
        return handler

    stock: OpenAIServingChat
    """vLLM's own handler: requests without a think phase never meet our code."""
    tool_parser_only: type[Parser] | None

    def _make_parser(
        self, request: Any, tokenizer: Any, chat_template_kwargs: dict[str, Any] | None
    ) -> Parser:
        tools = None
        if self.tool_parser_only is not None:
            tools = self.tool_parser_only(
                tokenizer,
                request.tools,
                chat_template_kwargs=chat_template_kwargs,
                model_config=self.model_config,
            )
        turn: Turn = request.turn
        turn.parsers += 1
        return PhaseParser(tokenizer, turn, turn.parsers - 1, tools)

    async def create_chat_completion(
        self, request: ChatCompletionRequest, raw_request: Request | None = None
    ) -> AsyncGenerator[str, None] | ChatCompletionResponse | ErrorResponse:
        if not isinstance(request, SoftChatRequest) or request._turn is None:
            return await self.stock.create_chat_completion(request, raw_request)
        result = await super().create_chat_completion(request, raw_request)
        if request.turn.source is not None:
            await request.turn.source.prime()
        return result

    def chat_completion_stream_generator(  # type: ignore[override]
        self, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        turn: Turn = request.turn
        turn.parsers = 0  # the one made for the request itself is not used for streams
        turn.source = Source(result_generator, turn, request.n or 1)
        events = super().chat_completion_stream_generator(
            request, turn.source.items(), *args, **kwargs
        )
        return turn.annotated(events)

    async def chat_completion_full_generator(
        self, request: Any, result_generator: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> ErrorResponse | ChatCompletionResponse:
        turn: Turn = request.turn

        async def watched() -> AsyncGenerator[Any, None]:
            async for result in result_generator:
                watch_all(turn, [(0, result)], request.n or 1)
                yield result

        response = await super().chat_completion_full_generator(request, watched(), *args, **kwargs)
        if isinstance(response, ChatCompletionResponse):
            for choice in response.choices:
                choice.cot = turn.final(choice.index)  # type: ignore[attr-defined]
        return response
