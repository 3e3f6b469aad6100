"""RL control: vLLM's development routes behind the API key, refusals that a client can read.

vLLM leaves these routes open to everyone who reaches the port. Here a gate in front of them
answers 403 unless the server was started with `--enable-rl`, and 401 without the API key of the
`/v1` routes. The weight routes are replaced by ones that answer a refused step with its reason
(docs/weights.md) where vLLM would answer 500; everything else is vLLM's own handler.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import envs
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdatePayload,
    WeightTransferUpdateRequest,
)
from vllm.entrypoints.rl.factories import register_rl_api_routers
from vllm.entrypoints.rl.online.metrics import weight_operation_metrics
from vllm.entrypoints.serve import register_vllm_dev_api_routers
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.v1.engine import PauseMode

from server.refusals import route_path
from softvllm.engine.update import ABORT, UpdateRefusedError

PATHS = frozenset(
    "/" + name
    for name in (
        "abort_requests",
        "abort_weight_update",
        "collective_rpc",
        "finish_weight_update",
        "get_world_size",
        "init_weight_transfer_engine",
        "is_paused",
        "is_sleeping",
        "pause",
        "release_kv_cache_memory",
        "reset_encoder_cache",
        "reset_mm_cache",
        "reset_prefix_cache",
        "resume",
        "server_info",
        "shutdown_weight_transfer_engine",
        "sleep",
        "start_draft_weight_update",
        "start_weight_update",
        "update_weight_version",
        "update_weights",
        "wake_up",
        "weight_checker",
        "weight_info",
    )
)
"""Every route that vLLM adds in its development mode, and our own."""
_MODULES = ("vllm.entrypoints.rl.", "vllm.entrypoints.serve.dev.")

router = APIRouter()


def attach(app: FastAPI, enabled: bool) -> None:
    """Guard the control routes of an app that vLLM is building; add them if enabled.

    Call it where vLLM lets endpoint plugins add their routes: after its own, before the app
    starts. vLLM adds the control routes itself only with VLLM_SERVER_DEV_MODE=1. They are added
    here instead, so that there is none where this function, and with it the gate, is missing.
    """
    if enabled and not any(isinstance(r, APIRoute) and r.path == "/pause" for r in app.routes):
        register_vllm_dev_api_routers(app)
        register_rl_api_routers(app)
    args = getattr(app.state, "args", None)
    keys = [key for key in (getattr(args, "api_key", None) or [envs.VLLM_API_KEY]) if key]
    app.add_middleware(ControlGate, enabled=enabled, keys=keys, paths=control_paths(app))
    if enabled:
        app.include_router(router)


def control_paths(app: FastAPI) -> frozenset[str]:
    """Paths to guard: the known ones, and what else vLLM's development modules put there."""
    found = {
        route.path
        for route in app.routes
        if isinstance(route, APIRoute) and route.endpoint.__module__.startswith(_MODULES)
    }
    return PATHS | found


class ControlGate:
    """ASGI middleware in front of the control routes."""

    def __init__(
        self, app: ASGIApp, enabled: bool, keys: Iterable[str], paths: frozenset[str]
    ) -> None:
        self.app, self.enabled, self.paths = app, enabled, paths
        keys = list(keys)
        # vLLM's own check (constant time), for paths that its middleware lets pass.
        self.check = AuthenticationMiddleware(app, keys) if keys else None

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            return self.app(scope, receive, send)
        path = route_path(scope)
        if path.rstrip("/") not in self.paths:
            return self.app(scope, receive, send)
        if not self.enabled:
            reason = f"{path} controls the engine; start the server with --enable-rl to open it"
            return error(HTTPStatus.FORBIDDEN, reason)(scope, receive, send)
        if self.check is not None and not self.check.verify_token(Headers(scope=scope)):
            answer = JSONResponse({"error": "Unauthorized"}, HTTPStatus.UNAUTHORIZED)
            return answer(scope, receive, send)
        return self.app(scope, receive, send)


def error(status: int, reason: str) -> JSONResponse:
    """An error in vLLM's shape."""
    phrase = HTTPStatus(status).phrase
    body = ErrorResponse(error=ErrorInfo(message=reason, type=phrase, code=status))
    return JSONResponse(body.model_dump(), status)


async def step(engine: Any, operation: str, call: Awaitable[None], message: str) -> JSONResponse:
    """Run one step of a weight update; a refusal becomes its own answer."""
    try:
        with weight_operation_metrics().record(operation):
            await call
    except Exception as failure:
        refusal = UpdateRefusedError.find(failure)
        if refusal is None:
            raise
        if refusal.status != HTTPStatus.CONFLICT:
            await _give_up_elsewhere(engine)
        return error(refusal.status, refusal.reason)
    return JSONResponse({"message": message})


async def _give_up_elsewhere(engine: Any) -> None:
    """Where the engine that refused has data-parallel siblings, end their update too."""
    if engine.vllm_config.parallel_config.data_parallel_size > 1:
        await engine.collective_rpc(ABORT)


@router.post("/init_weight_transfer_engine")
async def init_weight_transfer_engine(
    raw_request: Request,
    init_info: Annotated[dict[str, Any] | None, Body(embed=True)] = None,
) -> JSONResponse:
    """vLLM's; the back-end `safetensors` needs neither the call nor an `init_info`."""
    engine = raw_request.app.state.engine_client
    call = engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info or {}))
    return await step(engine, "init", call, "Weight transfer initialized")


@router.post("/shutdown_weight_transfer_engine")
async def shutdown_weight_transfer_engine(raw_request: Request) -> JSONResponse:
    engine = raw_request.app.state.engine_client
    call = engine.shutdown_weight_transfer_engine()
    return await step(engine, "shutdown", call, "Weight transfer shut down")


@router.post("/start_weight_update")
async def start_weight_update(raw_request: Request) -> JSONResponse:
    engine = raw_request.app.state.engine_client
    return await step(engine, "start", engine.start_weight_update(), "Weight update started")


@router.post("/start_draft_weight_update")
async def start_draft_weight_update(raw_request: Request) -> JSONResponse:
    engine = raw_request.app.state.engine_client
    call = engine.start_draft_weight_update()
    return await step(engine, "start_draft", call, "Draft weight update started")


@router.post("/update_weights")
async def update_weights(
    raw_request: Request,
    update_info: Annotated[WeightTransferUpdatePayload, Body(embed=True)],
) -> JSONResponse:
    """For the back-end `safetensors`: `{"update_info": {"path": DIR}}`."""
    engine = raw_request.app.state.engine_client
    call = engine.update_weights(request=WeightTransferUpdateRequest(update_info=update_info))
    return await step(engine, "update", call, "Weights updated")


@router.post("/finish_weight_update")
async def finish_weight_update(
    raw_request: Request,
    weight_version: Annotated[str | None, Body(embed=True)] = None,
    pause: Annotated[PauseMode | None, Body(embed=True)] = None,
) -> JSONResponse:
    """Put the new weights in service; drops every cache of the old ones.

    With `pause` (keep, wait or abort) the server pauses and resumes by itself, so that an updater
    which dies cannot leave it paused.
    """
    engine = raw_request.app.state.engine_client
    call = _finish(engine, weight_version, pause)
    return await step(engine, "finish", call, "Weight update finished")


async def _finish(engine: Any, weight_version: str | None, pause: PauseMode | None) -> None:
    if pause is None or await engine.is_paused():
        return await engine.finish_weight_update(weight_version)
    try:
        await engine.pause_generation(mode=pause, clear_cache=True)
        await engine.finish_weight_update(weight_version)
    finally:
        await engine.resume_generation()


@router.post("/abort_weight_update")
async def abort_weight_update(raw_request: Request) -> JSONResponse:
    """Give up an update that was started; fine if there is none."""
    engine = raw_request.app.state.engine_client
    return await step(engine, "abort", engine.collective_rpc(ABORT), "No weight update under way")
