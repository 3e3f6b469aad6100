"""The endpoint plugin: our routes on vLLM's server (`vllm.endpoint_plugins: softvllm`).

vLLM loads it in each API process when `VLLM_PLUGINS` names it, which `softvllm serve` does.
"""

from __future__ import annotations

import asyncio
import contextlib
from argparse import Namespace
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion import api_router as stock_chat
from vllm.entrypoints.openai.completion import api_router as stock_completion
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from server import control, playground
from server.chat import SoftChatRequest, SoftServingChat
from server.chat import wants_free_answer as free_chat_answer
from server.completions import SoftCompletionRequest, SoftServingCompletion
from server.completions import wants_free_answer as free_completion_answer
from server.context import ServerContext, counted
from server.info import cot_info, held_bytes
from server.metrics import METRICS
from server.options import ServerOptions
from server.protocol import body_schema, build_cot, wants_trace
from server.refusals import RefuseElsewhere
from server.report import NanLogitsError
from server.rollout_request import RolloutRequest
from server.rollouts import create_rollouts
from softvllm.core.fingerprint import weights_named
from softvllm.core.rollout import MEDIA_TYPE
from softvllm.engine.errors import CoTRequestError, ThinkRefusal

GAUGE_SECONDS = 5.0
"""How often the gauge of held trace bytes is refreshed."""


async def create_chat_completion(request: SoftChatRequest, raw_request: Request) -> Any:
    """vLLM's route; with a think phase where the request or the server's default asks for one."""
    route = stock_chat.create_chat_completion
    return await _answer(request, raw_request, route, free_chat_answer(request))


async def create_completion(request: SoftCompletionRequest, raw_request: Request) -> Any:
    """vLLM's route; with a think phase where the request or the server's default asks for one."""
    route = stock_completion.create_completion
    return await _answer(request, raw_request, route, free_completion_answer(request))


async def _answer(
    request: SoftChatRequest | SoftCompletionRequest,
    raw_request: Request,
    route: Callable[..., Awaitable[Any]],
    free_answer: bool,
) -> Any:
    context: ServerContext = raw_request.app.state.softvllm
    asked = request.cot_mode is not None or request.cot is not None
    with counted():
        try:
            await _admit(request, raw_request, context, free_answer)
            return await _counted_by_mode(route, request, raw_request)
        except NanLogitsError as failure:
            return _failed(failure)
        except (CoTRequestError, ThinkRefusal):
            # Only the server's default wanted a think phase: a client that knows nothing of it
            # must not get an error for what stock vLLM serves, such as `max_tokens: 1`.
            if asked or context.options.default_mode is None:
                raise
        # Anew from the body: vLLM's handlers write into the request that they are given.
        plain = type(request).model_validate(await raw_request.json())
        METRICS.fallbacks.inc()
        return await _counted_by_mode(route, plain, raw_request)


async def _counted_by_mode(route: Callable[..., Awaitable[Any]], request: Any, raw: Request) -> Any:
    response = await route(request, raw)  # raises what is refused: the door counts that
    METRICS.requests.labels("stock" if request._turn is None else request.turn.cot.mode).inc()
    return response


def _failed(failure: NanLogitsError) -> JSONResponse:
    """An answer instead of an exception, after which uvicorn would drop the client's connection."""
    return control.error(HTTPStatus.INTERNAL_SERVER_ERROR, str(failure))


async def _admit(
    request: Any, raw_request: Request, context: ServerContext, free_answer: bool
) -> None:
    """Give the request its `Turn` if it thinks; raises `CoTRequestError`."""
    cot = build_cot(
        request.cot_mode, request.cot, context.options, context.tokenizer, free_answer=free_answer
    )
    if cot is None:
        return
    if request.use_beam_search:
        raise CoTRequestError.of(
            "mode",
            "beam search compares token sequences and cannot follow a think phase; use n > 1 "
            "instead, or drop cot_mode and cot",
        )
    request._turn = context.turn(cot, wants_trace(request.cot))
    # From the body itself: vLLM's model writes OpenAI's 16 over what was not given.
    if (
        isinstance(request, SoftCompletionRequest)
        and (await raw_request.json()).get("max_tokens") is None
    ):
        request.max_tokens = None  # what the prompt leaves, see `to_sampling_params`


class SoftEndpoints:
    """vLLM's `EndpointPlugin` protocol."""

    name = "softvllm"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        options = ServerOptions.from_env()
        app.add_middleware(RefuseElsewhere)
        for path, endpoint, stock in (
            ("/v1/chat/completions", create_chat_completion, stock_chat),
            ("/v1/completions", create_completion, stock_completion),
        ):
            responses = next(
                r.responses  # type: ignore[attr-defined]
                for r in stock.router.routes
                if getattr(r, "path", None) == path
            )
            app.add_api_route(
                path,
                endpoint,
                methods=["POST"],
                dependencies=[Depends(validate_json_request)],
                responses=responses,
                response_model=None,
            )
        app.add_api_route("/v1/cot/info", cot_info, methods=["GET"])
        app.add_api_route(
            "/v1/rollouts",
            create_rollouts,
            methods=["POST"],
            response_model=None,
            responses={200: {"content": {MEDIA_TYPE: {}}}},
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {
                        kind: {"schema": body_schema(RolloutRequest)}
                        for kind in ("application/json", "application/msgpack")
                    },
                }
            },
        )
        playground.attach(app)
        control.attach(app, options.enable_rl)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is None or state.openai_serving_chat is None:
            raise RuntimeError("softvllm's routes need a generating engine")
        chat = SoftServingChat.beside(state.openai_serving_chat, args)
        completion = SoftServingCompletion.beside(state.openai_serving_completion)
        state.openai_serving_chat, state.openai_serving_completion = chat, completion
        names = args.served_model_name or [args.model]
        model = engine_client.vllm_config.model_config
        commit = getattr(model.hf_config, "_commit_hash", None)
        context = ServerContext(
            engine_client,
            ServerOptions.from_env(),
            chat,
            completion,
            str(names[0]),
            await asyncio.to_thread(weights_named, model.model, commit),
        )
        state.softvllm = context
        state.softvllm_gauge = asyncio.create_task(_refresh_gauge(context))


async def _refresh_gauge(context: ServerContext) -> None:
    while True:
        await asyncio.sleep(GAUGE_SECONDS)
        with contextlib.suppress(Exception):  # a dead engine is vLLM's to report
            await held_bytes(context)
