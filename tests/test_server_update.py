"""An updater that dies leaves the server serving; the next one can update."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server_host import CHAT, KEY, ROLLOUTS, SHORT, Server, chat_body, frames_of, rollout_body

from softvllm.core.checkpoint import write_marker
from softvllm.core.rollout import Sample

pytestmark = pytest.mark.engine

UPDATER = """
import sys, time, httpx
url, key, folder = sys.argv[1:]
http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"})
http.post("/start_weight_update").raise_for_status()
http.post("/update_weights", json={"update_info": {"path": folder}}).raise_for_status()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def weights(server: Server, tmp_path: Path) -> Iterator[Path]:
    """The served weights once more: answers of other tests must not change."""
    folder = tmp_path / "again"
    folder.mkdir()
    shutil.copy(server.model / "model.safetensors", folder)
    write_marker(folder)
    yield folder
    assert server.post("/abort_weight_update", {}).is_success
    assert server.post("/update_weight_version", {"new_version": "default"}).is_success


def version(server: Server) -> str:
    return server.http.get("/weight_info").json()["weight_version"]


def is_paused(server: Server) -> bool:
    return server.http.get("/is_paused").json()["is_paused"]


def prepare(server: Server, folder: Path) -> None:
    """The two steps that run beside requests."""
    assert server.post("/start_weight_update", {}).is_success
    assert server.post("/update_weights", {"update_info": {"path": str(folder)}}).is_success


def thoughts(server: Server) -> list[Sample]:
    """Samples that take some seconds."""
    cot = {**SHORT, "max_think_tokens": 300, "min_think_tokens": 300, "record": "steps"}
    body = rollout_body(cot=cot, n=8, seed=5, sampling={"max_tokens": 310})
    with server.http.stream("POST", ROLLOUTS, json=body) as answer:
        _, samples, end = frames_of(answer.iter_bytes())
    assert end.errors == 0
    return [sample for sample in samples if isinstance(sample, Sample)]


def wait_until_thinking(server: Server) -> None:
    while server.info()["held"]["trace_bytes_front"] == 0:
        time.sleep(0.02)


def test_the_server_pauses_itself_while_requests_run(server: Server, weights: Path) -> None:
    with ThreadPoolExecutor() as pool:
        running = pool.submit(thoughts, server)
        wait_until_thinking(server)
        prepare(server, weights)
        body = {"weight_version": "next", "pause": "keep"}
        assert server.post("/finish_weight_update", body).is_success
        assert not is_paused(server) and version(server) == "next"
        samples = running.result()
    for trace in (sample.trace for sample in samples):
        (first, zero, cut), (last, same, end) = trace.meta["weight_versions"]
        assert (first, zero, last, same, end) == ("default", 0, "next", cut, len(trace))


def test_an_updater_that_hangs_up_during_the_change_leaves_a_server_that_serves(
    server: Server, weights: Path
) -> None:
    with ThreadPoolExecutor() as pool:
        running = pool.submit(thoughts, server)
        wait_until_thinking(server)
        prepare(server, weights)
        hang_up(server, "/finish_weight_update", {"weight_version": "left", "pause": "keep"})
        assert len(running.result()) == 8
    deadline = time.monotonic() + 30
    while (version(server) != "left" or is_paused(server)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert version(server) == "left" and not is_paused(server)
    assert server.chat(cot_mode="soft", cot=SHORT)["choices"][0]["cot"]["weight_version"] == "left"


def test_an_updater_that_is_killed_leaves_a_server_that_serves(
    server: Server, weights: Path
) -> None:
    command = [sys.executable, "-c", UPDATER, server.url, KEY, str(weights)]
    updater = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert updater.stdout is not None
    try:
        assert updater.stdout.readline() == "ready\n"
    finally:
        updater.send_signal(signal.SIGKILL)
        updater.wait()
        updater.stdout.close()
    assert not is_paused(server) and version(server) == "default"
    assert server.post(CHAT, chat_body(cot_mode="soft", cot=SHORT)).is_success
    refused = server.post("/start_weight_update", {})
    assert refused.status_code == 409 and "/abort_weight_update" in refused.text
    assert server.post("/abort_weight_update", {}).is_success
    prepare(server, weights)
    body = {"weight_version": "second", "pause": "keep"}
    assert server.post("/finish_weight_update", body).is_success and version(server) == "second"


def hang_up(server: Server, path: str, body: dict[str, Any]) -> None:
    """Send a request and close the connection without waiting for the answer."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    port = server.http.base_url.port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + data)
