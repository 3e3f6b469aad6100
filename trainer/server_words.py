"""What a server's answers mean for a client: go on, try again, or give up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec


class ServerRefused(RuntimeError):
    """The server understood and said no (status 4xx): trying again would not help."""


class ServerGone(RuntimeError):
    """The server did not do its work within the run's patience."""


class Later(Exception):
    """This attempt failed; another may succeed."""


def judge(url: str, status: int, content: bytes, path: str) -> None:
    """Raise what a status means.

    Raises:
        ServerRefused: trying again would not help.
        Later: it may.
    """
    if status < 400:
        return
    words = _message(content)
    if status in (401, 403):
        raise ServerRefused(
            f"{url}{path} answers {status} ({words}): set $SOFTVLLM_API_KEY to the "
            "server's key and start the server with --enable-rl"
        )
    if status == 404:
        raise ServerRefused(
            f"{url}{path} does not exist ({words}): start the server with "
            "`softvllm serve MODEL --enable-rl`"
        )
    if status >= 500 or status in (408, 425, 429):
        raise Later(f"{url}{path} answers {status} ({words})")
    raise ServerRefused(f"{url}{path} refuses ({status}): {words}")


def name_of(error: Exception) -> str:
    """Class and words."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _message(content: bytes) -> str:
    """The server's words, in whichever shape of JSON they come."""
    try:
        data = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return content[:300].decode(errors="replace")
    if isinstance(data, dict):
        error = data.get("error", data.get("detail", data))
        data = error.get("message", error) if isinstance(error, dict) else error
    return str(data)[:1000]


def check_server(info: dict[str, Any], *, mode: str, dim: int, vocab_size: int) -> Sequence[str]:
    """What does not fit between server and trainer, each with its remedy; empty: all is well."""
    problems = []
    if info.get("refusal"):
        problems.append(f"the server cannot think softly: {info['refusal']}")
    elif mode not in info.get("modes", ()):
        problems.append(f"the server has no mode {mode!r} but {info.get('modes')}")
    embedding = info.get("embedding") or {}
    for name, ours, what in (("dim", dim, "hidden size"), ("vocab_size", vocab_size, "vocabulary")):
        theirs = embedding.get(name)
        if theirs is not None and theirs != ours:
            problems.append(
                f"the server's {what} is {theirs}, the trainer's {ours}: start both with the same "
                "model"
            )
    return problems
