"""`GET /playground`: a page that asks once and shows the answers of several modes side by side.

The page is plain HTML, CSS and ES modules from `clients/playground`, read once at start-up. It
only uses relative URLs, so it works under any root path and behind a proxy that adds a prefix.
Token texts are untrusted (a model can write `<script>`), which is why the policy below allows
no inline script, no other origin and no HTML sink at all.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, Response

FOLDER = Path(__file__).resolve().parent.parent / "clients" / "playground"
"""The two packages lie side by side, installed or not. Importing `clients` would load its code."""

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Only these are served. Not `mimetypes`: its answers depend on the machine's registry."""

CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)

HEADERS = {
    "Cache-Control": "no-cache",  # keep a copy, but ask: after an upgrade no file is stale
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of the page, in memory."""

    body: bytes
    content_type: str
    etag: str


def load_assets() -> dict[str, Asset]:
    """The page's files by name; raises `RuntimeError` if the installation lacks them."""
    assets: dict[str, Asset] = {}
    for path in FOLDER.iterdir() if FOLDER.is_dir() else ():
        content_type = CONTENT_TYPES.get(path.suffix)
        if content_type and path.is_file():
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            assets[path.name] = Asset(body, content_type, etag)
    if "index.html" not in assets:
        raise RuntimeError(
            "the playground's files (clients/playground) are missing from this installation of "
            "softvllm; install it again"
        )
    return assets


def attach(app: FastAPI) -> None:
    """Add `GET /playground` and `GET /playground/<file>` to the server's app."""
    assets = load_assets()

    async def page(request: Request) -> Response:
        return _respond(request, assets["index.html"])

    async def with_slash() -> Response:
        # Relative: the prefix of a proxy in front is unknown here, and the page's own relative
        # URLs would point one level too deep under the slash.
        return Response(status_code=307, headers={"Location": "../playground"})

    async def asset(request: Request, name: str) -> Response:
        found = assets.get(name)
        if found is None:
            raise HTTPException(404, f"the playground has no file {name!r}")
        return _respond(request, found)

    for path, endpoint in (
        ("/playground", page),
        ("/playground/", with_slash),
        ("/playground/{name}", asset),
    ):
        app.add_api_route(path, endpoint, methods=["GET", "HEAD"], include_in_schema=False)


def _respond(request: Request, asset: Asset) -> Response:
    headers = {**HEADERS, "ETag": asset.etag}
    if _matches(request.headers.get("if-none-match", ""), asset.etag):
        return Response(status_code=304, headers=headers)
    return Response(asset.body, headers={**headers, "Content-Type": asset.content_type})


def _matches(if_none_match: str, etag: str) -> bool:
    """Whether the browser's copy is current; weak tags count (a proxy that compresses weakens)."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or "*" in tags
