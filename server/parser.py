"""vLLM's parser interface: reasoning by phase, tool calls by vLLM's own parser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage, FunctionCall
from vllm.parser.abstract_parser import Parser

from server.phases import PhaseSplitter

if TYPE_CHECKING:
    from server.turn import Turn


class PhaseParser(Parser):
    """One choice of one request. `tools` is vLLM's tool parser, fed only with the answer side."""

    def __init__(self, tokenizer: Any, turn: Turn, choice: int, tools: Parser | None) -> None:
        super().__init__(tokenizer)
        self._turn = turn
        self._choice = choice
        self._tools = tools
        self._splitter = PhaseSplitter(turn.markers)

    def is_reasoning_end(self, input_ids: list[int]) -> bool:
        """vLLM asks about the prompt: our requests always begin with a think phase."""
        return False

    def parse(
        self,
        model_output: str,
        request: Any,
        enable_auto_tools: bool = False,
        model_output_token_ids: Sequence[int] = (),
    ) -> tuple[str | None, str | None, list[FunctionCall] | None]:
        split = self._splitter.feed(self._turn.stream(self._choice), model_output)
        reasoning = split.reasoning or None
        if self._tools is None:
            return reasoning, split.content, []
        _, content, calls = self._tools.parse(
            split.content, request, enable_auto_tools, split.content_ids or ()
        )
        return reasoning, content, calls

    def parse_delta(
        self,
        delta_text: str,
        delta_token_ids: list[int],
        request: Any,
        prompt_token_ids: list[int] | None = None,
        *,
        finished: bool,
    ) -> DeltaMessage | None:
        split = self._splitter.feed(self._turn.stream(self._choice), delta_text)
        message: DeltaMessage | None = None
        if self._tools is not None:
            # A tool parser must also see the end, where it flushes what it held back.
            if split.content or split.content_ids or finished:
                message = self._tools.parse_delta(
                    split.content,
                    split.content_ids or [],
                    request,
                    prompt_token_ids,
                    finished=finished,
                )
        elif split.content:
            message = DeltaMessage(content=split.content)
        if split.reasoning and request.include_reasoning:
            message = message or DeltaMessage()
            message.reasoning = split.reasoning
        return message

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        return self._turn.think_tokens(self._choice)
