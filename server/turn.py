"""One request on its way through vLLM's handlers: what they hide from us, kept at hand.

vLLM's generators take engine outputs and give text or JSON. A `Turn` sits on both sides: it
watches the outputs go in, so that the parser and the `cot` blocks know the phases, and it waits a
moment for the first output, so that a refusal is a status 400 and not a broken stream.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from functools import lru_cache
from typing import Any

from server.metrics import METRICS
from server.phases import answer_start
from server.report import Decode, NanLogitsError, final_block, think_steps
from softvllm.core.params import CoTParams
from softvllm.core.phases import Phase
from softvllm.core.trace import STEP
from softvllm.engine.outputs import CoTOutput, CoTStream

FIRST_OUTPUT_SECONDS = 1.0
"""How long the response's head waits for the first output: a refusal comes at once."""
DONE = "data: [DONE]\n\n"


class Turn:
    """State of one chat or completion request with a think phase."""

    def __init__(
        self, cot: CoTParams, *, trace: bool, markers: frozenset[int], decode: Decode
    ) -> None:
        self.cot = cot
        self.trace = trace
        self.markers = markers
        self.decode = lru_cache(maxsize=4096)(decode)
        self.parsers = 0
        """Parsers made so far: the i-th belongs to choice i."""
        self.source: Source | None = None
        self._outputs: dict[int, CoTOutput] = {}
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        """Text that the engine gave each choice, in the pieces of a stream."""
        self._sent: Counter[int] = Counter()
        """Characters sent for each choice of a streamed completion, an echoed prompt included."""
        self._shown: dict[int, int] = {}
        self._finished: set[int] = set()

    @property
    def top(self) -> bool:
        return self.cot.record == "top"

    def watch(self, choice: int, output: Any) -> None:
        """Note an engine output (`CompletionOutput`) of a choice."""
        assert output.cot is not None, "a CoT request whose output has no CoT side"
        self._outputs[choice] = output.cot
        self._texts[choice].append(output.text)
        if output.finish_reason is not None and choice not in self._finished:
            self._finished.add(choice)
            METRICS.finished(output.cot, output.finish_reason)

    def abandon(self) -> None:
        """The client left: choices that had begun and never finished."""
        for choice in set(self._outputs) - self._finished:
            self._finished.add(choice)
            METRICS.finished(self._outputs[choice], "disconnect")

    def stream(self, choice: int) -> CoTStream:
        return self._outputs[choice].stream

    def think_tokens(self, choice: int) -> int:
        """Think tokens of a choice so far."""
        if choice not in self._outputs:
            return 0
        steps = self.stream(choice).builder.steps
        return bytes(steps[_PHASE_AT :: STEP.itemsize]).count(int(Phase.THINK))

    def total_think_tokens(self) -> int:
        return sum(self.think_tokens(choice) for choice in self._outputs)

    def final(self, choice: int) -> dict[str, Any]:
        """The `cot` block of a finished choice of a response in one piece."""
        return final_block(
            self._outputs[choice], trace=self.trace, top=self.top, decode=self.decode
        )

    async def annotated(self, events: AsyncIterator[str]) -> AsyncGenerator[str, None]:
        """vLLM's server-sent events with our `cot` blocks in them."""
        try:
            async for event in events:
                yield self._annotate(event) if event.startswith("data: {") else event
        except NanLogitsError as error:
            body = {"error": {"message": str(error), "type": "InternalServerError", "code": 500}}
            yield f"data: {json.dumps(body)}\n\n"
            yield DONE
        finally:
            await events.aclose()  # type: ignore[attr-defined]
            self.abandon()

    def _annotate(self, event: str) -> str:
        chunk = json.loads(event[6:])
        for choice in chunk.get("choices") or ():
            index = choice["index"]
            self._sent[index] += len(choice.get("text") or "")
            if index not in self._outputs or "role" in (choice.get("delta") or {}):
                continue  # the first event of a choice only names the role
            block: dict[str, Any] = {}
            if choice.get("finish_reason") is not None:
                cot = self._outputs[index]
                block = final_block(cot, trace=self.trace, top=False, decode=self.decode)
                if "text" in choice:
                    block["answer_start"] = self._answer_start(index)
            if self.top and (steps := self._new_steps(index)):
                block["steps"] = steps
            if block:
                choice["cot"] = block
        usage = chunk.get("usage")
        if usage and not usage.get("completion_tokens_details"):
            usage["completion_tokens_details"] = {"reasoning_tokens": self.total_think_tokens()}
        return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def _answer_start(self, index: int) -> int:
        """Where the answer side begins in the text that a finished streamed completion sent."""
        text = "".join(self._texts[index])
        prompt = self._sent[index] - len(text)  # with echo, the prompt came first
        return prompt + answer_start(self.stream(index), text)

    def _new_steps(self, index: int) -> list[dict[str, Any]]:
        """Think steps not shown yet: vLLM skips events for tokens that gave no text."""
        builder = self.stream(index).builder
        start, stop = self._shown.get(index, 0), len(builder)
        self._shown[index] = stop
        return think_steps(builder.build(start, stop), self.decode) if stop > start else []


_PHASE_AT = STEP.fields["phase"][1] if STEP.fields else 0


class Source:
    """Engine outputs of a streamed request, watched; started before the response begins."""

    def __init__(self, outputs: AsyncIterator[Any], turn: Turn, num_samples: int) -> None:
        self._outputs = outputs
        self._turn = turn
        self._num_samples = num_samples
        self._first: asyncio.Future[Any] | None = None

    async def prime(self) -> None:
        """Start; raises what the engine's front end raises on a request it refuses."""
        self._first = asyncio.ensure_future(anext(self._outputs))  # type: ignore[arg-type]
        try:
            await asyncio.wait({self._first}, timeout=FIRST_OUTPUT_SECONDS)
            if self._first.done():
                self._first.result()
        except BaseException:
            await self.close()
            raise

    async def items(self) -> AsyncGenerator[Any, None]:
        """The outputs, as vLLM's generator expects them."""
        try:
            if self._first is not None:
                item = await self._first
                self._watch(item)
                yield item
            async for item in self._outputs:
                self._watch(item)
                yield item
        except StopAsyncIteration:
            return
        finally:
            await self.close()

    async def close(self) -> None:
        """Stop wherever it is, so that the engine aborts the request."""
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.wait({self._first})
        await self._outputs.aclose()  # type: ignore[attr-defined]

    def _watch(self, item: Any) -> None:
        prompt, result = item if isinstance(item, tuple) else (0, item)
        watch_all(self._turn, [(prompt, result)], self._num_samples)


def watch_all(turn: Turn, results: Iterable[tuple[int, Any]], num_samples: int) -> None:
    """Note the outputs of several prompts; choice = prompt x n + sample, as vLLM numbers them."""
    for prompt, result in results:
        for output in result.outputs:
            turn.watch(prompt * num_samples + output.index, output)
