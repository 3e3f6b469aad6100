"""The control routes: closed without --enable-rl, behind the API key with it, readable refusals.

vLLM's own routes and middleware, put together as its server does, over a fake engine that holds
a real `UpdateSession`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server import control
from softvllm.engine.update import ABORT, UpdateSession, verdict

KEY = "secret"
RIGHT = {"Authorization": f"Bearer {KEY}"}
GETS = {"/is_paused", "/is_sleeping", "/get_world_size", "/server_info", "/weight_info"}
BODY = {"update_info": {"path": "/new"}}


class FakeCore:
    """One worker of our back-end, which accepts the folder /new."""

    def __init__(self) -> None:
        self.verdict: str | None = None

    def workers(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [self.verdict if function is verdict else "from-folder"]

    def obstacle(self) -> str | None:
        return None

    def updated(self, version: str | None) -> None:
        pass


class FakeEngine:
    """An engine client whose engine core lives in another process: errors arrive as text."""

    def __init__(self, data_parallel_size: int = 1) -> None:
        self.core = FakeCore()
        self.session = UpdateSession(self.core, is_folder=True)
        self.calls: list[Any] = []
        self.paused: Any = None
        self.version = "default"
        self.breaks = False
        parallel = SimpleNamespace(data_parallel_size=data_parallel_size, world_size=1)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)

    async def collective_rpc(self, method: Any, kwargs: Any = None, **other: Any) -> Any:
        self.calls.append(method)
        if self.breaks:
            raise Exception("Call to collective_rpc method failed: CUDA error")
        info = (kwargs or {}).get("update_info")
        path = info.get("path") if isinstance(info, dict) else None
        self.core.verdict = None if path in (None, "/new") else f"{path} has no marker"
        try:
            return self.session.call(method, lambda: [None], kwargs)
        except Exception as error:
            raise Exception(f"Call to collective_rpc method failed: {error}") from None

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await self.collective_rpc(
            "init_weight_transfer_engine", kwargs={"init_info": request.init_info}
        )

    async def shutdown_weight_transfer_engine(self) -> None:
        await self.collective_rpc("shutdown_weight_transfer_engine")

    async def start_draft_weight_update(self) -> None:
        await self.collective_rpc("start_draft_weight_update")

    async def start_weight_update(self) -> None:
        await self.collective_rpc("start_weight_update")

    async def update_weights(self, request: Any) -> None:
        await self.collective_rpc("update_weights", kwargs={"update_info": request.update_info})

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        await self.collective_rpc("finish_weight_update")
        if weight_version is not None:
            self.version = weight_version

    async def get_weight_version(self) -> str:
        return self.version

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.paused = (mode, clear_cache)

    async def resume_generation(self) -> None:
        self.paused = None

    async def is_paused(self) -> bool:
        return self.paused is not None


class Plugin:
    """What the server's endpoint plugin does for the control routes."""

    name = "softvllm"

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def attach_router(self, app: FastAPI) -> None:
        control.attach(app, self.enabled)


def make_app(
    monkeypatch: pytest.MonkeyPatch,
    enabled: bool,
    keys: list[str] | None,
    engine: Any = None,
    dev_mode: bool = True,
) -> FastAPI:
    """The app as `vllm.entrypoints.launchers.app.build_app` makes it, with few routes."""
    from vllm.entrypoints.rl.factories import register_rl_api_routers
    from vllm.entrypoints.serve import register_vllm_dev_api_routers
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
    from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins

    app = FastAPI()
    app.state.args = Namespace(
        api_key=keys,
        allowed_origins=["*"],
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        enable_request_id_headers=False,
        middleware=[],
        log_error_stack=False,
    )
    app.state.engine_client = engine or FakeEngine()

    @app.get("/health")
    async def health() -> str:
        return "healthy"

    @app.get("/v1/models")
    async def models() -> str:
        return "models"

    if dev_mode:
        register_vllm_dev_api_routers(app)
        register_rl_api_routers(app)
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda tasks: [Plugin(enabled)])
    attach_endpoint_plugins(app, ("generate",))
    init_exception_handler(app)
    init_entrypoints_middleware(app.state.args, app, ())
    return app


def ask(client: TestClient, path: str, **kwargs: Any) -> Any:
    return client.request("GET" if path in GETS else "POST", path, **kwargs)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(params=[True, False], ids=["vLLM's routes", "routes added here"])
def client(
    monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, request: pytest.FixtureRequest
) -> Iterator[TestClient]:
    app = make_app(monkeypatch, True, None, engine, dev_mode=request.param)
    yield TestClient(app, raise_server_exceptions=False)


# ---- who may ask ----------------------------------------------------------------------------


@pytest.mark.parametrize("dev_mode", [True, False])
def test_without_enable_rl_every_control_route_is_forbidden_and_says_how_to_open_it(
    monkeypatch: pytest.MonkeyPatch, dev_mode: bool
) -> None:
    client = TestClient(make_app(monkeypatch, False, [KEY], dev_mode=dev_mode))
    for path in control.PATHS:
        for headers in ({}, RIGHT):
            answer = ask(client, path, headers=headers)
            assert answer.status_code == 403, path
            told = answer.json()["error"]
            assert "--enable-rl" in told["message"] and told["code"] == 403
            assert set(told) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("dev_mode", [True, False])
def test_with_enable_rl_every_control_route_wants_the_key(
    monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, dev_mode: bool
) -> None:
    client = TestClient(make_app(monkeypatch, True, [KEY], engine, dev_mode))
    for value in (None, "", KEY, "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY} "):
        headers = {} if value is None else {"Authorization": value}
        stock = client.get("/v1/models", headers=headers)
        assert stock.status_code == 401
        for path in control.PATHS:
            answer = ask(client, path, headers=headers)
            assert (answer.status_code, answer.json()) == (401, stock.json()), (path, value)
    assert engine.calls == [] and engine.paused is None


@pytest.mark.parametrize("dev_mode", [True, False])
def test_every_control_route_that_vllm_has_is_known(
    monkeypatch: pytest.MonkeyPatch, dev_mode: bool
) -> None:
    app = make_app(monkeypatch, True, None, dev_mode=dev_mode)
    paths = {getattr(route, "path", "") for route in app.routes}
    assert control.control_paths(app) == control.PATHS
    assert paths >= control.PATHS


def test_a_control_route_of_a_later_vllm_is_guarded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    app = FastAPI()

    async def shred() -> str:
        return "shredded"

    shred.__module__ = "vllm.entrypoints.rl.online.future"
    app.post("/shred_weights")(shred)
    app.state.args = Namespace(api_key=[KEY])
    control.attach(app, True)
    client = TestClient(app)
    assert client.post("/shred_weights").status_code == 401
    assert client.post("/shred_weights", headers=RIGHT).json() == "shredded"


def test_without_enable_rl_there_is_no_control_route_behind_the_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = make_app(monkeypatch, False, None, dev_mode=False)
    assert not {getattr(route, "path", "") for route in app.routes} & control.PATHS


@pytest.mark.parametrize("source", ["flag", "environment"])
def test_the_right_key_opens(
    monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, source: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY if source == "environment" else "other")
    keys = [KEY, "second"] if source == "flag" else None
    client = TestClient(make_app(monkeypatch, True, keys, engine))
    assert client.post("/pause", headers=RIGHT).status_code == 200
    assert client.get("/is_paused", headers=RIGHT).json() == {"is_paused": True}
    assert client.get("/is_paused", headers={"Authorization": "Bearer other"}).status_code == 401
    if source == "flag":
        assert client.get("/is_paused", headers={"Authorization": "Bearer second"}).is_success


def test_detours_do_not_pass_the_gate(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    client = TestClient(make_app(monkeypatch, True, [KEY], engine))
    for path in ("/pause/", "//pause", "/./pause", "/x/../pause", "/pause?mode=keep", "/%70ause"):
        assert client.post(path).status_code in (401, 404), path
    assert client.post("/root/pause").status_code == 404
    assert engine.paused is None


def test_behind_a_proxy_prefix_the_gate_stands_too(monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(make_app(monkeypatch, True, [KEY]), root_path="/proxy")
    assert client.post("/proxy/pause").status_code == 401
    assert client.post("/proxy/pause", headers=RIGHT).status_code == 200


def test_other_routes_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for enabled in (True, False):
        client = TestClient(make_app(monkeypatch, enabled, [KEY]))
        assert client.get("/health").json() == "healthy"
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers=RIGHT).json() == "models"


def test_a_browser_may_ask_what_is_allowed_before_it_has_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = TestClient(make_app(monkeypatch, True, [KEY]))
    asking = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    assert client.options("/pause", headers=asking).status_code == 200


# ---- weight updates -------------------------------------------------------------------------


def error_of(answer: Any) -> tuple[int, str]:
    told = answer.json()["error"]
    assert told["code"] == answer.status_code
    return answer.status_code, told["message"]


def test_an_update_in_order_sets_the_version(client: TestClient) -> None:
    assert client.post("/init_weight_transfer_engine").is_success
    assert client.post("/init_weight_transfer_engine", json={"init_info": {}}).is_success
    assert client.post("/pause", params={"mode": "keep"}).json() == {"status": "paused"}
    for path, body in (
        ("/start_weight_update", None),
        ("/update_weights", BODY),
        ("/finish_weight_update", {"weight_version": "17"}),
    ):
        answer = client.post(path, json=body)
        assert answer.is_success and "message" in answer.json()
    assert client.post("/resume").is_success
    assert client.get("/weight_info").json() == {"weight_version": "17"}


def test_pause_defaults_are_vllms(client: TestClient, engine: FakeEngine) -> None:
    client.post("/pause")
    assert engine.paused == ("abort", True)


def test_steps_out_of_order_are_conflicts_that_name_the_next_step(client: TestClient) -> None:
    for path in ("/update_weights", "/finish_weight_update"):
        status, message = error_of(client.post(path, json=BODY))
        assert status == 409 and "/start_weight_update" in message
    client.post("/start_weight_update")
    status, message = error_of(client.post("/start_weight_update"))
    assert status == 409 and "/abort_weight_update" in message
    status, message = error_of(client.post("/finish_weight_update"))
    assert status == 409 and "/update_weights" in message
    assert client.post("/update_weights", json=BODY).is_success
    assert error_of(client.post("/update_weights", json=BODY))[0] == 409
    for path in ("/shutdown_weight_transfer_engine", "/start_draft_weight_update"):
        assert error_of(client.post(path))[0] == 409
    assert client.post("/finish_weight_update").is_success


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_finish_pauses_and_resumes_by_itself_if_asked(
    client: TestClient, engine: FakeEngine, mode: str
) -> None:
    """Nobody has to send /resume, so an updater that is killed leaves no paused server."""
    client.post("/start_weight_update")
    client.post("/update_weights", json=BODY)
    seen = []
    engine.core.updated = lambda version: seen.append(engine.paused)  # type: ignore[method-assign]
    answer = client.post("/finish_weight_update", json={"weight_version": "17", "pause": mode})
    assert answer.is_success and seen == [(mode, True)] and engine.paused is None
    assert client.get("/weight_info").json() == {"weight_version": "17"}


def test_finish_resumes_after_a_failure_and_leaves_anothers_pause_alone(
    client: TestClient, engine: FakeEngine
) -> None:
    answer = client.post("/finish_weight_update", json={"pause": "keep"})
    assert answer.status_code == 409 and engine.paused is None
    engine.breaks = True
    answer = client.post("/finish_weight_update", json={"pause": "keep"})
    assert answer.status_code == 500 and engine.paused is None
    engine.breaks = False
    client.post("/pause", params={"mode": "keep"})
    for path, body in (("/start_weight_update", None), ("/update_weights", BODY)):
        assert client.post(path, json=body).is_success
    assert client.post("/finish_weight_update", json={"pause": "wait"}).is_success
    assert engine.paused == ("keep", True)
    assert client.post("/finish_weight_update", json={"pause": "sideways"}).status_code == 400


def test_a_wrong_folder_is_a_bad_request_with_the_reason_and_the_server_goes_on(
    client: TestClient,
) -> None:
    client.post("/pause", params={"mode": "keep"})
    client.post("/start_weight_update")
    wrong = {"update_info": {"path": "/data/step-3"}}
    status, message = error_of(client.post("/update_weights", json=wrong))
    # The folder's name is the client's own and stays in, unlike in vLLM's errors.
    assert (status, message) == (400, "/data/step-3 has no marker")
    assert client.post("/resume").is_success
    assert not client.get("/is_paused").json()["is_paused"]
    assert client.post("/start_weight_update").is_success
    assert client.post("/update_weights", json=BODY).is_success
    assert client.post("/finish_weight_update").is_success


def test_wrong_bodies_are_bad_requests(client: TestClient) -> None:
    assert error_of(client.post("/update_weights", json={}))[0] == 400
    assert error_of(client.post("/update_weights", json={"update_info": 3}))[0] == 400
    assert error_of(client.post("/finish_weight_update", json={"weight_version": 3}))[0] == 400
    client.post("/start_weight_update")
    assert error_of(client.post("/update_weights", json={"update_info": [{}]}))[0] == 400
    told = error_of(client.post("/init_weight_transfer_engine", json={"init_info": {"port": 1}}))
    assert told[0] == 400 and "init_info" in told[1]


def test_an_update_can_be_given_up(client: TestClient, engine: FakeEngine) -> None:
    for _ in range(2):
        assert client.post("/abort_weight_update").is_success
    client.post("/start_weight_update")
    client.post("/update_weights", json=BODY)
    assert client.post("/abort_weight_update").is_success
    assert not engine.session.started
    assert client.post("/start_weight_update").is_success


def test_a_failure_of_the_engine_stays_an_internal_error(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.breaks = True
    assert error_of(client.post("/start_weight_update"))[0] == 500


def test_data_parallel_siblings_give_up_a_refused_update(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(data_parallel_size=2)
    client = TestClient(make_app(monkeypatch, True, None, engine))
    client.post("/update_weights", json=BODY)
    assert ABORT not in engine.calls, "a conflict leaves the update that is under way alone"
    client.post("/start_weight_update")
    client.post("/update_weights", json={"update_info": {"path": "/wrong"}})
    assert engine.calls[-1] == ABORT
