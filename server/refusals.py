"""Routes that cannot carry a think phase refuse its fields, instead of ignoring them."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FIELDS = ("cot_mode", "cot")
OURS = ("/v1/chat/completions", "/v1/completions", "/v1/rollouts")
_SPELT = tuple(f'"{name}"'.encode() for name in FIELDS)
GENERATING = ("/v1/", "/v2/", "/inference/", "/invocations", "/generative_scoring")


class RefuseElsewhere:
    """ASGI middleware over POST requests with JSON bodies to routes other than ours."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        path = route_path(scope)
        if path in OURS or not path.startswith(GENERATING):
            return await self.app(scope, receive, send)
        chunks = []  # joined once: appending to bytes copies all of them for every chunk
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None  # the client left before its request was whole
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        body = b"".join(chunks)
        found = _fields(body)
        if found:
            await _refusal(found, path)(scope, receive, send)
            return None
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, replay, send)


def route_path(scope: Scope) -> str:
    """The path by which Starlette chooses the route.

    The root path goes off only in front of a slash: with `--root-path /` the route of `/pause` is
    `/pause`, and a gate that looked for `pause` would let it pass.
    """
    path, root = str(scope["path"]), str(scope.get("root_path", "") or "")
    rest = path.removeprefix(root)
    return rest if rest == "" or rest.startswith("/") else path


def _fields(body: bytes) -> list[str]:
    # Escapes and UTF-16, which JSON allows, can spell the names in other bytes.
    if not any(spelt in body for spelt in (*_SPELT, b"\\u", b"\0")):
        return []
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError):
        return []  # the route itself says what is wrong with it
    return [name for name in FIELDS if isinstance(data, dict) and data.get(name) is not None]


def _refusal(found: list[str], path: str) -> JSONResponse:
    message = (
        f"{' and '.join(found)}: {path} cannot carry a think phase; use {', '.join(OURS)}, or drop "
        "the fields"
    )
    error = {"message": message, "type": "BadRequestError", "param": found[0], "code": 400}
    return JSONResponse({"error": error}, status_code=400)
