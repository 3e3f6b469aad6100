"""From openai's response objects to replies and events; no I/O, so both clients share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from clients.errors import BadAnswer, NotASoftServer, StreamCut
from clients.request import asks_to_think, cot_fields
from clients.types import (
    ContentDelta,
    CoTBlock,
    Done,
    Event,
    ReasoningDelta,
    ServerInfo,
    SoftChoice,
    SoftReply,
    ThinkStep,
    ThinkStepEvent,
    ToolCallDelta,
)


def _extra(model: Any, name: str) -> Any:
    """A field that openai's types do not know."""
    return (model.model_extra or {}).get(name)


def _convert(raw: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise BadAnswer(
            f"the server's answer is not understood ({error}); server and client are of different "
            "versions of softvllm"
        ) from None


def _block(choice: Any) -> CoTBlock | None:
    raw = _extra(choice, "cot")
    return None if raw is None else _convert(raw, CoTBlock)


def read_info(raw: Any) -> ServerInfo:
    """The answer of `GET /v1/cot/info`."""
    info: ServerInfo = _convert(raw, ServerInfo)
    return info


def _check(choices: tuple[SoftChoice, ...], request: dict[str, Any], url: str) -> None:
    """Stock vLLM ignores fields it does not know, which must not pass for a think phase."""
    if not choices:
        raise BadAnswer(f"{url} gave an answer without choices")
    if asks_to_think(cot_fields(request.get("cot"))) and any(c.cot is None for c in choices):
        raise NotASoftServer(url, "answered without the think phase that was asked for")


def read_chat(raw: ChatCompletion, request: dict[str, Any], url: str) -> SoftReply:
    """A chat response in one piece."""
    choices = tuple(
        SoftChoice(
            index=choice.index,
            content=choice.message.content or "",
            reasoning=_extra(choice.message, "reasoning"),
            cot=_block(choice),
            finish_reason=choice.finish_reason,
            stop_reason=_extra(choice, "stop_reason"),
            tool_calls=tuple(
                call.model_dump(exclude_none=True) for call in choice.message.tool_calls or ()
            ),
        )
        for choice in raw.choices
    )
    _check(choices, request, url)
    return SoftReply(choices=choices, usage=raw.usage, raw=raw, kind="chat", request=request)


def read_completion(raw: Completion, request: dict[str, Any], url: str) -> SoftReply:
    """A completion: one text, which the `cot` block divides."""
    choices = []
    for choice in raw.choices:
        block = _block(choice)
        start = 0 if block is None or block.answer_start is None else block.answer_start
        choices.append(
            SoftChoice(
                index=choice.index,
                content=choice.text[start:],
                reasoning=None if block is None else choice.text[:start],
                cot=block,
                finish_reason=choice.finish_reason,
                stop_reason=_extra(choice, "stop_reason"),
            )
        )
    _check(tuple(choices), request, url)
    return SoftReply(
        choices=tuple(choices), usage=raw.usage, raw=raw, kind="complete", request=request
    )


@dataclass(slots=True)
class _Growing:
    """What has arrived of one choice."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    steps: list[ThinkStep] = field(default_factory=list)
    block: dict[str, Any] | None = None
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def choice(self, index: int) -> SoftChoice:
        cot = None
        if self.block is not None:
            block = _convert(self.block, CoTBlock)
            cot = msgspec.structs.replace(block, steps=tuple(self.steps) or None)
        return SoftChoice(
            index=index,
            content="".join(self.content),
            reasoning="".join(self.reasoning) or None,
            cot=cot,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            tool_calls=tuple(self.tool_calls[i] for i in sorted(self.tool_calls)),
        )


class StreamReader:
    """Collects the chunks of a streamed chat into events and, at the end, the reply."""

    def __init__(self, request: dict[str, Any], url: str) -> None:
        self._request = request
        self._url = url
        self._choices: dict[int, _Growing] = {}
        self._chunks: list[ChatCompletionChunk] = []
        self._usage: Any = None

    def feed(self, chunk: ChatCompletionChunk) -> Iterator[Event]:
        """The events of one chunk, in the order think step, reasoning, content, tool call."""
        self._chunks.append(chunk)
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices:
            index, delta = choice.index, choice.delta
            seen = self._choices.setdefault(index, _Growing())
            for step in self._take_block(seen, _extra(choice, "cot")):
                yield ThinkStepEvent(step, index)
            if text := _extra(delta, "reasoning"):
                seen.reasoning.append(text)
                yield ReasoningDelta(text, index)
            if delta.content:
                seen.content.append(delta.content)
                yield ContentDelta(delta.content, index)
            for call in delta.tool_calls or ():
                piece = call.model_dump(exclude_none=True)
                _merge_call(seen.tool_calls, piece)
                yield ToolCallDelta(piece, index)
            if choice.finish_reason is not None:
                seen.finish_reason = choice.finish_reason
                seen.stop_reason = _extra(choice, "stop_reason")

    def finish(self) -> Done:
        """The last event. Raises `StreamCut` if a choice has not finished."""
        choices = tuple(self._choices[i].choice(i) for i in sorted(self._choices))
        wanted = self._request.get("n") or 1
        if len(choices) < wanted or any(c.finish_reason is None for c in choices):
            raise StreamCut(f"{self._url} ended the stream before the answer was complete")
        _check(choices, self._request, self._url)
        reply = SoftReply(
            choices=choices,
            usage=self._usage,
            raw=self._chunks,
            kind="chat",
            request=self._request,
        )
        return Done(reply)

    @staticmethod
    def _take_block(seen: _Growing, raw: Any) -> tuple[ThinkStep, ...]:
        """Keep a chunk's `cot`: each has its own think steps, the last one all the rest."""
        if raw is None:
            return ()
        block = dict(raw)
        steps = _convert(block.pop("steps", None) or (), tuple[ThinkStep, ...])
        seen.steps += steps
        if block:
            seen.block = block
        return steps


def _merge_call(calls: dict[int, dict[str, Any]], piece: dict[str, Any]) -> None:
    """Add a piece of a tool call: the first names it, later ones extend its arguments."""
    function = piece.get("function", {})
    call = calls.setdefault(
        piece["index"],
        {"id": piece.get("id"), "type": "function", "function": {"name": "", "arguments": ""}},
    )
    call["id"] = call["id"] or piece.get("id")
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""
