"""`softvllm serve` before the engine starts: mistakes cost one line and no model load."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import pytest
from server_host import python

from server import cpu, serve
from server.cpu import GIB, MIN_KV_CACHE, OVERHEAD, fit, weights_size

SERVE = ("-m", "softvllm.cli", "serve")


def refusal(*flags: str) -> str:
    """The one line that a wrong command line gives."""
    done = python(*SERVE, *flags)
    assert done.returncode not in (0, None), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def test_help_shows_our_flags_without_loading_vllm() -> None:
    done = python("-X", "importtime", *SERVE, "--help")
    assert done.returncode == 0 and "--default-cot-mode" in done.stdout
    assert "vllm.entrypoints" not in done.stderr


def test_an_installation_without_the_routes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.serve.entry_points", lambda **_: ())
    with pytest.raises(RuntimeError, match="install it again"):
        serve._plugins()


@pytest.mark.parametrize("named", [None, "smollm2"])
def test_the_default_model_can_be_named(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softvllm.models.smollm2.prepare", lambda progress: Path("/prepared"))
    args = argparse.Namespace(model_tag=named, config=None, served_model_name=None)
    serve._choose_model(args)
    assert args.model_tag == "/prepared" and args.served_model_name == [serve.SERVED_NAME]


def test_a_taken_port_is_named_before_anything_is_loaded() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        line = refusal("--host", "127.0.0.1", "--port", str(port))
    assert f"127.0.0.1:{port}" in line and "--port" in line


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--port", "many"], "many"),
        (["--port", "70000"], "65535"),
        (["--default-cot-mode", "liquid"], "liquid"),
        (["--cot-config", "/nowhere/cot.toml"], "/nowhere/cot.toml"),
        (["--host", "not.an.address.invalid"], "not.an.address.invalid"),
    ],
)
def test_a_wrong_flag_of_ours_is_one_line(flags: list[str], part: str) -> None:
    assert part in refusal(*flags)


@pytest.mark.engine  # loads vLLM's parser, some seconds each
@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--max-model-len", "many"], "max-model-len"),
        (["/nowhere/model"], "/nowhere/model"),
        (["--trace-memory-gib", "-1"], "trace_memory_gib"),
    ],
)
def test_a_wrong_flag_of_vllm_or_a_missing_model_is_one_line(flags: list[str], part: str) -> None:
    port = ["--host", "127.0.0.1", "--port", "0"]
    assert part in refusal(*flags, *port)


# ---- memory -------------------------------------------------------------------------------------


def arguments(model: Path | str | None, **given: object) -> argparse.Namespace:
    from vllm.config import CacheConfig

    fields = {
        "model_tag": None if model is None else str(model),
        "enforce_eager": True,
        "kv_cache_memory_bytes": None,
        "gpu_memory_utilization": CacheConfig.gpu_memory_utilization,
        "tensor_parallel_size": 1,
    }
    return argparse.Namespace(**{**fields, **given})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a 1 GiB checkpoint that takes no disk."""
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(GIB)
    return tmp_path


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def test_the_cache_takes_half_of_what_is_left(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights_size(str(model)) == GIB and weights_size("a/name") == weights_size(None) == 0
    monkeypatch.setattr(cpu, "available_memory", lambda: GIB + OVERHEAD + 2 * GIB)
    args, said = arguments(model), []
    fit(args, (), said.append)
    assert args.kv_cache_memory_bytes == GIB and "1.0 GiB" in said[-1]


def test_a_large_machine_is_not_taken_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 512 * GIB)
    args = arguments(model)
    fit(args, (), lambda text: None)
    assert args.kv_cache_memory_bytes == cpu.MAX_KV_CACHE


def test_a_model_that_does_not_fit_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = GIB + OVERHEAD + MIN_KV_CACHE
    monkeypatch.setattr(cpu, "available_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match="too little memory"):
        fit(arguments(model), (), lambda text: None)
    monkeypatch.setattr(cpu, "available_memory", lambda: needed)
    fit(arguments(model), (), lambda text: None)
    with pytest.raises(ValueError, match="smaller model"):
        fit(arguments(model, tensor_parallel_size=2), (), lambda text: None)


@pytest.mark.parametrize(
    "told",
    [{"kv_cache_memory_bytes": 5}, {"gpu_memory_utilization": 0.123}],
)
def test_who_says_how_much_gets_that(
    model: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, float]
) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 0)
    args = arguments(model, **told)
    fit(args, (), lambda text: None)
    assert args.kv_cache_memory_bytes == told.get("kv_cache_memory_bytes")


@pytest.mark.parametrize(
    ("words", "eager"),
    [
        ([], True),
        (["--port", "1"], True),
        (["--no-enforce-eager"], False),
        (["-O3"], False),
        (["-O", "2"], False),
        (["--compilation_config={}"], False),
        (["-cc.mode=3"], False),
    ],
)
def test_a_model_is_compiled_only_for_who_asks(
    model: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], eager: bool
) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: None)
    monkeypatch.setattr(cpu.shutil, "which", lambda name: f"/bin/{name}")
    args = arguments(model, enforce_eager=False)
    fit(args, words, lambda text: None)
    assert args.enforce_eager is eager
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    args = arguments(model, enforce_eager=False)
    if eager:
        fit(args, words, lambda text: None)
    else:
        with pytest.raises(ValueError, match=r"C\+\+ compiler"):
            fit(args, words, lambda text: None)


def test_this_machine_has_memory() -> None:
    assert (cpu.available_memory() or GIB) > 0


def test_the_port_that_a_file_may_name_is_not_guessed() -> None:
    """`--config FILE` may hold another port and host than the defaults."""
    nowhere = ["--host", "not.an.address.invalid"]
    with pytest.raises(ValueError, match="cannot listen"):
        serve._check_port_early(nowhere)
    with pytest.raises(ValueError, match="cannot listen"):
        serve._check_port_early([*nowhere, "--config", "f.yaml", "--port", "8001"])
    serve._check_port_early([*nowhere, "--config", "f.yaml"])
    serve._check_port_early([*nowhere, "--config=f.yaml"])
    serve._check_port_early([*nowhere, "--headless"])
