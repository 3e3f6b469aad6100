"""`AsyncSoftClient`: `SoftClient` for asyncio; arguments and errors are the same.

async with AsyncSoftClient() as client:
    reply = await client.chat("What is 7 plus 5?", cot="soft")
    async with await client.stream("Again?", cot="soft") as events:
        async for event in events:
            ...
    async for sample in await client.rollouts(["7 + 5 ="], n=8, cot="soft"):
        ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import httpx2
import openai

from clients.connection import (
    DEFAULT_URL,
    clean_url,
    first_model,
    openai_arguments,
    read_json,
    transport_arguments,
)
from clients.errors import translated
from clients.reading import StreamReader, read_chat, read_completion, read_info
from clients.request import Messages, Prompt, as_messages, create_arguments, rollout_body
from clients.types import Event, ServerInfo, SoftReply

if TYPE_CHECKING:
    from clients.request import CoT
    from clients.rollouts import AsyncRolloutStream


class AsyncChatStream:
    """The events of a streamed chat; the last one is `Done`. Closing it early stops the server."""

    def __init__(self, chunks: Any, reader: StreamReader, url: str) -> None:
        self._chunks = chunks
        self._url = url
        self._events = self._read(reader)
        self.reply: SoftReply | None = None
        """The whole answer, once the stream has ended."""

    async def _read(self, reader: StreamReader) -> AsyncGenerator[Event, None]:
        try:
            with translated(self._url, streaming=True):
                async for chunk in self._chunks:
                    for event in reader.feed(chunk):
                        yield event
            done = reader.finish()
            self.reply = done.reply
            yield done
        finally:
            await self._chunks.close()

    def __aiter__(self) -> AsyncChatStream:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def __aenter__(self) -> AsyncChatStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hang up; the server aborts what is unfinished."""
        await self._events.aclose()
        await self._chunks.close()  # a generator that never ran does not clean up


class AsyncSoftClient:
    """A connection to one server, for one event loop; `aclose` it or use it in `async with`."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        model: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 0,
    ) -> None:
        """Arguments as for `SoftClient`."""
        self.url = clean_url(base_url)
        self._model = model
        self._http = httpx2.AsyncClient(**transport_arguments(self.url, api_key, timeout))
        self.openai = openai.AsyncOpenAI(
            http_client=self._http,
            timeout=self._http.timeout,
            **openai_arguments(self.url, api_key, max_retries),
        )
        """The plain client underneath, on the same connections."""

    async def __aenter__(self) -> AsyncSoftClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def model_name(self) -> str:
        """The model's name, as given or as the server tells."""
        if self._model is None:
            self._model = first_model(await self._get("/v1/models"), self.url)
        return self._model

    async def info(self) -> ServerInfo:
        """See `SoftClient.info`."""
        return read_info(await self._get("/v1/cot/info"))

    async def chat(self, messages: Messages, cot: CoT = None, **arguments: Any) -> SoftReply:
        """See `SoftClient.chat`."""
        model = arguments.get("model") or await self.model_name()
        ask = {"messages": as_messages(messages), "model": model}
        with translated(self.url):
            raw = await self.openai.chat.completions.create(**create_arguments(ask, cot, arguments))
        return read_chat(raw, {"messages": messages, "cot": cot, **arguments}, self.url)

    async def stream(
        self, messages: Messages, cot: CoT = None, **arguments: Any
    ) -> AsyncChatStream:
        """See `SoftClient.stream`."""
        model = arguments.get("model") or await self.model_name()
        ask = {"messages": as_messages(messages), "model": model}
        with translated(self.url):
            chunks = await self.openai.chat.completions.create(
                **create_arguments(ask, cot, arguments, stream=True)
            )
        reader = StreamReader({"messages": messages, "cot": cot, **arguments}, self.url)
        return AsyncChatStream(chunks, reader, self.url)

    async def complete(self, prompt: Any, cot: CoT = None, **arguments: Any) -> SoftReply:
        """See `SoftClient.complete`."""
        model = arguments.get("model") or await self.model_name()
        ask = {"prompt": prompt, "model": model}
        with translated(self.url):
            raw = await self.openai.completions.create(**create_arguments(ask, cot, arguments))
        return read_completion(raw, {"prompt": prompt, "cot": cot, **arguments}, self.url)

    async def repeat(self, reply: SoftReply, index: int = 0) -> SoftReply:
        """See `SoftClient.repeat`."""
        method = self.chat if reply.kind == "chat" else self.complete
        return await method(**reply.again(index))

    async def rollouts(
        self,
        prompts: Iterable[Prompt],
        *,
        n: int = 1,
        cot: CoT = None,
        sampling: Mapping[str, Any] | None = None,
        seed: int | None = None,
        seeds: Sequence[Sequence[int]] | None = None,
        model: str | None = None,
        errors: Literal["raise", "yield"] = "raise",
    ) -> AsyncRolloutStream:
        """See `SoftClient.rollouts`."""
        from clients.rollouts import open_rollouts_async  # torch: see SoftClient.rollouts

        body = rollout_body(
            prompts, n=n, cot=cot, sampling=sampling, seed=seed, seeds=seeds, model=model
        )
        if self._model is not None:
            body.setdefault("model", self._model)
        return await open_rollouts_async(self._http, body, errors, self.url)

    async def _get(self, path: str) -> Any:
        with translated(self.url):
            response = await self._http.get(path)
        return read_json(response, self.url)
