"""What can go wrong between a client and the server, one exception each; all name the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx2
import openai

if TYPE_CHECKING:
    from softvllm.core.rollout import Failure

START_HINT = "start one with `softvllm serve`, or give its address as base_url"


class SoftClientError(Exception):
    """Base of all errors of this package."""


class ServerUnreachable(SoftClientError):
    """Nothing answers at the address."""

    def __init__(self, url: str, reason: object = None) -> None:
        detail = f" ({reason})" if str(reason or "") else ""
        super().__init__(f"no server answers at {url}{detail}; {START_HINT}")
        self.url = url


class ServerTimeout(SoftClientError):
    """The server is there but sent nothing for the client's `timeout`."""


class AccessDenied(SoftClientError):
    """Status 401 or 403: the API key is missing or wrong."""


class NotASoftServer(SoftClientError):
    """The server speaks OpenAI's protocol but has no think phase per request."""

    def __init__(self, url: str, what: str) -> None:
        super().__init__(
            f"{url} {what}: this looks like a stock vLLM server (or a proxy in front that hides "
            f"our routes); {START_HINT}"
        )
        self.url = url


class RequestRefused(SoftClientError):
    """Any other status 4xx: the request must change."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field
        """The field the server names, e.g. `max_tokens`; None if it names none."""


class CoTRequestRefused(RequestRefused):
    """The server refused `cot_mode` or a field of `cot`, e.g. `field` `cot.top_k`."""


class ServerFailed(SoftClientError):
    """The server's own failure (status 5xx, or an error within a stream)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StreamCut(SoftClientError):
    """The connection ended before the answer did; what arrived before is whole."""


class BadAnswer(SoftClientError):
    """The server's answer is not what the protocol says: client and server do not match."""


class SampleFailed(SoftClientError):
    """A rollout sample has no trustworthy result (`errors="raise"`)."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(
            f"sample {failure.sample} of prompt {failure.prompt} failed ({failure.code}): "
            f'{failure.message}; errors="yield" goes on with the others'
        )
        self.failure = failure


_COT_FIELD = re.compile(r"^(cot(?:_mode)?(?:\.\w+)?): ")


def from_status(status: int, body: object, url: str) -> SoftClientError:
    """The exception of an error response.

    Args:
        status: HTTP status.
        body: decoded JSON or text; vLLM's `{"error": {...}}`, the inner object, or anything else.
        url: the server's base URL, for the message.
    """
    inner = body.get("error", body) if isinstance(body, dict) else body
    facts: dict[str, Any] = inner if isinstance(inner, dict) else {}
    text = str(facts.get("message") or facts.get("detail") or inner or "no reason given")
    if status in (401, 403):
        return AccessDenied(f"{url} refuses the API key ({status}: {text}); give its api_key")
    # FastAPI's own words for a path it does not know; vLLM's for a model have a message.
    if status in (404, 405) and "detail" in facts:
        return NotASoftServer(url, f"does not know this route ({status})")
    if status >= 500:
        return ServerFailed(status, f"{url} failed ({status}): {text}")
    field = facts.get("param")
    if not field and (match := _COT_FIELD.match(text)):
        field = match[1]
    if isinstance(field, str) and field.split(".")[0] in ("cot", "cot_mode"):
        return CoTRequestRefused(status, text, field)
    return RequestRefused(status, text, field if isinstance(field, str) else None)


def from_response(response: httpx2.Response, url: str) -> SoftClientError:
    """The exception of an error response whose body was read."""
    try:
        body: object = json.loads(response.content)
    except ValueError:
        body = response.text[:500]
    return from_status(response.status_code, body, url)


def _from_stream(error: openai.APIError, url: str) -> SoftClientError:
    """The exception of an error event: it has a status of its own."""
    code = error.code or ""
    status = int(code) if code.isdigit() else 500
    return from_status(status, error.body or error.message, url)


@contextmanager
def translated(url: str, *, streaming: bool = False) -> Iterator[None]:
    """Turn what openai and httpx2 raise into the exceptions above.

    Args:
        url: the server's base URL.
        streaming: the response has begun, so not being connected means a cut stream.
    """
    try:
        yield
    except openai.APIStatusError as error:
        raise from_status(error.status_code, error.body, url) from error
    except (openai.APIConnectionError, httpx2.RequestError) as error:
        cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
        absent = isinstance(cause, (httpx2.ConnectError, httpx2.ConnectTimeout))
        if isinstance(cause, httpx2.TimeoutException) and not absent:
            raise ServerTimeout(
                f"{url} sent nothing for the client's timeout; raise timeout=, or ask for less"
            ) from error
        if absent and not streaming:
            raise ServerUnreachable(url, cause) from error
        raise StreamCut(f"{url} closed the connection ({cause or error})") from error
    except openai.APIResponseValidationError as error:
        raise BadAnswer(f"{url} does not answer in OpenAI's format: {error.message}") from error
    except openai.APIError as error:
        raise _from_stream(error, url) from error
