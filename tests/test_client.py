"""`SoftClient` and `AsyncSoftClient` against a server that speaks the wire without a model."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fake_server import FakeServer
from fake_thoughts import FORCED, MODEL
from hypothesis import given
from hypothesis import strategies as st

from clients import (
    AccessDenied,
    AsyncSoftClient,
    BadAnswer,
    ContentDelta,
    CoTRequestRefused,
    Done,
    NotASoftServer,
    ReasoningDelta,
    RequestRefused,
    SampleFailed,
    ServerFailed,
    ServerTimeout,
    ServerUnreachable,
    SoftClient,
    StreamCut,
    ThinkStepEvent,
)
from clients.connection import clean_url
from clients.errors import from_status
from clients.reading import StreamReader
from clients.request import cot_fields
from softvllm import CoTParams
from softvllm.core.noise import derive_seed
from softvllm.core.rollout import Failure, Sample

TOP = {"mode": "soft", "record": "top", "record_top": 3}
CHAT, COMPLETION, ROLLOUTS = "/v1/chat/completions", "/v1/completions", "/v1/rollouts"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[SoftClient]:
    with SoftClient(server.url, timeout=30) as made:
        yield made


# ---- chats and completions ----------------------------------------------------------------------


def test_a_chat_comes_back_with_reasoning_answer_and_typed_cot_block(client: SoftClient) -> None:
    reply = client.chat("What is 7 plus 5?", cot="soft")
    assert reply.content.startswith(FORCED) and reply.finish_reason == "stop"
    assert reply.cot is not None and reply.reasoning
    assert (reply.cot.mode, reply.cot.think_tokens, reply.cot.end_cause) == ("soft", 4, "budget")
    assert reply.cot.sigma == pytest.approx(0.33 * 0.125)
    assert reply.usage is not None and reply.usage.completion_tokens_details is not None
    assert reply.usage.completion_tokens_details.reasoning_tokens == 4
    assert isinstance(reply.raw, openai.types.chat.ChatCompletion)


def test_a_text_is_one_user_message_and_openai_arguments_pass_through(
    server: FakeServer, client: SoftClient
) -> None:
    client.chat("Hi", cot="fuzzy", temperature=0.7, max_tokens=99, extra_body={"top_k": 5})
    (body,) = server.bodies(CHAT)
    assert body == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0.7,
        "max_tokens": 99,
        "top_k": 5,
        "cot_mode": "fuzzy",
    }


def test_the_model_is_asked_for_once_and_not_at_all_if_given(server: FakeServer) -> None:
    with SoftClient(server.url) as client:
        client.chat("a")
        client.chat("b")
    assert [b["model"] for b in server.bodies(CHAT)] == [MODEL, MODEL]
    with SoftClient("http://127.0.0.1:9", model="given") as blind:
        assert blind.model_name() == "given"


def test_a_mode_fields_and_params_become_the_same_request() -> None:
    wanted = {"cot_mode": "soft", "cot": {"top_k": 8, "seed": 7}}
    assert cot_fields({"mode": "soft", "top_k": 8, "seed": 7}) == wanted
    assert cot_fields(CoTParams(mode="soft", top_k=8, seed=7)) == wanted
    assert cot_fields("soft") == {"cot_mode": "soft"}
    assert cot_fields({"top_k": 8}) == {"cot": {"top_k": 8}}, "the server's default mode"
    assert cot_fields(None) == {}
    with pytest.raises(TypeError, match="got bool"):
        cot_fields(True)  # type: ignore[arg-type]


def test_params_leave_their_defaults_to_the_servers_recipe() -> None:
    assert cot_fields(CoTParams(mode="fuzzy")) == {"cot_mode": "fuzzy", "cot": {}}
    mixed = CoTParams(mode="mixed", policy="blend", policy_params={"weight": 0.7})
    assert CoTParams.from_dict({"mode": "mixed", **cot_fields(mixed)["cot"]}) == mixed


def test_cot_fields_are_refused_in_extra_body(client: SoftClient) -> None:
    with pytest.raises(ValueError, match="extra_body must not hold cot_mode"):
        client.chat("a", cot="soft", extra_body={"cot_mode": "hard"})
    with pytest.raises(ValueError, match=r"use \.stream\(\)"):
        client.chat("a", stream=True)


def test_without_cot_a_chat_is_stock_and_has_no_block(client: SoftClient) -> None:
    for cot in (None, "hard"):
        reply = client.chat("Hi", cot=cot)
        assert reply.cot is None and not reply.reasoning
        with pytest.raises(ValueError, match="seed is not reported"):
            reply.again()


def test_steps_and_trace_come_if_asked_for(client: SoftClient) -> None:
    steps = client.chat("Hi", cot=TOP).cot
    assert steps is not None and steps.steps is not None
    assert len(steps.steps) == steps.think_tokens == 4
    assert all(step.soft and len(step.top) == 3 for step in steps.steps)
    assert steps.steps[0].top[0].token == steps.steps[0].token
    with pytest.raises(ValueError, match='"record": "trace"'):
        _ = steps.trace
    traced = client.chat("Hi", cot={"mode": "soft", "record": "trace", "seed": 5}).cot
    assert traced is not None and traced.steps is None
    assert traced.trace.meta["seed"] == 5 == traced.seed
    assert traced.trace.dense_tensor().shape == (4, 4)
    assert len(repr(traced)) < 500, "a printed reply does not flood the terminal"


@pytest.mark.parametrize("cot", ["soft", TOP, {"mode": "mixed", "policy": "interleave"}])
def test_a_sample_repeats_exactly_by_its_seed(client: SoftClient, cot: Any) -> None:
    reply = client.chat("Hi", cot=cot, n=3)
    assert len({choice.reasoning for choice in reply.choices}) > 1
    for index, choice in enumerate(reply.choices):
        same = client.repeat(reply, index)
        assert len(same.choices) == 1
        assert (same.content, same.reasoning) == (choice.content, choice.reasoning)
        assert same.cot == choice.cot
    with pytest.raises(ValueError, match="none with index 3"):
        reply.again(3)


def test_a_sample_of_the_servers_default_mode_repeats_too(server: FakeServer) -> None:
    server.behaviour.default_mode = "fuzzy"
    with SoftClient(server.url) as client:
        reply = client.chat("Hi")
        assert reply.cot is not None and reply.cot.mode == "fuzzy"
        assert client.repeat(reply).content == reply.content


def test_a_completion_is_divided_at_answer_start(client: SoftClient) -> None:
    reply = client.complete("7 plus 5 is", cot="soft", max_tokens=20)
    assert reply.content.startswith(FORCED) and reply.reasoning
    assert reply.raw.choices[0].text == reply.reasoning + reply.content
    assert client.repeat(reply).content == reply.content
    stock = client.complete("7 plus 5 is")
    assert stock.reasoning is None and stock.content


def test_one_of_several_completions_repeats_with_its_own_prompt(
    server: FakeServer, client: SoftClient
) -> None:
    prompts = ["first", "second"]
    reply = client.complete(prompts, cot="soft", n=2)
    assert [client.repeat(reply, i).content for i in range(4)] == [
        choice.content for choice in reply.choices
    ]
    sent = [body["prompt"] for body in server.bodies(COMPLETION)]
    assert sent == [prompts, "first", "first", "second", "second"]
    ids = client.complete([[1, 2], [3]], cot="soft")
    assert ids.again(1)["prompt"] == [3]
    assert client.complete([1, 2], cot="soft").again()["prompt"] == [1, 2]


# ---- streams ------------------------------------------------------------------------------------


def test_a_stream_gives_steps_text_and_at_last_the_reply(client: SoftClient) -> None:
    events = list(client.stream("Hi", cot={**TOP, "seed": 3}))
    done = events[-1]
    assert isinstance(done, Done)
    steps = tuple(e.step for e in events if isinstance(e, ThinkStepEvent))
    think = "".join(e.text for e in events if isinstance(e, ReasoningDelta))
    answer = "".join(e.text for e in events if isinstance(e, ContentDelta))
    whole = client.chat("Hi", cot={**TOP, "seed": 3})
    assert done.reply.cot == whole.cot and steps == done.reply.cot.steps  # type: ignore[union-attr]
    assert (think, answer) == (whole.reasoning, whole.content)
    assert (done.reply.reasoning, done.reply.content) == (think, answer)
    assert done.reply.usage == whole.usage
    kinds = [type(e) for e in events]
    assert kinds[:2] == [ThinkStepEvent, ReasoningDelta] and kinds[-2] is ContentDelta


def test_streams_of_several_choices_are_kept_apart(client: SoftClient) -> None:
    with client.stream("Hi", cot=TOP, n=3) as stream:
        events = list(stream)
    assert stream.reply is not None and len(stream.reply.choices) == 3
    for choice in stream.reply.choices:
        mine = [e for e in events if isinstance(e, ContentDelta) and e.index == choice.index]
        assert "".join(e.text for e in mine) == choice.content
        again = client.repeat(stream.reply, choice.index)
        assert again.content == choice.content and again.cot == choice.cot


def test_tool_calls_are_put_together() -> None:
    reader = StreamReader({"messages": "Hi"}, "http://fake")
    pieces: list[dict[str, Any]] = [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "add", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"x": 7, '}},
        {
            "index": 1,
            "id": "b",
            "type": "function",
            "function": {"name": "stop", "arguments": "{}"},
        },
        {"index": 0, "function": {"arguments": '"y": 5}'}},
    ]
    frame = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": MODEL}
    events = []
    for piece in [*pieces, None]:
        choice = {
            "index": 0,
            "delta": {"tool_calls": [piece]} if piece else {},
            "finish_reason": None if piece else "tool_calls",
        }
        chunk = openai.types.chat.ChatCompletionChunk.model_validate(frame | {"choices": [choice]})
        events += list(reader.feed(chunk))
    assert len(events) == len(pieces)
    calls = reader.finish().reply.choices[0].tool_calls
    assert [(c["id"], c["function"]["name"]) for c in calls] == [("a", "add"), ("b", "stop")]
    assert calls[0]["function"]["arguments"] == '{"x": 7, "y": 5}'


@pytest.mark.parametrize("close_by", ["close", "with", "before the first event"])
def test_closing_a_stream_hangs_up(server: FakeServer, client: SoftClient, close_by: str) -> None:
    server.behaviour.hold_after = 3
    stream = client.stream("Hi", cot="soft")
    if close_by == "with":
        with stream:
            next(stream)
    elif close_by == "close":
        next(stream)
        stream.close()
    else:
        stream.close()
    assert server.hung_up.wait(10)
    assert list(stream) == [] and stream.reply is None


@pytest.mark.parametrize("end_early", [False, True])
def test_a_cut_chat_stream_raises_after_what_arrived(
    server: FakeServer, client: SoftClient, end_early: bool
) -> None:
    server.behaviour.cut_after, server.behaviour.end_early = 3, end_early
    stream = client.stream("Hi", cot="soft")
    got = []
    with pytest.raises(StreamCut):
        for event in stream:
            got.append(event)
    assert [type(e) for e in got] == [ReasoningDelta] * 2


def test_an_error_within_a_stream_is_the_servers(server: FakeServer, client: SoftClient) -> None:
    server.behaviour.nan_after = 3
    with pytest.raises(ServerFailed, match="NaN logits") as caught:
        list(client.stream("Hi", cot="soft"))
    assert caught.value.status == 500


# ---- rollouts -----------------------------------------------------------------------------------


def test_rollouts_give_each_sample_once_with_its_trace(
    server: FakeServer, client: SoftClient
) -> None:
    prompts = ["text", [7, 8, 9], [{"role": "user", "content": "Hi"}], np.array([4, 5])]
    stream = client.rollouts(
        prompts, n=3, cot={"mode": "soft", "max_think_tokens": 6}, seed=11, sampling={"top_p": 0.9}
    )
    samples = list(stream)
    assert {(s.prompt, s.sample) for s in samples} == {(i, k) for i in range(4) for k in range(3)}
    for s in samples:
        assert isinstance(s, Sample)
        assert s.trace.meta["seed"] == derive_seed(derive_seed(11, s.prompt), s.sample)
        assert len(s.trace.soft_positions) == 6 and s.answer.startswith(FORCED)
    own = {s.prompt: s.prompt_token_ids.tolist() for s in samples if isinstance(s, Sample)}
    assert own[1] == [7, 8, 9] and own[3] == [4, 5]
    assert stream.start is not None and stream.start.weight_version == "default"
    assert stream.end is not None and stream.end.samples == 12
    (body,) = server.bodies(ROLLOUTS)
    assert body["sampling"] == {"top_p": 0.9} and "model" not in body
    assert body["prompts"] == [
        {"prompt": "text"},
        {"prompt_token_ids": [7, 8, 9]},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt_token_ids": [4, 5]},
    ]


def test_seeds_choose_each_rollout_and_numpy_numbers_are_taken(client: SoftClient) -> None:
    seeds = np.array([[2**53 - 1, 5]])
    samples = list(client.rollouts([[1]], n=2, cot="soft", seeds=seeds))  # type: ignore[arg-type]
    assert sorted(s.trace.meta["seed"] for s in samples if isinstance(s, Sample)) == [5, 2**53 - 1]
    with pytest.raises(RequestRefused, match="not both"):
        client.rollouts([[1]], seed=1, seeds=[[1]])


@pytest.mark.parametrize("end_early", [False, True])
def test_a_cut_rollout_stream_raises_and_keeps_what_was_whole(
    server: FakeServer, client: SoftClient, end_early: bool
) -> None:
    server.behaviour.cut_after, server.behaviour.end_early = 3, end_early
    got = []
    with pytest.raises(StreamCut):
        for sample in client.rollouts(["a"], n=4, cot="soft", seed=1):
            got.append(sample)
    assert len(got) == 2 and all(isinstance(s, Sample) for s in got)


def test_a_failed_sample_raises_or_is_yielded_by_choice(
    server: FakeServer, client: SoftClient
) -> None:
    server.behaviour.fail = {(0, 1)}
    ask: dict[str, Any] = {"prompts": ["a", "b"], "n": 2, "cot": "soft", "seed": 1}
    both = list(client.rollouts(**ask, errors="yield"))
    failures = [s for s in both if isinstance(s, Failure)]
    assert len(both) == 4 and [(f.prompt, f.sample, f.code) for f in failures] == [(0, 1, "nan")]
    with pytest.raises(SampleFailed, match="sample 1 of prompt 0") as caught:
        list(client.rollouts(**ask))
    assert caught.value.failure == failures[0]
    with pytest.raises(ValueError, match='"raise" or "yield"'):
        client.rollouts(**ask, errors="ignore")


def test_leaving_rollouts_early_hangs_up(server: FakeServer, client: SoftClient) -> None:
    server.behaviour.hold_after = 2
    with client.rollouts(["a"], n=4, cot="soft") as stream:
        next(stream)
    assert server.hung_up.wait(10)


def test_one_prompt_is_not_taken_for_a_list(client: SoftClient) -> None:
    with pytest.raises(TypeError, match="list of prompts"):
        client.rollouts("What is 7 plus 5?")


# ---- what goes wrong ----------------------------------------------------------------------------


def calls(client: SoftClient) -> list[Any]:
    """One call of every kind, as thunks."""
    return [
        lambda: client.chat("Hi", cot="soft"),
        lambda: list(client.stream("Hi", cot="soft")),
        lambda: client.complete("Hi", cot="soft"),
        lambda: list(client.rollouts(["Hi"], cot="soft")),
        client.info,
    ]


def test_an_absent_server_is_named_with_the_way_to_start_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with SoftClient(f"127.0.0.1:{port}/v1/", model="m") as client:
        for call in calls(client):
            with pytest.raises(ServerUnreachable, match="softvllm serve") as caught:
                call()
            assert f"http://127.0.0.1:{port}" in str(caught.value)


def test_a_refused_field_is_named(client: SoftClient) -> None:
    bad = {"mode": "soft", "top_k": -1}
    for call in (
        lambda: client.chat("Hi", cot=bad),
        lambda: client.stream("Hi", cot=bad),
        lambda: client.complete("Hi", cot=bad),
        lambda: client.rollouts(["Hi"], cot=bad),
    ):
        with pytest.raises(CoTRequestRefused) as caught:
            call()
        assert (caught.value.status, caught.value.field) == (400, "cot.top_k")
        assert caught.value.message == "cot.top_k: must be an integer in [0, 1024], got -1"


def test_a_refusal_of_another_field_is_no_cot_refusal(client: SoftClient) -> None:
    with pytest.raises(RequestRefused) as caught:
        client.chat("Hi", cot="soft", max_tokens=0)
    assert caught.value.field == "max_tokens" and not isinstance(caught.value, CoTRequestRefused)
    with pytest.raises(RequestRefused, match="does not exist"):
        client.chat("Hi", cot="soft", model="unknown")


def test_a_wrong_key_is_denied_and_the_right_one_works(server: FakeServer) -> None:
    server.behaviour.api_key = "secret"
    for key in (None, "wrong"):
        with SoftClient(server.url, key, model=MODEL) as client:
            for call in calls(client):
                with pytest.raises(AccessDenied, match="api_key"):
                    call()
    with SoftClient(server.url, "secret") as client:
        for call in calls(client):
            call()


def test_a_stock_server_is_recognised_instead_of_believed(server: FakeServer) -> None:
    server.behaviour.soft = False
    with SoftClient(server.url) as client:
        for call in calls(client):
            with pytest.raises(NotASoftServer, match="stock vLLM"):
                call()
        assert client.chat("Hi").content, "requests without a think phase work"


def test_answers_that_lost_their_blocks_are_not_believed(
    server: FakeServer, client: SoftClient
) -> None:
    server.behaviour.proxied = True
    with pytest.raises(NotASoftServer, match="without the think phase"):
        client.chat("Hi", cot={"max_think_tokens": 3})


def test_a_silent_server_times_out(server: FakeServer) -> None:
    server.behaviour.silent = True
    with SoftClient(server.url, model=MODEL, timeout=0.2) as client:
        for call in calls(client):
            with pytest.raises(ServerTimeout, match="timeout"):
                call()


def test_an_address_without_scheme_or_with_v1_is_the_same_server() -> None:
    wanted = "http://localhost:8000"
    for text in ("localhost:8000", "http://localhost:8000/", f"{wanted}/v1", f" {wanted}/v1/ "):
        assert clean_url(text) == wanted
    assert clean_url("https://host/prefix/v1") == "https://host/prefix"
    for text in ("", "ftp://host", "http://", "http://host:port"):
        with pytest.raises(ValueError, match="base_url"):
            clean_url(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
error_bodies = json_values | st.fixed_dictionaries(
    {"error": st.fixed_dictionaries({"message": st.text(), "param": json_values}) | json_values}
)


@given(status=st.integers(400, 599), body=error_bodies)
def test_any_error_body_becomes_an_exception_with_a_text(status: int, body: object) -> None:
    error = from_status(status, body, "http://fake")
    assert str(error)
    if status in (401, 403):
        assert isinstance(error, AccessDenied)
    elif status >= 500:
        assert isinstance(error, ServerFailed)
    else:
        assert isinstance(error, (RequestRefused, NotASoftServer))


def test_a_block_of_another_format_is_reported_as_such(
    server: FakeServer, client: SoftClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_cot", lambda block: {"cot": {"mode": "soft"}})
    for call in (lambda: client.chat("Hi", cot="soft"), lambda: list(client.stream("Hi", "soft"))):
        with pytest.raises(BadAnswer, match="different versions"):
            call()


def test_info_is_typed_and_tolerates_newer_fields(client: SoftClient) -> None:
    info = client.info()
    assert (info.model, info.limits.top_k, info.modes[0]) == (MODEL, 1024, "hard")


def test_the_environments_openai_key_is_not_sent(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "somebody-elses")
    server.behaviour.api_key = "somebody-elses"
    with SoftClient(server.url, model=MODEL) as client, pytest.raises(AccessDenied):
        client.chat("Hi")


def test_importing_clients_loads_neither_torch_nor_vllm() -> None:
    code = "import clients, sys; print({'torch', 'vllm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# ---- examples -----------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parent.parent / "clients" / "examples"


def run_example(server: FakeServer, *command: str) -> str:
    out = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SOFTVLLM_URL": server.url, "SOFTVLLM_API_KEY": "secret"},
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_the_example_with_the_plain_openai_client_repeats_its_answer(server: FakeServer) -> None:
    server.behaviour.api_key = "secret"
    out = run_example(server, sys.executable, str(EXAMPLES / "openai_python.py"))
    answer = out.split("answered:")[1].splitlines()[0].strip()
    assert answer.startswith(FORCED.strip()) and out.splitlines()[-1].strip() == answer
    assert out.count("entropy 0.50") == 48, "the think steps of the streamed answer"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_example_with_curl_asks_in_all_three_ways(server: FakeServer) -> None:
    server.behaviour.api_key = "secret"
    out = run_example(server, "sh", str(EXAMPLES / "curl.sh"))
    assert "data: [DONE]" in out and "bytes of frames" in out
    whole, streamed = server.bodies(CHAT)
    assert whole["cot"]["seed"] == streamed["cot"]["seed"] == 7 and streamed["stream"]
    (rollouts,) = server.bodies(ROLLOUTS)
    assert rollouts["n"] == 4 and len(rollouts["prompts"]) == 2


# ---- the async client ---------------------------------------------------------------------------


def test_the_async_client_does_the_same(server: FakeServer, client: SoftClient) -> None:
    async def run() -> None:
        cot = {**TOP, "seed": 3}
        async with AsyncSoftClient(server.url, timeout=30) as fast:
            assert await fast.model_name() == MODEL
            assert await fast.info() == client.info()
            reply = await fast.chat("Hi", cot=cot)
            wanted = client.chat("Hi", cot=cot)
            assert (reply.content, reply.cot) == (wanted.content, wanted.cot)
            assert (await fast.repeat(reply)).content == reply.content
            async with await fast.stream("Hi", cot=cot) as stream:
                events = [event async for event in stream]
            assert [type(e) for e in events] == [type(e) for e in client.stream("Hi", cot=cot)]
            assert stream.reply is not None and stream.reply.content == wanted.content
            text = await fast.complete("Hi", cot=cot)
            assert text.content == client.complete("Hi", cot=cot).content
            rollouts = await fast.rollouts(["a", "b"], n=2, cot="soft", seed=1)
            got = [s async for s in rollouts]
            same = list(client.rollouts(["a", "b"], n=2, cot="soft", seed=1))
            assert [s.trace_bytes for s in got] == [s.trace_bytes for s in same]  # type: ignore[union-attr]
            assert rollouts.end is not None and rollouts.start is not None

    asyncio.run(run())


def test_many_async_chats_run_at_once(server: FakeServer) -> None:
    async def run() -> None:
        async with AsyncSoftClient(server.url) as fast:
            cots = [{"mode": "soft", "seed": seed} for seed in range(20)]
            replies = await asyncio.gather(*(fast.chat("Hi", cot=cot) for cot in cots))
        assert [r.cot.seed for r in replies if r.cot] == list(range(20))

    asyncio.run(run())


def test_the_async_client_fails_the_same(server: FakeServer) -> None:
    async def run() -> None:
        async with AsyncSoftClient(server.url, model=MODEL, timeout=30) as fast:
            with pytest.raises(CoTRequestRefused, match="top_k"):
                await fast.chat("Hi", cot={"top_k": -1})
            with pytest.raises(CoTRequestRefused, match="top_k"):
                await fast.rollouts(["Hi"], cot={"top_k": -1})
            server.behaviour.cut_after = 2
            with pytest.raises(StreamCut):
                [e async for e in await fast.stream("Hi", cot="soft")]
            with pytest.raises(StreamCut):
                [s async for s in await fast.rollouts(["a"], n=3, cot="soft")]
            server.behaviour.cut_after, server.behaviour.fail = None, {(0, 0)}
            with pytest.raises(SampleFailed):
                [s async for s in await fast.rollouts(["a"], cot="soft")]
            server.behaviour.soft = False
            with pytest.raises(NotASoftServer):
                await fast.info()
            with pytest.raises(NotASoftServer):
                await fast.rollouts(["a"])
            server.behaviour.soft, server.behaviour.hold_after = True, 3
            for opened in (await fast.stream("Hi", cot="soft"), await fast.rollouts(["a"], n=9)):
                server.hung_up.clear()
                await anext(opened)  # type: ignore[arg-type]
                await opened.aclose()
                assert await asyncio.to_thread(server.hung_up.wait, 10)
        async with AsyncSoftClient("127.0.0.1:9", model=MODEL) as nowhere:
            with pytest.raises(ServerUnreachable):
                await nowhere.chat("Hi")

    asyncio.run(run())
