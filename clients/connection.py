"""Where the server is and how long to wait for it: what both clients are made from."""

from __future__ import annotations

import os
from typing import Any

import httpx2

from clients.errors import BadAnswer, NotASoftServer, ServerFailed, from_response

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 5.0
"""A server that is up accepts at once, however busy it is."""
LIMITS = httpx2.Limits(max_connections=1000, max_keepalive_connections=100)
"""The server batches what it is given; httpx2's own limit of 100 would starve it."""


def clean_url(base_url: str) -> str:
    """The server's root: with a scheme, without the `/v1` that OpenAI clients are given."""
    url = base_url.strip()
    if "://" not in url:
        url = f"http://{url}"
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"base_url {base_url!r} is not a URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"base_url must look like {DEFAULT_URL}, got {base_url!r}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def transport_arguments(url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Keyword arguments of httpx2's clients."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return {
        "base_url": url,
        "headers": headers,
        "timeout": httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
        "limits": LIMITS,
    }


def openai_arguments(url: str, api_key: str | None, max_retries: int) -> dict[str, Any]:
    """Keyword arguments of openai's clients; the key is never taken from the environment, where
    it is somebody else's."""
    return {
        "base_url": f"{url}/v1",
        "api_key": api_key or "EMPTY",
        "max_retries": max_retries,
    }


def read_json(response: httpx2.Response, url: str) -> Any:
    """The JSON of a route of ours."""
    if response.status_code != 200:
        raise from_response(response, url)
    try:
        return response.json()
    except ValueError:
        raise NotASoftServer(url, "does not answer in JSON") from None


def first_model(listing: Any, url: str) -> str:
    """The base model in the answer of `/v1/models` (adapters follow it)."""
    try:
        names = [entry["id"] for entry in listing["data"]]
    except (KeyError, TypeError):
        raise BadAnswer(f"{url}/v1/models does not list models") from None
    if not names:
        raise ServerFailed(200, f"{url}/v1/models lists no model; give model=")
    return str(names[0])


def url_from_environment() -> str:
    """For programs that end users start: `SOFTVLLM_URL`, else a server on this machine."""
    return os.environ.get("SOFTVLLM_URL") or DEFAULT_URL
