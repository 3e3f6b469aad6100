"""A vLLM engine in a process of its own, driven from a test.

    with Engine(model_path, runner="v2", async_scheduling=True, max_num_seqs=4) as engine:
        results = engine.generate([[5, 6, 7]], [soft_params(mode="soft", seed=1)])

Each engine needs its own environment (which runner, how many ranks), so it runs in a
subprocess; V2 runs under Triton's interpreter (see ``v2_on_cpu.py``). Start one per module or
session and send it many batches: a start costs 10 to 20 seconds.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import v2_on_cpu

from softvllm.core.trace import Trace, decode

HOST = Path(__file__).resolve().parent / "engine_host.py"
START_TIMEOUT = 300.0


@dataclass
class Sample:
    """One completion, in plain data."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, float]] | None
    trace_bytes: bytes | None
    num_cached_tokens: int | None

    @property
    def trace(self) -> Trace:
        assert self.trace_bytes is not None, "the request had no CoT object"
        return decode(self.trace_bytes)


class EngineError(RuntimeError):
    """The engine raised; the message ends with `TypeName: text` of the original error."""


class Engine:
    """An engine subprocess. `options` go to `softvllm.LLM` (or `vllm.LLM` with stock=True)."""

    def __init__(
        self,
        model: str | Path,
        *,
        runner: str = "v1",
        async_scheduling: bool = False,
        tp: int = 1,
        stock: bool = False,
        multiprocess: bool = False,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        make = v2_on_cpu.v2_env if runner == "v2" else v2_on_cpu.v1_env
        environment = make(async_scheduling=async_scheduling, tp=tp)
        # In-process engine core unless asked otherwise: one process less, and tests can look in.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(multiprocess))
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        environment["HF_HUB_OFFLINE"] = "1"
        environment.update(env or {})
        tests = str(HOST.parent)
        environment["PYTHONPATH"] = os.pathsep.join(
            [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p] + [tests]
        )
        if async_scheduling:
            options.setdefault("async_scheduling", True)
        if tp > 1:
            options.setdefault("tensor_parallel_size", tp)
        defaults = {
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 16,
            "disable_log_stats": True,
            "seed": 0,
        }
        self.options = {**defaults, **options}
        self.log = tempfile.NamedTemporaryFile(  # noqa: SIM115 - lives as long as the engine
            mode="w+", prefix="engine-", suffix=".log", delete=False
        )
        folder = tempfile.mkdtemp(prefix="softvllm-test-")
        key = secrets.token_bytes(16)
        listener = Listener(os.path.join(folder, "s"), "AF_UNIX", authkey=key)
        self.process = subprocess.Popen(
            [sys.executable, str(HOST), listener.address, key.hex()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        listener._listener._socket.settimeout(60)  # type: ignore[attr-defined]
        self.connection: Connection = listener.accept()
        listener.close()
        try:
            self._ask(("start", str(model), stock, self.options), START_TIMEOUT)
        except BaseException:
            self.close()
            raise

    def _ask(self, message: tuple, timeout: float) -> Any:
        self.connection.send(message)
        if not self.connection.poll(timeout):
            raise TimeoutError(f"the engine did not answer in {timeout} s\n{self.tail()}")
        try:
            ok, value = self.connection.recv()
        except EOFError:
            raise EngineError(f"the engine process died\n{self.tail()}") from None
        if not ok:
            raise EngineError(value)
        return value

    def generate(
        self,
        prompts: list[Any],
        params: list[Any] | Any,
        *,
        timeout: float = 300.0,
        **kwargs: Any,
    ) -> list[list[Sample]]:
        """One list of samples (n of them) per prompt; prompts are texts or lists of ids."""
        prompts = [p if isinstance(p, str) else {"prompt_token_ids": list(p)} for p in prompts]
        return self._ask(("generate", prompts, params, kwargs), timeout)

    def one(self, prompt: Any, params: Any, **kwargs: Any) -> Sample:
        """The first sample of a single request."""
        return self.generate([prompt], [params], **kwargs)[0][0]

    def call(self, function: str, *args: Any, timeout: float = 300.0) -> Any:
        """Run `module:function(llm, *args)` inside the engine process (tests are importable)."""
        return self._ask(("call", function, args), timeout)

    def tail(self, characters: int = 6000) -> str:
        """End of the engine's log."""
        text = Path(self.log.name).read_text(errors="replace")
        return text[-characters:]

    def close(self) -> None:
        try:
            self.connection.send(("stop",))
        except (OSError, ValueError):
            pass
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
