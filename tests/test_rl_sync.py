"""Adapters and NCCL's control calls over a server that misbehaves on demand."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fake_rollout_server import BASE, FakeRolloutServer
from rl_fixtures import fake_server, tiny_model
from test_rl_client import REQUEST, bytes_of, changed_model, client_of
from trainer_rollouts import single_thread
from transformers import AutoModelForCausalLM

from softvllm.core.checkpoint import write_weights
from trainer import patience
from trainer.config import SyncConfig
from trainer.rollout_client import Request, RolloutClient, ServerGone, ServerRefused
from trainer.sync import base, build
from trainer.sync.base import named_weights
from trainer.sync.lora import LoraSync
from trainer.sync.nccl import NcclSync

threads = pytest.fixture(single_thread, autouse=True, scope="module")
model = pytest.fixture(tiny_model, scope="module")
server = pytest.fixture(fake_server)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = base.time.sleep
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(base.time, "sleep", lambda seconds: sleep(min(seconds, 0.03)))


# ---- adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(model: Path) -> Any:
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)


def lora_of(client: RolloutClient, folder: Path) -> LoraSync:
    sync = build(SyncConfig(method="lora"), client, folder)
    assert isinstance(sync, LoraSync)
    return sync


def request_of(sync: LoraSync) -> Request:
    body = {**REQUEST.body, "model": sync.served_model}
    return Request(REQUEST.prompts, REQUEST.seeds, body)


def test_one_adapter_of_a_run_is_in_service_and_on_disk(
    server: FakeRolloutServer, adapted: Any, tmp_path: Path
) -> None:
    client, said = client_of(server)
    sync = lora_of(client, tmp_path)
    base_samples = client.generate(REQUEST).samples
    for step in range(3):
        sync.push(f"a-{step}", adapted)
        assert list(server.adapters) == [f"a-{step}"] == [sync.served_model]
    assert bytes_of(client.generate(request_of(sync)).samples) != bytes_of(base_samples)
    assert len(list((tmp_path / "weights").iterdir())) == 1
    assert said == []


@pytest.mark.parametrize("trouble", [{"refuse_load": 2}, {"lose_load": 2}], ids=str)
def test_an_adapter_is_sent_until_it_is_in_service(
    server: FakeRolloutServer, adapted: Any, tmp_path: Path, trouble: dict[str, int]
) -> None:
    client, said = client_of(server)
    sync = lora_of(client, tmp_path)
    sync.push("a-0", adapted)
    for name, value in trouble.items():
        setattr(server.trouble, name, value)
    sync.push("a-1", adapted)
    assert list(server.adapters) == ["a-1"]
    assert sum("beginning anew" in line for line in said) == 2


def test_a_push_to_a_server_that_lost_the_adapter_before_goes_through(
    server: FakeRolloutServer, adapted: Any, tmp_path: Path
) -> None:
    client, _ = client_of(server)
    sync = lora_of(client, tmp_path)
    sync.push("a-0", adapted)
    server.restart()
    sync.push("a-1", adapted)
    assert list(server.adapters) == ["a-1"]


def test_an_adapter_that_vanishes_between_listing_and_unloading_is_no_trouble(
    server: FakeRolloutServer, adapted: Any, tmp_path: Path
) -> None:
    client, _ = client_of(server)
    sync = lora_of(client, tmp_path)
    sync.push("a-0", adapted)
    listed = sync._names
    del server.adapters["a-0"]
    stale = iter([{BASE, "a-0"}])
    sync._names = lambda: next(stale, None) or listed()  # type: ignore[method-assign]
    sync.push("a-1", adapted)
    assert list(server.adapters) == ["a-1"]


def test_a_resumed_run_finds_its_later_adapters_and_leaves_those_of_others(
    server: FakeRolloutServer, adapted: Any, tmp_path: Path
) -> None:
    client, _ = client_of(server)
    lora_of(client, tmp_path / "other").push("ab-000001", adapted)
    lora_of(client, tmp_path).push("a-000057", adapted)
    resumed = lora_of(client, tmp_path)
    resumed.push("a-000050", adapted)
    assert list(server.adapters) == ["ab-000001", "a-000050"]
    resumed.push("a-000057", adapted)
    assert list(server.adapters) == ["ab-000001", "a-000057"]


def test_an_adapter_comes_from_a_folder_of_its_own_even_under_an_old_name(
    server: FakeRolloutServer, adapted: Any, tmp_path: Path
) -> None:
    """vLLM tells cached prefixes apart by name and path of the adapter."""
    client, _ = client_of(server)
    paths = []
    for _ in range(2):
        sync = lora_of(client, tmp_path)
        sync.push("a-000057", adapted)
        paths.append(sync._path)
    assert paths[0] != paths[1]


def test_a_restarted_server_gets_its_adapter_again_before_it_samples(
    server: FakeRolloutServer, adapted: Any, tmp_path: Path
) -> None:
    client, said = client_of(server)
    sync = lora_of(client, tmp_path)
    sync.push("a-1", adapted)
    before = client.generate(request_of(sync))
    server.trouble.restart, server.trouble.lose_load = 1, 1
    after = client.generate(request_of(sync), recover=sync.recover)
    assert bytes_of(after.samples) == bytes_of(before.samples)
    assert any("lost adapter 'a-1'" in line for line in said)


def test_a_model_that_never_comes_back_ends_with_the_servers_words(
    server: FakeRolloutServer,
) -> None:
    client, _ = client_of(server, retry_for=0.2)
    request = Request(REQUEST.prompts, REQUEST.seeds, {**REQUEST.body, "model": "nobody"})
    with pytest.raises(ServerGone, match="`nobody` does not exist"):
        client.generate(request)


def test_a_refused_adapter_leaves_the_one_before_in_service(
    server: FakeRolloutServer, adapted: Any, tmp_path: Path
) -> None:
    client, _ = client_of(server)
    sync = lora_of(client, tmp_path)
    sync.push("a-0", adapted)

    class Empty:
        def save_pretrained(self, path: Path) -> None:
            path.mkdir(parents=True)

    with pytest.raises(ServerRefused, match="--enable-lora"):
        sync.push("a-1", Empty())
    assert list(server.adapters) == ["a-0"]
    assert sync.served_model == "a-0"


# ---- NCCL: the calls around a transfer -----------------------------------------------------------


class Engine:
    """Stands for vLLM's sender: the real calls, a folder in place of the broadcast."""

    def __init__(self, routes: Any, transfer: Callable[[], Path]) -> None:
        self.routes, self.transfer = routes, transfer

    def send_weights(self) -> None:
        self.routes.start_weight_update()
        self.routes.update_weights({"path": str(self.transfer())})
        self.routes.finish_weight_update()


@pytest.fixture
def nccl(
    server: FakeRolloutServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[NcclSync, Engine]:
    """Set up as after the handshake."""
    distributed = types.ModuleType("vllm.distributed")
    distributed.weight_transfer = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    client, _ = client_of(server, retry_for=0.05)
    sync = NcclSync(client, SyncConfig(method="nccl", timeout=20.0))

    def transfer() -> Path:
        weights = named_weights(changed_model(model), torch.float32)()
        return write_weights(tmp_path / "w", weights, {"weight_version": "a-1"}, checksums=False)

    sync._engine = Engine(sync._routes, transfer)
    return sync, sync._engine


def test_a_transfer_pauses_the_server_and_wakes_it(
    server: FakeRolloutServer, nccl: tuple[NcclSync, Engine]
) -> None:
    nccl[0].push("a-1", None)
    order = [call for call in server.calls if call in ("/pause", "/update_weights", "/resume")]
    assert order == ["/pause", "/update_weights", "/resume"]
    assert (server.version, server.paused) == ("a-1", False)


def test_a_pause_whose_answer_is_lost_does_not_outlast_the_push(
    server: FakeRolloutServer, nccl: tuple[NcclSync, Engine]
) -> None:
    server.trouble.lose_pause = 10**6
    with pytest.raises(ServerGone, match="/pause answers 503"):
        nccl[0].push("a-1", None)
    assert "/pause" in server.calls
    assert not server.paused


def test_a_failure_before_the_update_wakes_the_server(
    server: FakeRolloutServer, nccl: tuple[NcclSync, Engine]
) -> None:
    server._started = True  # somebody else's update: ours is refused
    with pytest.raises(ServerRefused, match="under way"):
        nccl[0].push("a-1", None)
    assert not server.paused


@pytest.mark.parametrize("where", ["transfer", "finish"])
def test_a_server_whose_layers_are_apart_is_not_woken(
    server: FakeRolloutServer, nccl: tuple[NcclSync, Engine], where: str
) -> None:
    sync, engine = nccl

    def broken() -> Path:
        raise RuntimeError("NCCL error")

    if where == "transfer":
        engine.transfer = broken
    else:
        server.trouble.lose_finish = 1
    with pytest.raises(ServerGone, match="restart the server"):
        sync.push("a-1", None)
    assert server.paused
    assert "/resume" not in server.calls
