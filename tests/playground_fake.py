"""A loopback server that streams documented chunks for the playground's tests.

It holds no model: what it streams is decided by the test through `Fake.script`, and for a given
seed always the same, as the real server's answers are.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server import playground

MODEL = "/models/tiny-instruct"
INFO: dict[str, Any] = {
    "softvllm": "0.1.0",
    "vllm": "0.32.0",
    "model": MODEL,
    "modes": ["hard", "soft", "fuzzy", "mixed"],
    "default_mode": None,
    "recipe": {"end_strings": ["The final answer is:"], "force_after_end": " \\boxed{"},
    "defaults": {
        "hard": {"temperature": 1.0},
        "soft": {"temperature": 0.5, "noise_scale": 0.33, "top_k": 0},
        "fuzzy": {"temperature": 0.0001, "noise_scale": 0.33},
        "mixed": {"temperature": 0.5, "noise_scale": 0.33},
    },
    "limits": {"max_think_tokens": 4096},
    "policies": {
        "blend": {"weight": {"low": 0, "high": 1, "default": 0.5}},
        "interleave": {"p": {"low": 0, "high": 1, "default": 0.5}},
        "entropy": {"low": {"low": 0, "high": 1000}, "high": {"low": 0, "high": 1000}},
    },
    "enable_rl": False,
}
WORDS = [
    " the",
    " is",
    " 36",
    " pencils",
    " minus",
    " 7",
    ",",
    " so",
    " she",
    " has",
    " left",
    "\n",
]
NASTY = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>",
    "\"'`&lt;",
    "\n\n",
    "\ufffd",  # one byte of an emoji that two tokens spell
    "\u202eright to left",
    "",
    " ",
    "🙂",
    "averyveryverylongtokenwithoutanyspace" * 3,
]

Script = Callable[["Fake", dict[str, Any]], AsyncIterator[dict[str, Any]]]


@dataclass
class Fake:
    """The server's state as the tests set and read it."""

    script: Script = lambda fake, body: chain(fake, body)
    steps: int = 24
    words: list[str] = field(default_factory=lambda: list(WORDS))
    refusal: tuple[int, Any] | None = None
    refused_modes: tuple[str, ...] = ("hard", "soft", "fuzzy", "mixed")
    info: Any = field(default_factory=lambda: dict(INFO))
    key: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    aborted: int = 0
    url: str = ""


def think_step(rng: Random, words: list[str], mode: str, t: int) -> dict[str, Any]:
    weights = sorted((rng.expovariate(1.0) ** 3 for _ in range(8)), reverse=True)
    total = sum(weights) * 1.02
    ids = [(t * 8 + i) % 997 for i in range(8)]
    top = [
        [words[(t + i) % len(words)], ids[i], round(w / total, 6)] for i, w in enumerate(weights)
    ]
    soft = mode in ("soft", "fuzzy") or (mode == "mixed" and rng.random() < 0.6)
    pick = 0 if soft else min(int(rng.expovariate(1.2)), 7)
    entropy = round(abs(rng.gauss(1.2, 0.9)), 6)
    return {"token": top[pick][0], "id": ids[pick], "soft": soft, "entropy": entropy, "top": top}


async def chain(fake: Fake, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Steps one by one, then the forced text, the answer and the whole block."""
    seed = body["cot"].get("seed")
    seed = len(fake.requests) * 1000 + 1 if seed is None else seed
    mode = body["cot_mode"]
    rng = Random(f"{seed} {mode}")
    count = min(fake.steps, body["cot"].get("max_think_tokens", fake.steps))
    steps = [think_step(rng, fake.words, mode, t) for t in range(count)]
    for step in steps:
        yield choice({"reasoning": step["token"]}, cot={"steps": [step]})
    for piece in (" \\boxed{", str(rng.randrange(100)), "}."):
        yield choice({"content": piece})
    soft = sum(step["soft"] for step in steps)
    mean = sum(step["entropy"] for step in steps) / max(count, 1)
    block = {
        "mode": mode, "policy": body["cot"].get("policy", mode), "think_tokens": count,
        "soft_steps": soft, "hard_steps": count - soft, "forced_tokens": 2, "answer_tokens": 3,
        "end_cause": "end_sequence", "mean_entropy": mean, "tau": 0.5,
        "sigma": 0.0 if mode == "hard" else 0.0413, "seed": seed, "weight_version": "default",
        "steps": steps,
    }  # fmt: skip
    yield choice({}, cot=block, finish_reason="stop")
    yield {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": count + 5}}


async def endless(fake: Fake, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    rng = Random(0)
    for t in range(10**6):
        step = think_step(rng, fake.words, body["cot_mode"], t)
        yield choice({"reasoning": step["token"]}, cot={"steps": [step]})
        await asyncio.sleep(0.01)


def choice(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None, **more}]}


def error(status: int, message: str, param: str | None) -> tuple[int, Any]:
    kind = {400: "BadRequestError", 500: "InternalServerError"}.get(status, "Error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": status}}


def whole_answer(body: dict[str, Any]) -> dict[str, Any]:
    """What a client that does not stream gets."""
    message = {"role": "assistant", "content": "29", "reasoning": "thought"}
    cot = {"mode": body["cot_mode"], "seed": body["cot"].get("seed", 1)}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "cot": cot}],
    }  # fmt: skip


def make_app(fake: Fake) -> FastAPI:
    app = FastAPI()
    playground.attach(app)

    def refused(request: Request) -> JSONResponse | None:
        given = request.headers.get("authorization")
        fake.keys.append(given)
        if fake.key and given != f"Bearer {fake.key}":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        return None

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return refused(request) or JSONResponse({"data": [{"id": MODEL}, {"id": "other"}]})

    @app.get("/v1/cot/info")
    async def info(request: Request) -> Response:
        if fake.info is None:
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        return refused(request) or JSONResponse(fake.info)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        no = refused(request)
        if no:
            return no
        body = await request.json()
        fake.requests.append(body)
        if fake.refusal and body["cot_mode"] in fake.refused_modes:
            return JSONResponse(fake.refusal[1], status_code=fake.refusal[0])
        if not body.get("stream"):
            return JSONResponse(whole_answer(body))
        return StreamingResponse(sse(fake, body), media_type="text/event-stream")

    return app


async def sse(fake: Fake, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """The script's chunks as events, cut at odd places: a client must not rely on packets."""
    try:
        async for chunk in fake.script(fake, body):
            if chunk.get("hang_up"):
                return
            line = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
            middle = len(line) // 2
            yield line[:middle]
            yield line[middle:]
        yield b"data: [DONE]\n\n"
    except (asyncio.CancelledError, GeneratorExit):
        fake.aborted += 1
        raise


class Running:
    """uvicorn in a thread, on a free loopback port."""

    def __init__(self, app: FastAPI, **options: Any) -> None:
        config = uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1, **options
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            if not self.thread.is_alive():
                raise RuntimeError("the fake server did not start")
            self.thread.join(0.02)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *args: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)
