"""`SoftClient`: chats, completions and rollouts with a think phase, over openai and httpx2.

from clients import SoftClient

with SoftClient("http://127.0.0.1:8000") as client:
    reply = client.chat("What is 7 plus 5?", cot="soft", max_tokens=256)
    print(reply.content, reply.cot.think_tokens)
    same = client.repeat(reply)
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
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
    from clients.rollouts import RolloutStream


class ChatStream:
    """The events of a streamed chat; the last one is `Done`. Closing it early stops the server."""

    def __init__(self, chunks: Any, reader: StreamReader, url: str) -> None:
        self._chunks = chunks
        self._url = url
        self._events = self._read(reader)
        self.reply: SoftReply | None = None
        """The whole answer, once the stream has ended."""

    def _read(self, reader: StreamReader) -> Generator[Event, None, None]:
        try:
            with translated(self._url, streaming=True):
                for chunk in self._chunks:
                    yield from reader.feed(chunk)
            done = reader.finish()
            self.reply = done.reply
            yield done
        finally:
            self._chunks.close()

    def __iter__(self) -> ChatStream:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; the server aborts what is unfinished."""
        self._events.close()
        self._chunks.close()  # a generator that never ran does not clean up


class SoftClient:
    """A connection to one server. Threads may share it; `close` it or use it in `with`."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        model: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 0,
    ) -> None:
        """
        Args:
            base_url: the server's address, with or without `/v1`.
            api_key: what the server was given as `--api-key`, if anything.
            model: name for all requests; None: the server's own, asked for once.
            timeout: seconds without a byte from the server before giving up. A request in one
                piece is silent until its answer is complete.
            max_retries: repetitions after a failed connection or a status 5xx; each may cost
                the server a whole generation.
        """
        self.url = clean_url(base_url)
        self._model = model
        self._http = httpx2.Client(**transport_arguments(self.url, api_key, timeout))
        self.openai = openai.OpenAI(
            http_client=self._http,
            timeout=self._http.timeout,
            **openai_arguments(self.url, api_key, max_retries),
        )
        """The plain client underneath, on the same connections."""

    def __enter__(self) -> SoftClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def model_name(self) -> str:
        """The model's name, as given or as the server tells."""
        if self._model is None:
            self._model = first_model(self._get("/v1/models"), self.url)
        return self._model

    def info(self) -> ServerInfo:
        """What `GET /v1/cot/info` tells: versions, modes, defaults, recipe, limits, sigma.

        Raises `NotASoftServer` if the server has no such route.
        """
        return read_info(self._get("/v1/cot/info"))

    def chat(self, messages: Messages, cot: CoT = None, **arguments: Any) -> SoftReply:
        """Ask and wait for the whole answer.

        Args:
            messages: a text (one user message) or OpenAI's list of messages.
            cot: how to think (`cot_fields`); None: the server's default.
            **arguments: of openai's `chat.completions.create`.

        Raises:
            CoTRequestRefused, RequestRefused: what must change in the request, by field.
            NotASoftServer: the server ignored `cot`.
            SoftClientError: see `clients.errors`.
        """
        ask = {
            "messages": as_messages(messages),
            "model": arguments.get("model") or self.model_name(),
        }
        with translated(self.url):
            raw = self.openai.chat.completions.create(**create_arguments(ask, cot, arguments))
        return read_chat(raw, {"messages": messages, "cot": cot, **arguments}, self.url)

    def stream(self, messages: Messages, cot: CoT = None, **arguments: Any) -> ChatStream:
        """`chat`, event by event; think steps only with `record` "top" in `cot`."""
        ask = {
            "messages": as_messages(messages),
            "model": arguments.get("model") or self.model_name(),
        }
        with translated(self.url):
            chunks = self.openai.chat.completions.create(
                **create_arguments(ask, cot, arguments, stream=True)
            )
        reader = StreamReader({"messages": messages, "cot": cot, **arguments}, self.url)
        return ChatStream(chunks, reader, self.url)

    def complete(self, prompt: Any, cot: CoT = None, **arguments: Any) -> SoftReply:
        """Continue a text, token ids, or a list of either, without a chat template."""
        model = arguments.get("model") or self.model_name()
        ask = {"prompt": prompt, "model": model}
        with translated(self.url):
            raw = self.openai.completions.create(**create_arguments(ask, cot, arguments))
        return read_completion(raw, {"prompt": prompt, "cot": cot, **arguments}, self.url)

    def repeat(self, reply: SoftReply, index: int = 0) -> SoftReply:
        """Make one choice of `reply` once more (how exactly: `SoftReply.again`)."""
        method = self.chat if reply.kind == "chat" else self.complete
        return method(**reply.again(index))

    def rollouts(
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
    ) -> RolloutStream:
        """Many prompts x n samples, each as it finishes, with ids and trace.

        Args:
            prompts: texts, lists of token ids, or lists of chat messages, also mixed.
            n: samples per prompt.
            cot: how to think (`cot_fields`).
            sampling: of the answer, e.g. {"temperature": 1.0, "max_tokens": 256}.
            seed: of the whole request; None: the server draws one.
            seeds: one per prompt and sample, instead of `seed`.
            model: None: the client's.
            errors: "raise" hangs up at the first failed sample (`SampleFailed`); "yield" gives
                its `Failure` in place of a `Sample` and goes on.

        Returns:
            An iterator of `softvllm.core.rollout.Sample`; it raises `StreamCut` at the end of a
            stream that broke off.
        """
        from clients.rollouts import open_rollouts  # torch: a second that only traces are worth

        body = rollout_body(
            prompts, n=n, cot=cot, sampling=sampling, seed=seed, seeds=seeds, model=model
        )
        if self._model is not None:
            body.setdefault("model", self._model)
        return open_rollouts(self._http, body, errors, self.url)

    def _get(self, path: str) -> Any:
        with translated(self.url):
            response = self._http.get(path)
        return read_json(response, self.url)
