"""Where a server is and the key it wants: checked before the first call, and fit to be shown."""

from __future__ import annotations

import re

import httpx2

from trainer.server_words import ServerRefused

_URL = "rollout_url (--rollout-url)"


def root_of(url: str) -> str:
    """A server's root, which may hold a user's name and password.

    Raises:
        ValueError: nothing can be asked there; the message shows no password.
    """
    root = url.strip().rstrip("/").removesuffix("/v1")
    if not url.strip().startswith(("http://", "https://")):
        raise ValueError(f"{_URL} must begin with http:// or https://, got {shown(url)!r}")
    try:
        parsed = httpx2.URL(root)
    except httpx2.InvalidURL as error:
        # Half a password is taken for a port, so its words are not for every eye.
        why = "" if "@" in root else f" ({error})"
        raise ValueError(f"{_URL} is no address of a server{why}: {shown(url)!r}") from None
    if not parsed.host or not 0 < (parsed.port or 80) < 2**16 or re.search(r"\s", root):
        raise ValueError(
            f"{_URL} must name a host and at most a port and a path, got {shown(url)!r}"
        )
    return root


def shown(url: str) -> str:
    """The URL without user and password, also where it is no URL."""
    return re.sub(r"^(\w+://)?.*@", r"\1", url, count=1, flags=re.DOTALL)


def authorization(key: str | None) -> dict[str, str]:
    """The header that carries a key. White space around it goes: files of secrets end in a newline.

    Raises:
        ValueError: no header can hold the key, which the message does not repeat.
    """
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            "the server's key (--api-key, --rollout.api-key or $SOFTVLLM_API_KEY) must be "
            "printable ASCII: it holds a line break, a control character or a letter beyond that"
        )
    return {"Authorization": f"Bearer {key}"} if key else {}


def unsendable(url: str, path: str) -> ServerRefused:
    """What a request that is no HTTP comes to: it would be none the next time, either. The
    library's words are left out, since they may quote the header with the key."""
    return ServerRefused(
        f"{url}{path} cannot be asked: a header of the request is not valid HTTP; look at the "
        "server's key and at the URL"
    )
