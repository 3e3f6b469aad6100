"""A server that speaks the documented wire (docs/server.md, docs/wire.md) without a model.

Texts depend on the seed alone, so that repeating a sample can be seen to work. It records every
request, refuses what `CoTParams` refuses, and can be told to misbehave.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fake_thoughts import (
    FORCED,
    INFO,
    MODEL,
    Thought,
    choice,
    event,
    head,
    read_params,
    rollout_sample,
    usage,
)
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from loopback_server import LoopbackServer

from softvllm.core.noise import derive_seed
from softvllm.core.params import CoTParams, CoTParamsError
from softvllm.core.rollout import MEDIA_TYPE, End, Failure, Frame, Start, encode_frame


@dataclass
class Behaviour:
    """What a test may change; the fake reads it at each request."""

    soft: bool = True
    """False: stock vLLM, without our routes and blind to our fields."""
    proxied: bool = False
    """True: our routes are there, but the answers lost their `cot` blocks on the way."""
    api_key: str | None = None
    default_mode: str | None = None
    hold_after: int | None = None
    """Chunks of a stream after which it waits until the client hangs up."""
    cut_after: int | None = None
    """Chunks (or rollout frames) after which the connection is dropped."""
    end_early: bool = False
    """With `cut_after`: end the response properly instead, as if it were complete."""
    nan_after: int | None = None
    """Chunks of a stream after which an error event comes."""
    fail: set[tuple[int, int]] = field(default_factory=set)
    """Rollout samples that come as `error` frames."""
    answer_words: int = 2
    control_characters: bool = False
    """Put an escape sequence into each answer."""
    drift: bool = False
    """Answer differently each time, as after new weights."""
    silent: bool = False
    """Never answer."""


class _Guard:
    """The door. Plain ASGI, for a framework's middleware may swallow what precedes a cut."""

    def __init__(self, app: Any, behaviour: Behaviour) -> None:
        self._app = app
        self._behaviour = behaviour

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        behaviour, headers = self._behaviour, dict(scope["headers"])
        if behaviour.silent:
            await asyncio.sleep(3600)
        key, given = behaviour.api_key, headers.get(b"authorization", b"").decode()
        ours = scope["path"] in ("/v1/cot/info", "/v1/rollouts")
        app = self._app
        if key is not None and given != f"Bearer {key}":
            app = JSONResponse({"error": "Unauthorized"}, 401)
        elif ours and not behaviour.soft:
            app = JSONResponse({"detail": "Not Found"}, 404)
        await app(scope, receive, send)


class FakeServer(LoopbackServer):
    """Runs on loopback in a thread, from `with` to its end."""

    def __init__(self, **behaviour: Any) -> None:
        self.behaviour = Behaviour(**behaviour)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        """(path, body) of each request, in order."""
        self.hung_up = threading.Event()
        """A client left before its stream ended."""
        self._seeds = random.Random(0)
        self._count = 0
        self.listen(_Guard(self._app(), self.behaviour))

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """The bodies sent to a route."""
        return [body for where, body in self.requests if where == path]

    # ---- routes -----------------------------------------------------------------------------

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.exception_handler(CoTParamsError)
        async def refused(_: Request, error: CoTParamsError) -> Response:
            param = f"cot.{error.field}" if error.field else "cot"
            return _error(400, "BadRequestError", str(error), param)

        app.get("/v1/models")(self._models)
        app.get("/v1/cot/info")(self._info)
        app.post("/v1/chat/completions")(self._chat)
        app.post("/v1/completions")(self._completions)
        app.post("/v1/rollouts")(self._rollouts)
        return app

    async def _models(self) -> Any:
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "vllm"}]}

    async def _info(self) -> Any:
        return INFO | {"default_mode": self.behaviour.default_mode}

    async def _chat(self, request: Request) -> Any:
        body = await self._take(request)
        thoughts = self._think(body)
        if isinstance(thoughts, Response):
            return thoughts
        if body.get("stream"):
            events = self._chat_events(body, thoughts)
            return StreamingResponse(events, media_type="text/event-stream")
        choices = []
        for index, thought in enumerate(thoughts):
            message = {"role": "assistant", "content": thought.answer, "reasoning": thought.text}
            fields = {"index": index, "message": message, "finish_reason": "stop"}
            choices.append(fields | {"stop_reason": None, **self._cot(thought.block())})
        return head("chat.completion") | {"choices": choices, "usage": usage(thoughts)}

    async def _completions(self, request: Request) -> Any:
        body = await self._take(request)
        thoughts = self._think(body, _num_prompts(body["prompt"]))
        if isinstance(thoughts, Response):
            return thoughts
        choices = []
        for index, thought in enumerate(thoughts):
            block = thought.block()
            if block is not None:
                block["answer_start"] = len(thought.text or "")
            text = (thought.text or "") + thought.answer
            fields = {"index": index, "text": text, "finish_reason": "stop", "logprobs": None}
            choices.append(fields | self._cot(block))
        return head("text_completion") | {"choices": choices, "usage": usage(thoughts)}

    async def _rollouts(self, request: Request) -> Any:
        body = await self._take(request)
        if body.get("seed") is not None and body.get("seeds") is not None:
            return _error(400, "BadRequestError", "give seed or seeds, not both", None)
        cot = read_params(body, body.get("cot_mode") or "soft")
        return StreamingResponse(self._frames(body, cot), media_type=MEDIA_TYPE)

    # ---- answers ----------------------------------------------------------------------------

    async def _take(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        self.requests.append((request.url.path, body))
        return dict(body)

    def _think(self, body: dict[str, Any], prompts: int = 1) -> list[Thought] | Response:
        """The samples of a chat or completion, or its refusal; raises `CoTParamsError`."""
        if body.get("model") != MODEL:
            text = f"The model `{body.get('model')}` does not exist."
            return _error(404, "NotFoundError", text, "model")
        if body.get("max_tokens") == 0:
            return _error(400, "BadRequestError", "max_tokens must be at least 1", "max_tokens")
        n = body.get("n") or 1
        mode, given = body.get("cot_mode") or self.behaviour.default_mode, body.get("cot")
        stock = not self.behaviour.soft or (given is None and mode in (None, "hard"))
        cot = None if stock else read_params(body, mode or "soft")
        first = self._seeds.randrange(2**53) if cot is None or cot.seed is None else cot.seed
        seeds = [derive_seed(first, k) if n > 1 else first for k in range(n)] * prompts
        return [self._thought(cot, seed) for seed in seeds]

    def _thought(self, cot: CoTParams | None, seed: int) -> Thought:
        self._count += 1
        thought = Thought(cot, seed, self._count if self.behaviour.drift else 0)
        thought.words = thought.words[: self.behaviour.answer_words]
        if self.behaviour.control_characters:
            thought.words.append("\x1b[2J")
        return thought

    def _cot(self, block: dict[str, Any] | None) -> dict[str, Any]:
        return {} if block is None or self.behaviour.proxied else {"cot": block}

    async def _chat_events(
        self, body: dict[str, Any], thoughts: list[Thought]
    ) -> AsyncGenerator[str, None]:
        events = [
            event(choice(i, {"role": "assistant", "content": ""})) for i in range(len(thoughts))
        ]
        for index, thought in enumerate(thoughts):
            top = thought.cot is not None and thought.cot.record == "top"
            steps = thought.steps() if top else []
            for t, text in enumerate(thought.tokens):
                cot = self._cot({"steps": steps[t : t + 1]}) if top else {}
                events.append(event(choice(index, {"reasoning": text}, **cot)))
            for text in [FORCED] * (thought.cot is not None) + [*thought.words, "}"]:
                events.append(event(choice(index, {"content": text})))
            block = thought.block()
            if block is not None:
                block.pop("steps", None)
            events.append(
                event(choice(index, {"content": ""}, finish_reason="stop", **self._cot(block)))
            )
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append(event({"choices": [], "usage": usage(thoughts)}))
        async for part in self._misbehave([*events, "data: [DONE]\n\n"]):
            yield part

    async def _frames(self, body: dict[str, Any], cot: CoTParams) -> AsyncGenerator[bytes, None]:
        prompts, n = body["prompts"], body.get("n", 1)
        frames: list[Frame] = [
            Start(
                request_id="r",
                model=MODEL,
                weight_version="default",
                num_prompts=len(prompts),
                num_samples=n,
            )
        ]
        for i, prompt in enumerate(prompts):
            for k in range(n):
                if (i, k) in self.behaviour.fail:
                    frames.append(Failure(prompt=i, sample=k, code="nan", message="NaN logits"))
                    continue
                seed = derive_seed(derive_seed(body.get("seed", 0), i), k)
                if body.get("seeds"):
                    seed = body["seeds"][i][k]
                frames.append(rollout_sample(i, k, prompt, self._thought(cot, seed)))
        errors = len(self.behaviour.fail)
        frames.append(End(samples=len(prompts) * n - errors, errors=errors))
        frames[1:-1] = reversed(frames[1:-1])  # samples finish in any order
        async for part in self._misbehave([encode_frame(frame) for frame in frames]):
            yield part

    async def _misbehave(self, parts: list[Any]) -> AsyncGenerator[Any, None]:
        """The parts, as far as the behaviour lets them."""
        done = False
        try:
            for count, part in enumerate(parts):
                if count == self.behaviour.hold_after:
                    await asyncio.sleep(3600)
                if count == self.behaviour.cut_after:
                    done = True
                    if self.behaviour.end_early:
                        return
                    raise ConnectionError("cut, as the test wants it")
                if count == self.behaviour.nan_after:
                    error = {"message": "NaN logits", "type": "InternalServerError", "code": 500}
                    yield event({"error": error})
                    yield "data: [DONE]\n\n"
                    done = True
                    return
                yield part
            done = True
        finally:
            if not done:
                self.hung_up.set()


def _num_prompts(prompt: Any) -> int:
    return 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)


def _error(status: int, kind: str, message: str, param: str | None) -> JSONResponse:
    error = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": error}, status)
