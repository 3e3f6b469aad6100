"""The two middlewares: refusing our fields elsewhere, guarding the control routes."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.control import PATHS, ControlGate
from server.refusals import OURS, RefuseElsewhere


class App:
    """Notes what reaches it and answers 200."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.left = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left = True
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
        # What vLLM does while it generates: wait for the client to leave.
        self.left = (await receive())["type"] == "http.disconnect"


def call(
    middleware: Any, path: str, chunks: list[bytes], leaves: bool = False, **more: Any
) -> tuple[int | None, bytes]:
    """(status, body) of a request whose body comes in chunks; `leaves`: before the last one."""
    messages = [
        {"type": "http.request", "body": chunk, "more_body": leaves or i < len(chunks) - 1}
        for i, chunk in enumerate(chunks)
    ]
    messages.append({"type": "http.disconnect"})
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], **more}
    asyncio.run(middleware(scope, receive, send))
    status = next((m["status"] for m in sent if m["type"] == "http.response.start"), None)
    return status, b"".join(m.get("body", b"") for m in sent)


ELSEWHERE = "/v1/responses"


def split(data: bytes, places: list[int]) -> list[bytes]:
    at = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(at)]


@settings(deadline=None)
@given(body=st.binary(max_size=60), places=st.lists(st.integers(0, 60), max_size=5))
def test_a_body_without_our_fields_arrives_intact(body: bytes, places: list[int]) -> None:
    app = App()
    status, _ = call(RefuseElsewhere(app), ELSEWHERE, split(body, places))
    assert status == 200 and app.bodies == [body]
    assert app.left, "the app still hears that the client left"


values = st.one_of(st.booleans(), st.integers(), st.text(max_size=4), st.just({}), st.just([]))


@settings(deadline=None)
@given(
    field=st.sampled_from(["cot", "cot_mode"]),
    value=values,
    places=st.lists(st.integers(0, 60), max_size=5),
)
def test_our_fields_are_refused_however_the_body_is_cut(
    field: str, value: Any, places: list[int]
) -> None:
    app = App()
    body = json.dumps({"input": "cot_mode", field: value}).encode()
    status, answer = call(RefuseElsewhere(app), ELSEWHERE, split(body, places))
    assert status == 400 and app.bodies == []
    error = json.loads(answer)["error"]
    assert error["param"] == field and ELSEWHERE in error["message"] and OURS[0] in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"cot": null, "cot_mode": null}',
        b'{"input": {"cot_mode": "soft"}}',
        b'["cot_mode", "cot"]',
        b'{"cot": 5',
        b'"cot"',
    ],
)
def test_what_only_looks_like_our_fields_passes(body: bytes) -> None:
    app = App()
    assert call(RefuseElsewhere(app), ELSEWHERE, [body])[0] == 200
    assert app.bodies == [body]


@pytest.mark.parametrize("path", [*OURS, "/health", "/tokenize", "/pause"])
def test_routes_that_think_or_do_not_generate_are_left_alone(path: str) -> None:
    app = App()
    body = b'{"cot_mode": "soft"}'
    assert call(RefuseElsewhere(app), path, [body])[0] == 200 and app.bodies == [body]


def test_an_escaped_name_is_the_same_name() -> None:
    """JSON may write any character as an escape."""
    app = App()
    body = b'{"c\\u006ft_mode": "soft"}'
    assert call(RefuseElsewhere(app), ELSEWHERE, [body])[0] == 400


def test_a_root_path_is_no_way_around() -> None:
    app = App()
    where = {"path": "/api" + ELSEWHERE, "root_path": "/api"}
    status, _ = call(RefuseElsewhere(app), **where, chunks=[b'{"cot": {}}'])
    assert status == 400


@pytest.mark.parametrize("root", ["/", "/p", "/pa"])
def test_a_root_path_that_ends_within_a_name_is_none(root: str) -> None:
    """Starlette takes it off in front of a slash only: these requests reach the routes."""
    app = App()
    assert call(gate(app, False), "/pause", [b""], root_path=root)[0] == 403
    assert call(gate(app, True, "k"), "/pause", [b""], root_path=root)[0] == 401
    where = {"path": ELSEWHERE, "root_path": "/" if root == "/" else "/v"}
    assert call(RefuseElsewhere(app), **where, chunks=[b'{"cot": {}}'])[0] == 400
    assert app.bodies == []


def test_a_client_that_leaves_while_sending_reaches_nothing() -> None:
    app = App()
    status, _ = call(RefuseElsewhere(app), ELSEWHERE, [b'{"input"', b": "], leaves=True)
    assert status is None and app.bodies == []


# ---- control ------------------------------------------------------------------------------------


def gate(app: App, enabled: bool, *keys: str) -> ControlGate:
    return ControlGate(app, enabled, keys, PATHS)


@pytest.mark.parametrize("path", sorted(PATHS))
def test_every_control_route_is_closed_unless_opened(path: str) -> None:
    for spelt in (path, path + "/"):
        app = App()
        status, answer = call(gate(app, False, "k"), spelt, [b""])
        assert status == 403 and app.bodies == [] and b"--enable-rl" in answer


@pytest.mark.parametrize(
    ("header", "status"),
    [(None, 401), (b"Bearer wrong", 401), (b"k", 401), (b"Bearer k", 200), (b"bearer k", 200)],
)
def test_an_open_control_route_wants_the_key(header: bytes | None, status: int) -> None:
    headers = [] if header is None else [(b"authorization", header)]
    app = App()
    assert call(gate(app, True, "k"), "/pause", [b""], headers=headers)[0] == status
    assert len(app.bodies) == (status == 200)


def test_without_a_key_an_open_route_is_open_and_others_are_not_touched() -> None:
    app = App()
    assert call(gate(app, True), "/pause", [b""])[0] == 200
    assert call(gate(app, False), "/v1/models", [b""])[0] == 200
    assert call(gate(app, False), "/api/pause", [b""], root_path="/api")[0] == 403
    assert len(app.bodies) == 2
