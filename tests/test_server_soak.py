"""The soak program, for some seconds: a full house, a third of the clients rude, nothing left."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_host import KEY, Server

from server.soak import failures, parser, soak
from server.soak_client import MODES, ROLLOUTS, make_requests

pytestmark = pytest.mark.engine


def test_many_clients_half_of_them_rude_leave_no_trace(
    server: Server, stock_server: Server
) -> None:
    flags = ["--url", server.url, "--stock-url", stock_server.url, "--api-key", KEY]
    flags += ["--seconds", "12", "--streams", "60", "--requests", "30", "--tokens", "16"]
    args = parser().parse_args([*flags, "--pid", str(server.process.pid)])
    result = asyncio.run(soak(args))
    assert failures(result, bound=0.95) == []
    assert sum(result["complete"].values()) > 0 and set(result["complete"]) <= set(MODES)
    assert result["left_early"]["reading"] + result["left_early"]["waiting"] > 0


@given(count=st.integers(1, 90), seed=st.integers(0, 9))
def test_no_two_requests_are_alike(count: int, seed: int) -> None:
    import random

    made = make_requests(count, 16, random.Random(seed), "m")
    bodies = [str(request.body) for request in made]
    assert len(made) == count == len(set(bodies))
    assert all(request.mode != "plain" for request in made if request.path == ROLLOUTS)


CLEAN = {
    "held_after": {"requests": 0},
    "errors": {},
    "neighbours_answers": 0,
    "differs": {"soft": 1},
    "same_as_alone": 0.99,
    "mib_before": 1000.0,
    "mib_after": 1010.0,
}


@pytest.mark.parametrize(
    ("found", "part"),
    [
        ({"held_after": {"requests": 1}}, "held"),
        ({"errors": {"ReadError": 1}}, "ReadError"),
        ({"neighbours_answers": 1}, "another request"),
        ({"differs": {"plain": 1}}, "stock"),
        ({"same_as_alone": 0.9}, "90.0%"),
        ({"mib_after": 1200.0}, "memory"),
    ],
)
def test_whatever_is_wrong_is_said(found: dict[str, object], part: str) -> None:
    assert failures(CLEAN, 0.95) == []
    (line,) = failures({**CLEAN, **found}, 0.95)
    assert part in line
