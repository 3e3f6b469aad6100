"""Rollouts and weights over a server that misbehaves on demand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_rollout_server import FakeRolloutServer
from hypothesis import given
from hypothesis import strategies as st
from rl_fixtures import fake_server, short_waits, tiny_model
from trainer_rollouts import single_thread
from transformers import AutoModelForCausalLM

from softvllm.core.rollout import Sample
from trainer import patience, rollout_request
from trainer.config import SyncConfig
from trainer.patience import Progress
from trainer.rollout_client import (
    Key,
    Request,
    RolloutClient,
    ServerGone,
    ServerRefused,
    check_server,
)
from trainer.server_words import Later
from trainer.sync import build
from trainer.sync.folder import FolderSync

threads = pytest.fixture(single_thread, autouse=True, scope="module")
model = pytest.fixture(tiny_model, scope="module")
server = pytest.fixture(fake_server)
hurry = pytest.fixture(short_waits, autouse=True)
COT = {"max_think_tokens": 4, "answer_max_tokens": 3, "end_strings": []}
REQUEST = Request(
    prompts=[[5, 6, 7], [8, 9]],
    seeds=[[1, 2, 3], [4, 5, 6]],
    body={"cot_mode": "soft", "cot": COT, "sampling": {"temperature": 1.0}},
)


def client_of(server: FakeRolloutServer, **asked: Any) -> tuple[RolloutClient, list[str]]:
    said: list[str] = []
    return RolloutClient(server.url, **{"retry_for": 20.0, "say": said.append, **asked}), said


def bytes_of(samples: dict[Key, Sample]) -> dict[Key, bytes]:
    return {key: sample.trace_bytes for key, sample in samples.items()}


def test_each_sample_arrives_once_and_as_asked(server: FakeRolloutServer) -> None:
    client, said = client_of(server)
    seen: list[Key] = []
    got = client.generate(REQUEST, lambda key, sample: seen.append(key))
    assert sorted(seen) == sorted(got.samples) == [(i, k) for i in range(2) for k in range(3)]
    assert got.samples[1, 2].trace.meta["seed"] == 6
    assert (got.attempts, said) == (1, [])


@pytest.mark.parametrize("trouble", [{}, {"cut": [2, 1]}], ids=str)
def test_more_than_one_request_holds_goes_out_in_pieces(
    server: FakeRolloutServer, monkeypatch: Any, trouble: dict[str, Any]
) -> None:
    undisturbed = client_of(server)[0].generate(REQUEST)
    sent: list[rollout_request.Piece] = []

    def attempt(self: Any, request: Any, piece: rollout_request.Piece, *more: Any) -> None:
        sent.append(piece)
        plain(self, request, piece, *more)

    plain = RolloutClient._attempt
    monkeypatch.setattr(RolloutClient, "_attempt", attempt)
    monkeypatch.setattr(rollout_request, "MAX_TOTAL", 3)  # a prompt's three samples
    monkeypatch.setattr(rollout_request, "MAX_PROMPTS", 2)
    for name, value in trouble.items():
        setattr(server.trouble, name, value)
    got = client_of(server)[0].generate(REQUEST)
    assert bytes_of(got.samples) == bytes_of(undisturbed.samples)
    assert got.attempts == len(sent) > 1
    for piece in sent:
        assert sum(map(len, piece.seeds)) <= 3 and len(piece.prompts) <= 2


@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    drop=st.sets(st.integers(0, 40)),
    limits=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(6, 20)),
)
def test_pieces_hold_every_missing_sample_once_within_the_servers_limits(
    widths: list[int], drop: set[int], limits: tuple[int, int, int]
) -> None:
    prompts, samples, total = limits
    seeds, at = [], 0
    for width in widths:
        seeds.append(list(range(at, at + width)))
        at += width
    request = Request([[i] for i in range(len(widths))], seeds, {})
    everything = [(i, k) for i, row in enumerate(seeds) for k in range(len(row))]
    missing = [key for number, key in enumerate(everything) if number not in drop]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PROMPTS", prompts), ("SAMPLES", samples), ("TOTAL", total)):
            patch.setattr(rollout_request, f"MAX_{name}", value)
        found = list(rollout_request.pieces(request, missing)) if missing else []
    asked = []
    for piece in found:
        assert len({len(row) for row in piece.seeds}) == 1  # the server takes one n
        assert 1 <= len(piece.prompts) == len(piece.seeds) <= prompts
        assert len(piece.seeds[0]) <= samples and sum(map(len, piece.seeds)) <= max(total, prompts)
        for (i, k), (prompt, sample) in piece.keys.items():
            assert piece.prompts[i] == [prompt] and piece.seeds[i][k] == seeds[prompt][sample]
            asked.append((prompt, sample))
    assert sorted(asked) == missing


@pytest.mark.parametrize(
    "trouble",
    [
        {"unavailable": 2},
        {"cut": [4, 0, 1]},
        {"fail": {(0, 1): "engine", (1, 1): "aborted"}},
        {"silent": 1},
    ],
    ids=str,
)
def test_a_repaired_batch_is_the_undisturbed_one_and_nothing_comes_twice(
    server: FakeRolloutServer, trouble: dict[str, Any]
) -> None:
    client, _ = client_of(server, timeout=4.0)
    undisturbed = client.generate(REQUEST)
    for name, value in trouble.items():
        setattr(server.trouble, name, value)
    client, said = client_of(server, timeout=4.0)
    seen: list[Key] = []
    repaired = client.generate(REQUEST, lambda key, sample: seen.append(key))
    assert bytes_of(repaired.samples) == bytes_of(undisturbed.samples)
    assert len(seen) == len(set(seen)) == 6
    assert repaired.attempts > 1
    assert all("trying again" in line for line in said)


def test_what_arrived_before_a_cut_is_not_asked_for_again(server: FakeRolloutServer) -> None:
    server.trouble.cut = [4]
    client, _ = client_of(server)
    client.generate(REQUEST)
    seeds = [seed for seed, _ in server.samples_sent]
    assert sorted(seeds) == [1, 2, 3, 4, 5, 6]


def test_a_sample_of_nan_is_given_up_and_a_stubborn_one_after_a_few_tries(
    server: FakeRolloutServer,
) -> None:
    server.trouble.fail = {(0, 0): "nan"}
    client, _ = client_of(server)
    got = client.generate(REQUEST)
    assert {key: failure.code for key, failure in got.failures.items()} == {(0, 0): "nan"}
    assert len(got.samples) == 5


def test_a_sample_that_names_no_weights_is_refused_where_weights_were_asked_for(
    server: FakeRolloutServer,
) -> None:
    server.trouble.no_versions = True
    client, _ = client_of(server)
    assert len(client.generate(REQUEST).samples) == 6
    request = Request(REQUEST.prompts, REQUEST.seeds, REQUEST.body, "default")
    with pytest.raises(ValueError, match="does not say which weights made it, wanted 'default'"):
        client.generate(request)
    server.trouble.no_versions = False
    assert len(client.generate(request).samples) == 6


def test_patience_ends_with_the_servers_words(server: FakeRolloutServer) -> None:
    server.trouble.unavailable = 10**6
    client, _ = client_of(server, retry_for=0.2)
    with pytest.raises(ServerGone, match=r"503 \(engine_paused\); 0 of 6 samples are here"):
        client.generate(REQUEST)


def clock_of(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of the module `time`: nobody waits, and a test says what takes how long."""
    clock = SimpleNamespace(now=1000.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    clock.monotonic, clock.sleep = lambda: clock.now, sleep
    monkeypatch.setattr(patience, "time", clock)
    return clock


def stalls(monkeypatch: pytest.MonkeyPatch, *silences: Callable[[], None]) -> None:
    """The first attempts hear nothing; each does what `silences` says meanwhile."""
    left, plain = list(silences), RolloutClient._attempt

    def attempt(self: RolloutClient, *given: Any) -> None:
        if left:
            left.pop(0)()
            raise Later("silence")
        plain(self, *given)

    monkeypatch.setattr(RolloutClient, "_attempt", attempt)


def test_patience_does_not_count_the_wait_for_the_first_failure(
    server: FakeRolloutServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = clock_of(monkeypatch)

    def lost() -> None:
        clock.now += 600  # the default timeout, twice the default patience

    stalls(monkeypatch, lost)
    client, said = client_of(server, retry_for=300.0)
    assert len(client.generate(REQUEST).samples) == 6
    assert [line.partition("for ")[2] for line in said] == ["300 s more"]
    stalls(monkeypatch, lost, lost)  # and the second one finds it spent
    with pytest.raises(ServerGone, match="silence; 0 of 6"):
        client.generate(REQUEST)


def test_samples_of_other_requests_renew_patience_and_own_ones_too(
    server: FakeRolloutServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = clock_of(monkeypatch)
    shared = Progress()

    def overtaken() -> None:
        clock.now += 600
        shared.made()
        clock.now += 600

    stalls(monkeypatch, *[overtaken] * 5)
    client, _ = client_of(server, retry_for=300.0)
    before, clock.now = shared.last, clock.now + 1
    assert len(client.generate(REQUEST, progress=shared).samples) == 6
    assert shared.last > before + 5 * 1200  # by this request's own samples
    stalls(monkeypatch, *[overtaken] * 5)
    with pytest.raises(ServerGone):
        client.generate(REQUEST)


def test_a_wrong_request_is_refused_at_once(server: FakeRolloutServer) -> None:
    client, said = client_of(server)
    with pytest.raises(ServerRefused, match="does not exist"):
        client.call("GET", "/nowhere", retry=True)
    assert said == []


def test_an_absent_server_is_named() -> None:
    client = RolloutClient("http://127.0.0.1:9", retry_for=0.1, say=lambda line: None)
    with pytest.raises(ServerGone, match=r"127\.0\.0\.1:9"):
        client.info()
    with pytest.raises(ValueError, match="http://"):
        RolloutClient("localhost:8000")


@pytest.mark.parametrize(
    "url",
    ["http://localhost:abc", "http://", "http:///x", "http://[::1", "http://a b", "http://a:99999"],
)
def test_what_is_no_address_of_a_server_is_refused_with_the_option_that_gave_it(url: str) -> None:
    with pytest.raises(ValueError, match="--rollout-url") as raised:
        RolloutClient(url)
    assert url in str(raised.value) and "must begin" not in str(raised.value)


@pytest.mark.parametrize(
    "place", ["127.0.0.1:9", "127.0.0.1:abc", "", "[::1", "127.0.0.1:9/hunt@r2"], ids=repr
)
@pytest.mark.parametrize("password", ["hunter2", "hunter2/x", "hunter2#", "hun:ter2@@"])
def test_a_password_in_the_url_is_never_shown(place: str, password: str) -> None:
    said: list[str] = []
    with pytest.raises((ServerGone, ValueError)) as raised:
        client = RolloutClient(f"http://me:{password}@{place}", retry_for=0.05, say=said.append)
        client.info()
    for words in (str(raised.value), *said):
        assert "hunt" not in words.replace("hunt@r2", "") and "me:" not in words
        assert password not in words


def test_a_user_in_the_url_still_reaches_the_server(server: FakeRolloutServer) -> None:
    host = server.url.removeprefix("http://")
    client = RolloutClient(f"http://me:hunter2@{host}/v1/")
    assert client.info()["enable_rl"]
    assert client.url == server.url


def test_a_key_from_a_file_loses_its_line_break(server: FakeRolloutServer) -> None:
    client, said = client_of(server, api_key=" sk-very-secret\r\n")
    assert client.info()["enable_rl"] and said == []
    assert client._http.headers["authorization"] == "Bearer sk-very-secret"
    assert "authorization" not in client_of(server, api_key="\n")[0]._http.headers


@pytest.mark.parametrize("key", ["sk-se\ncret", "schlüssel", "sk-\x00", "sk-\x7f"], ids=repr)
def test_a_key_that_no_header_holds_is_refused_without_its_words(key: str) -> None:
    with pytest.raises(ValueError, match="SOFTVLLM_API_KEY") as raised:
        RolloutClient("http://127.0.0.1:9", api_key=key)
    assert key not in str(raised.value) and "sk-" not in str(raised.value)


def test_a_request_that_is_no_http_is_sent_once_and_not_quoted(server: FakeRolloutServer) -> None:
    client, said = client_of(server)
    client._http.headers["x-key"] = "sk-very-secret\n"
    for ask in (client.info, lambda: client.generate(REQUEST)):
        with pytest.raises(ServerRefused, match="not valid HTTP") as raised:
            ask()
        assert "secret" not in str(raised.value)
    assert said == []


def test_a_server_of_another_model_or_without_the_mode_does_not_fit(
    server: FakeRolloutServer,
) -> None:
    server.trouble.modes = ("hard",)
    info = client_of(server)[0].info()
    found = " ".join(check_server(info, mode="soft", dim=4096, vocab_size=509))
    assert "no mode 'soft'" in found
    assert "hidden size is 64, the trainer's 4096" in found
    assert "vocabulary" not in found


# ---- weights -------------------------------------------------------------------------------------


def sync_of(client: RolloutClient, folder: Path) -> FolderSync:
    sync = build(SyncConfig(), client, folder)
    assert isinstance(sync, FolderSync)
    return sync


def changed_model(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    return model


def test_pushed_weights_are_those_that_sample(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    client, _ = client_of(server)
    sync = sync_of(client, tmp_path)
    new = changed_model(model)
    sync.push("a-1", new)
    assert torch.equal(server.oracle.table, new.get_input_embeddings().weight)
    sync.push("a-2", new)
    assert server.versions == ["a-1", "a-2"]
    assert not server.paused
    assert "/pause" not in server.calls  # a trainer killed before /resume would leave it paused
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["a-2"]


def test_a_refused_folder_leaves_the_server_awake_and_says_why(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    client, _ = client_of(server)
    server.trouble.refuse_weights = "tensor x has the wrong shape"
    sync = sync_of(client, tmp_path)
    with pytest.raises(ServerRefused, match="wrong shape"):
        sync.push("a-1", changed_model(model))
    assert not server.paused
    sync.push("a-2", changed_model(model))
    assert server.version == "a-2"


def test_a_push_wakes_a_server_that_was_left_paused(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    client, _ = client_of(server)
    server.paused, server.trouble.lose_resume = True, 2
    sync_of(client, tmp_path).push("a-1", changed_model(model))
    assert not server.paused and server.trouble.lose_resume == 0
    assert server.version == "a-1"


def test_an_update_whose_answer_was_lost_is_sent_again(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    client, said = client_of(server)
    server.trouble.lose_finish = 1
    sync_of(client, tmp_path).push("a-1", changed_model(model))
    assert server.versions == ["a-1", "a-1"]
    assert any("beginning anew" in line for line in said)


def test_another_version_in_service_is_noticed(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    client, _ = client_of(server)
    server.trouble.wrong_version = True
    with pytest.raises(ServerRefused, match="another trainer"):
        sync_of(client, tmp_path).push("a-1", changed_model(model))


def test_a_restarted_server_gets_its_weights_again_before_it_samples(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    client, said = client_of(server)
    sync = sync_of(client, tmp_path)
    sync.push("a-1", changed_model(model))
    request = Request(REQUEST.prompts, REQUEST.seeds, REQUEST.body, "a-1")
    before = client.generate(request)
    server.trouble.restart = 1
    after = client.generate(request, recover=sync.recover)
    assert bytes_of(after.samples) == bytes_of(before.samples)
    assert server.versions == ["a-1", "a-1"]
    assert any("lost weights" in line for line in said)


def test_a_paused_server_is_woken(server: FakeRolloutServer, model: Path, tmp_path: Path) -> None:
    client, _ = client_of(server)
    sync = sync_of(client, tmp_path)
    sync.push("a-1", changed_model(model))
    server.paused = True  # somebody's /pause without a /resume
    assert len(client.generate(REQUEST, recover=sync.recover).samples) == 6


def test_nccl_without_a_gpu_or_vllm_is_refused_with_the_alternative(
    server: FakeRolloutServer, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    client, _ = client_of(server)
    with pytest.raises(ValueError, match="safetensors"):
        build(SyncConfig(method="nccl"), client, tmp_path)
