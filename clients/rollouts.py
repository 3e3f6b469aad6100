"""`POST /v1/rollouts` from the client's side: frames in, samples with traces out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any, Literal

import httpx2
import msgspec

from clients.errors import (
    BadAnswer,
    NotASoftServer,
    SampleFailed,
    StreamCut,
    from_response,
    translated,
)
from softvllm.core.rollout import MEDIA_TYPE, End, Failure, FrameReader, Sample, Start

Errors = Literal["raise", "yield"]
ROUTE = "/v1/rollouts"


class FrameSorter:
    """Frames to samples, without I/O: what the sync and the async stream share."""

    def __init__(self, errors: Errors, url: str) -> None:
        if errors not in ("raise", "yield"):
            raise ValueError(f'errors must be "raise" or "yield", got {errors!r}')
        self.start: Start | None = None
        self.end: End | None = None
        self._errors = errors
        self._url = url
        self._reader = FrameReader()
        self._seen: set[tuple[int, int]] = set()

    def feed(self, data: bytes) -> Iterator[Sample | Failure]:
        """Samples that `data` completes. Raises `SampleFailed`, `BadAnswer`."""
        try:
            for frame in self._reader.feed(data):
                if isinstance(frame, Start):
                    self.start = frame
                elif isinstance(frame, End):
                    self.end = frame
                else:
                    self._seen.add((frame.prompt, frame.sample))
                    if isinstance(frame, Failure) and self._errors == "raise":
                        raise SampleFailed(frame)
                    yield frame
        except ValueError as error:
            raise BadAnswer(f"{self._url}: {error}") from error

    def close(self) -> None:
        """Call where the bytes end. Raises `StreamCut` if frames are missing."""
        try:
            self._reader.close()
        except ValueError as error:
            raise StreamCut(f"{self._url}: {error}") from None
        if self.start is None or self.end is None:
            raise BadAnswer(f"{self._url} sent a rollout stream without its start")
        wanted = self.start.num_prompts * self.start.num_samples
        if len(self._seen) != wanted:
            raise StreamCut(f"{self._url} sent {len(self._seen)} of {wanted} samples")


def _request(http: Any, body: dict[str, Any]) -> httpx2.Request:
    headers = {"Content-Type": "application/json", "Accept": MEDIA_TYPE}
    request: httpx2.Request = http.build_request(
        "POST", ROUTE, content=msgspec.json.encode(body, enc_hook=_plain), headers=headers
    )
    return request


def _plain(value: Any) -> Any:
    """numpy numbers have no JSON of their own."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} cannot be sent as JSON")


def _check_type(response: httpx2.Response, url: str) -> None:
    kind = response.headers.get("content-type", "")
    if not kind.startswith(MEDIA_TYPE):
        raise NotASoftServer(url, f"answers {ROUTE} with {kind or 'no content type'}")


class RolloutStream:
    """Samples in the order in which they finish. Closing it early stops the server."""

    def __init__(self, response: httpx2.Response, sorter: FrameSorter, url: str) -> None:
        self._response = response
        self._sorter = sorter
        self._url = url
        self._samples = self._read()

    @property
    def start(self) -> Start | None:
        """Model, sizes, weight version; known from the first sample on."""
        return self._sorter.start

    @property
    def end(self) -> End | None:
        """The counts; known at the end."""
        return self._sorter.end

    def _read(self) -> Generator[Sample | Failure, None, None]:
        try:
            with translated(self._url, streaming=True):
                for data in self._response.iter_bytes():
                    yield from self._sorter.feed(data)
            self._sorter.close()
        finally:
            self._response.close()

    def __iter__(self) -> RolloutStream:
        return self

    def __next__(self) -> Sample | Failure:
        return next(self._samples)

    def __enter__(self) -> RolloutStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; the server aborts what is unfinished."""
        self._samples.close()
        self._response.close()  # a generator that never ran does not clean up


def open_rollouts(
    http: httpx2.Client, body: dict[str, Any], errors: Errors, url: str
) -> RolloutStream:
    """Send the request; raises on a refusal, before anything is read."""
    sorter = FrameSorter(errors, url)
    with translated(url):
        response = http.send(_request(http, body), stream=True)
    try:
        if response.status_code != 200:
            with translated(url):
                response.read()
            raise from_response(response, url)
        _check_type(response, url)
    except BaseException:
        response.close()
        raise
    return RolloutStream(response, sorter, url)


class AsyncRolloutStream:
    """`RolloutStream` for `async for` and `async with`."""

    def __init__(self, response: httpx2.Response, sorter: FrameSorter, url: str) -> None:
        self._response = response
        self._sorter = sorter
        self._url = url
        self._samples = self._read()

    @property
    def start(self) -> Start | None:
        """Model, sizes, weight version; known from the first sample on."""
        return self._sorter.start

    @property
    def end(self) -> End | None:
        """The counts; known at the end."""
        return self._sorter.end

    async def _read(self) -> AsyncGenerator[Sample | Failure, None]:
        try:
            with translated(self._url, streaming=True):
                async for data in self._response.aiter_bytes():
                    for sample in self._sorter.feed(data):
                        yield sample
            self._sorter.close()
        finally:
            await self._response.aclose()

    def __aiter__(self) -> AsyncRolloutStream:
        return self

    async def __anext__(self) -> Sample | Failure:
        return await anext(self._samples)

    async def __aenter__(self) -> AsyncRolloutStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hang up; the server aborts what is unfinished."""
        await self._samples.aclose()
        await self._response.aclose()


async def open_rollouts_async(
    http: httpx2.AsyncClient, body: dict[str, Any], errors: Errors, url: str
) -> AsyncRolloutStream:
    """`open_rollouts` for the async client."""
    sorter = FrameSorter(errors, url)
    with translated(url):
        response = await http.send(_request(http, body), stream=True)
    try:
        if response.status_code != 200:
            with translated(url):
                await response.aread()
            raise from_response(response, url)
        _check_type(response, url)
    except BaseException:
        await response.aclose()
        raise
    return AsyncRolloutStream(response, sorter, url)
