"""The requests of the soak test and the client that sends them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import httpx

from softvllm.core.rollout import Failure, FrameReader, Sample

CHAT, COMPLETIONS, ROLLOUTS = "/v1/chat/completions", "/v1/completions", "/v1/rollouts"
MODES = ("plain", "hard", "soft", "fuzzy", "mixed")
"""plain: no think phase, vLLM's own handler."""
WORDS = ("apple", "river", "seven", "stone", "cloud", "prime", "angle", "paper", "light", "noise")


@dataclass(frozen=True)
class Request:
    """One request that always has the same answer."""

    mode: str
    path: str
    body: dict[str, Any]


def make_requests(count: int, tokens: int, rng: random.Random, model: str) -> list[Request]:
    """`count` requests, modes and routes in turn, each with its own prompt and seed."""
    made = []
    for i in range(count):
        mode, route = MODES[i % len(MODES)], (CHAT, COMPLETIONS, ROLLOUTS)[i // len(MODES) % 3]
        if mode == "plain" and route == ROLLOUTS:
            route = CHAT
        text = f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(2, 12)))
        think = rng.randint(tokens // 4, tokens)
        limit = think + 40
        cot = {"max_think_tokens": think, "record": rng.choice(["steps", "top"])}
        body: dict[str, Any]
        if route == ROLLOUTS:
            body = {"prompts": [{"prompt": text}], "n": 2, "seed": i, "cot_mode": mode}
            body["sampling"] = {"max_tokens": limit, "temperature": 1.0}
            body["cot"] = {"max_think_tokens": think}
        else:
            body = {"model": model, "max_tokens": limit, "temperature": 1.0, "seed": i}
            body |= {"messages": [{"role": "user", "content": text}]}
            if route == COMPLETIONS:
                body = {**body, "prompt": text}
                del body["messages"]
            if mode != "plain":
                body |= {"cot_mode": mode, "cot": cot}
            else:
                body["temperature"] = 0.0
        made.append(Request(mode, route, body))
    return made


class Client:
    """Sends requests and reads answers as plain texts, comparable between all ways of asking."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits)

    async def info(self) -> dict[str, Any]:
        answer = await self.http.get("/v1/cot/info")
        answer.raise_for_status()
        return dict(answer.json())

    async def ask(self, request: Request, stream: bool, bytes_until: int | None = None) -> str:
        """The answer's text. `bytes_until`: leave after that many bytes (raises `LeftError`)."""
        if request.path == ROLLOUTS:
            return await self._rollout(request, bytes_until)
        if not stream:
            answer = await self.http.post(request.path, json=request.body)
            answer.raise_for_status()
            return _text(answer.json()["choices"][0])
        sides: dict[str, list[str]] = {"reasoning": [], "content": [], "text": []}
        body, received, ended = {**request.body, "stream": True}, 0, False
        async with self.http.stream("POST", request.path, json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                received += len(line)
                if bytes_until is not None and received >= bytes_until:
                    raise LeftError
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise RuntimeError(chunk["error"]["message"])
                    for choice in chunk["choices"]:
                        piece = choice.get("delta", choice)
                        for name, parts in sides.items():
                            parts.append(piece.get(name) or "")
        if not ended:
            raise RuntimeError("a stream without its end")
        return "\0".join("".join(parts) for parts in sides.values())

    async def _rollout(self, request: Request, bytes_until: int | None) -> str:
        reader, received, texts = FrameReader(), 0, {}
        async with self.http.stream("POST", request.path, json=request.body) as answer:
            answer.raise_for_status()
            async for chunk in answer.aiter_raw():
                received += len(chunk)
                if bytes_until is not None and received >= bytes_until:
                    raise LeftError
                for frame in reader.feed(chunk):
                    if isinstance(frame, Sample):
                        texts[frame.sample] = f"{len(frame.trace)} {frame.text}"
                    elif isinstance(frame, Failure):
                        raise RuntimeError(frame.message)
        reader.close()
        return "\0".join(texts[k] for k in sorted(texts))


class LeftError(Exception):
    """This client left on purpose."""


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("message", {})
    return "\0".join(
        [
            message.get("reasoning") or "",
            message.get("content") or "",
            choice.get("text") or "",
        ]
    )
