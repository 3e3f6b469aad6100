"""Wrong requests: each has a status 4xx and a message that helps, streamed or not, and the server
answers the next one."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest
from server_host import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    MODEL,
    PROMPT,
    ROLLOUTS,
    SHORT,
    Server,
    chat_body,
    completion_body,
    rollout_body,
)

pytestmark = pytest.mark.engine

LONG_PROMPT = "one two three " * 400
HUGE = 10**30

COT: dict[str, tuple[Any, str]] = {
    # cot object -> part of the message; sent to all three routes
    "unknown field": ({"temprature": 1}, "temprature"),
    "unknown mode": ({"mode": "liquid"}, "liquid"),
    "mode of another type": ({"mode": 5}, "cot.mode"),
    "no object": ("soft", "cot"),
    "a list": ([], "cot"),
    "a number": (3, "cot"),
    "tau of zero": ({"temperature": 0}, "cot.temperature"),
    "negative tau": ({"temperature": -1}, "cot.temperature"),
    "tau too large": ({"temperature": 101}, "100"),
    "tau as text": ({"temperature": "0.5"}, "cot.temperature"),
    "tau as list": ({"temperature": [0.5]}, "cot.temperature"),
    "negative top_k": ({"top_k": -1}, "cot.top_k"),
    "top_k too large": ({"top_k": 1025}, "1024"),
    "top_k as fraction": ({"top_k": 1.5}, "cot.top_k"),
    "top_k as bool": ({"top_k": True}, "cot.top_k"),
    "top_p of zero": ({"top_p": 0}, "cot.top_p"),
    "top_p above one": ({"top_p": 1.01}, "cot.top_p"),
    "min_p of one": ({"min_p": 1}, "cot.min_p"),
    "unknown noise": ({"noise": "uniform"}, "cot.noise"),
    "negative noise": ({"noise_scale": -0.1}, "cot.noise_scale"),
    "noise too large": ({"noise_scale": 1e9}, "cot.noise_scale"),
    "no noise, scaled": ({"noise": "none", "noise_scale": 0.3}, "cot.noise_scale"),
    "negative budget": ({"max_think_tokens": -1}, "cot.max_think_tokens"),
    "budget without an answer": ({"max_think_tokens": 400}, "max_tokens"),
    "huge budget": ({"max_think_tokens": HUGE}, "cot.max_think_tokens"),
    "more than the budget": ({"min_think_tokens": 9, "max_think_tokens": 8}, "cot.min_think"),
    "empty end string": ({"end_strings": [""]}, "cot.end_strings"),
    "end string no list": ({"end_strings": "stop"}, "cot.end_strings"),
    "end strings of numbers": ({"end_strings": [1]}, "cot.end_strings"),
    "too many end strings": ({"end_strings": [f"x{i}" for i in range(33)]}, "32"),
    "end string too long": ({"end_strings": ["word " * 200]}, "256"),
    "negative end id": ({"end_token_ids": [[-1]]}, "cot.end_token_ids"),
    "end id out of vocabulary": ({"end_token_ids": [[509]]}, "vocabulary"),
    "empty end ids": ({"end_token_ids": [[]]}, "cot.end_token_ids"),
    "flat end ids": ({"end_token_ids": [5]}, "cot.end_token_ids"),
    "forced text too long": ({"force_after_cut": "x" * 300}, "256"),
    "forced ids out of vocabulary": ({"force_after_cut": [600]}, "vocabulary"),
    "forced stop token": ({"force_after_cut": [1]}, "force_after_cut"),
    "forced text of a number": ({"force_after_end": 5}, "cot.force_after_end"),
    "cold stop of zero": ({"cold_stop_entropy": 0}, "cot.cold_stop_entropy"),
    "cold stop without steps": ({"cold_stop_steps": 0}, "cot.cold_stop_steps"),
    "policy in mode soft": ({"policy": "blend"}, "cot.policy"),
    "unknown policy": ({"mode": "mixed", "policy": "nope"}, "nope"),
    "unknown policy parameter": ({"mode": "mixed", "policy_params": {"x": 1}}, "x"),
    "policy parameter as text": (
        {"mode": "mixed", "policy_params": {"weight": "1"}},
        "policy_params",
    ),
    "policy parameter out of range": ({"mode": "mixed", "policy_params": {"weight": 2}}, "weight"),
    "policy parameters missing": ({"mode": "mixed", "policy": "entropy"}, "low"),
    "unknown record": ({"record": "all"}, "cot.record"),
    "sparse without top_k": ({"record": "sparse"}, "top_k"),
    "dense in mode hard": ({"mode": "hard", "record": "dense"}, "cot.record"),
    "noise in mode hard": ({"mode": "hard", "noise": "gaussian"}, "cot.noise"),
    "record_top of zero": ({"record": "top", "record_top": 0}, "cot.record_top"),
    "record_top too large": ({"record": "top", "record_top": 65}, "64"),
    "greedy as number": ({"answer_greedy": 1}, "cot.answer_greedy"),
    "no answer": ({"answer_max_tokens": 0}, "cot.answer_max_tokens"),
}
SEEDS: dict[str, tuple[Any, str]] = {
    "negative seed": ({"seed": -1}, "cot.seed"),
    "seed too large": ({"seed": 2**53}, "cot.seed"),
    "seed as text": ({"seed": "7"}, "cot.seed"),
}
"""Rollouts derive the seeds themselves and refuse any `cot.seed`."""


def refused(answer: httpx.Response, part: str) -> None:
    assert 400 <= answer.status_code < 500, f"{answer.status_code}: {answer.text}"
    message = json.dumps(answer.json(), ensure_ascii=False)
    assert part in message, message
    assert len(message) < 3000, "a message, not a dump"
    assert "Traceback" not in message


def short(cot: Any) -> Any:
    """The case's fields in an otherwise good object: one mistake at a time."""
    return {**SHORT, **cot} if isinstance(cot, dict) else cot


BODIES = {CHAT: chat_body, COMPLETIONS: completion_body, ROLLOUTS: rollout_body}


@pytest.mark.parametrize("name", COT)
@pytest.mark.parametrize("path", BODIES)
def test_a_wrong_cot_object_is_refused(server: Server, path: str, name: str) -> None:
    cot, part = COT[name]
    cot = short(cot)
    answer = server.post(path, BODIES[path](cot=cot))
    refused(answer, part)
    assert answer.status_code == 400


@pytest.mark.parametrize("name", {**COT, **SEEDS})
def test_a_wrong_stream_is_a_status_and_no_event(server: Server, name: str) -> None:
    cot, part = {**COT, **SEEDS}[name]
    cot = short(cot)
    for path, make in ((CHAT, chat_body), (COMPLETIONS, completion_body)):
        answer = server.post(path, make(cot=cot, stream=True))
        assert answer.status_code == 400
        assert answer.headers["content-type"] == "application/json"
        refused(answer, part)


CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown mode": ({"cot_mode": "liquid"}, "cot_mode"),
    "mode in capitals": ({"cot_mode": "SOFT"}, "cot_mode"),
    "mode as number": ({"cot_mode": 1}, "cot_mode"),
    "mode as object": ({"cot_mode": {"mode": "soft"}}, "cot_mode"),
    "two modes": ({"cot_mode": "soft", "cot": {"mode": "hard"}}, "cot_mode"),
    "mode hard with noise": ({"cot_mode": "hard", "cot": {"noise_scale": 1}}, "noise"),
    "wrong model": ({"cot_mode": "soft", "model": "gpt-9"}, "gpt-9"),
    "prompt too long": ({"cot_mode": "soft", "messages": None}, "512"),
    "max_tokens too large": ({"cot_mode": "soft", "max_tokens": 10**6}, "max"),
    "max_tokens of zero": ({"cot_mode": "soft", "max_tokens": 0}, "max_tokens"),
    "max_tokens too small to think": ({"cot_mode": "soft", "max_tokens": 5}, "max_tokens"),
    "negative max_tokens": ({"cot_mode": "soft", "max_tokens": -1}, "max_tokens"),
    "huge max_tokens": ({"cot_mode": "soft", "max_tokens": HUGE}, "max_tokens"),
    "n of zero": ({"cot_mode": "soft", "n": 0}, "n"),
    "huge n": ({"cot_mode": "soft", "n": 10**9, "temperature": 1}, "n"),
    "several greedy samples": ({"cot_mode": "soft", "n": 2}, "n must be 1"),
    "negative temperature": ({"cot_mode": "soft", "temperature": -1}, "temperature"),
    "temperature as text": ({"cot_mode": "soft", "temperature": "hot"}, "temperature"),
    "top_p above one": ({"cot_mode": "soft", "top_p": 2}, "top_p"),
    "too many log-probs": (
        {"cot_mode": "soft", "logprobs": True, "top_logprobs": 999},
        "logprobs",
    ),
    "beam search": ({"cot_mode": "soft", "use_beam_search": True}, "beam"),
    "stop tokens beyond a slot": ({"cot_mode": "soft", "stop_token_ids": list(range(5, 45))}, "32"),
    "thinking budget of vLLM": ({"cot_mode": "soft", "thinking_token_budget": 5}, "thinking"),
    "no such grammar": ({"cot_mode": "soft", "structured_outputs": {"regex": "("}}, "regex"),
    "grammar without a forced token": (
        {
            "cot": {**SHORT, "force_after_cut": "", "force_after_end": ""},
            "structured_outputs": {"choice": ["a"]},
        },
        "force_after_cut",
    ),
    "unknown tool": (
        {
            "cot_mode": "soft",
            "tools": [{"type": "function", "function": {"name": "a", "parameters": {}}}],
            "tool_choice": {"type": "function", "function": {"name": "b"}},
        },
        "tool",
    ),
    "vLLM's own way in": ({"vllm_xargs": {"_softvllm": "1"}, "cot_mode": "soft"}, ""),
    "lone surrogate as stop": ({"cot_mode": "soft", "stop": "\ud800"}, "stop"),
    "lone surrogate as bad word": ({"cot_mode": "soft", "bad_words": ["\ud800"]}, "bad_words"),
    "lone surrogate as id": ({"cot_mode": "soft", "request_id": "\ud800"}, "request_id"),
    "huge stop token": ({"cot_mode": "soft", "stop_token_ids": [HUGE]}, "stop_token_ids"),
    "tiny repetition": ({"cot_mode": "soft", "repetition_penalty": 1e-320}, "repetition_penalty"),
    "lone surrogate": ({"cot": {"end_strings": ["\ud800"]}}, "end_strings"),
    "lone surrogate forced": ({"cot": {"force_after_cut": "\udfff"}}, "force_after_cut"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_a_wrong_chat_is_refused(server: Server, name: str, stream: bool) -> None:
    fields, part = CHATS[name]
    if name == "prompt too long":
        fields = {**fields, "messages": [{"role": "user", "content": LONG_PROMPT}]}
    body = json.dumps(chat_body(**{"cot": SHORT, **fields}, stream=stream))
    answer = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    if name == "vLLM's own way in":
        # An unknown extra argument is vLLM's business; it must not reach our layer.
        assert answer.status_code in (200, 400), answer.text
        return
    refused(answer, part)


COMPLETION_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown mode": ({"cot_mode": "liquid"}, "cot_mode"),
    "wrong model": ({"cot_mode": "soft", "model": "gpt-9"}, "gpt-9"),
    "prompt too long": ({"cot_mode": "soft", "prompt": LONG_PROMPT}, "512"),
    "no prompt": ({"cot_mode": "soft", "prompt": None}, "prompt"),
    "id out of vocabulary": ({"cot_mode": "soft", "prompt": [509 * 3]}, "vocab"),
    "negative id": ({"cot_mode": "soft", "prompt": [-5]}, ""),
    "huge id": ({"cot_mode": "soft", "prompt": [HUGE]}, ""),
    "prompt of another type": ({"cot_mode": "soft", "prompt": {"a": 1}}, "prompt"),
    "beam search": ({"cot_mode": "soft", "use_beam_search": True}, "beam"),
    "prompt embeds": ({"cot_mode": "soft", "prompt_embeds": "!!notbase64!!"}, "prompt_embeds"),
    "prompt embeds alone": (
        {"cot_mode": "soft", "prompt": None, "prompt_embeds": "AAAA"},
        "prompt_embeds",
    ),
    "echo without room": ({"cot_mode": "soft", "echo": True, "max_tokens": 0}, "max_tokens"),
    "several prompts, one too long": ({"cot_mode": "soft", "prompt": ["a", LONG_PROMPT]}, "512"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", COMPLETION_CASES)
def test_a_wrong_completion_is_refused(server: Server, name: str, stream: bool) -> None:
    fields, part = COMPLETION_CASES[name]
    refused(
        server.post(COMPLETIONS, completion_body(**{"cot": SHORT, **fields}, stream=stream)), part
    )


ROLLOUT_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"promtps": []}, "promtps"),
    "unknown mode": ({"cot_mode": "liquid"}, "cot_mode"),
    "a seed in cot": ({"cot": {**SHORT, "seed": 5}}, "seed"),
    "wrong model": ({"model": "gpt-9"}, "gpt-9"),
    "no prompts": ({"prompts": []}, "prompts"),
    "prompts of another type": ({"prompts": "Hi"}, "prompts"),
    "prompt as text": ({"prompts": ["Hi"]}, "prompts.0"),
    "empty prompt object": ({"prompts": [{}]}, "exactly one"),
    "two kinds of prompt": (
        {"prompts": [{"prompt": "a", "prompt_token_ids": [5]}]},
        "exactly one",
    ),
    "unknown kind of prompt": ({"prompts": [{"text": "a"}]}, "text"),
    "empty text": ({"prompts": [{"prompt": ""}]}, "empty"),
    "empty ids": ({"prompts": [{"prompt_token_ids": []}]}, "empty"),
    "empty messages": ({"prompts": [{"messages": []}]}, ""),
    "messages of another type": ({"prompts": [{"messages": ["Hi"]}]}, "messages"),
    "messages without role": ({"prompts": [{"messages": [{"content": "Hi"}]}]}, "role"),
    "messages with a number": (
        {"prompts": [{"messages": [{"role": "user", "content": 5}]}]},
        "",
    ),
    "second prompt is wrong": ({"prompts": [{"prompt": "a"}, {"prompt": ""}]}, "empty"),
    "ids as text": ({"prompts": [{"prompt_token_ids": ["5"]}]}, "prompt_token_ids"),
    "ids as bools": ({"prompts": [{"prompt_token_ids": [True]}]}, "prompt_token_ids"),
    "negative ids": ({"prompts": [{"prompt_token_ids": [-1]}]}, "prompt_token_ids"),
    "ids out of vocabulary": ({"prompts": [{"prompt_token_ids": [509]}]}, "509"),
    "huge ids": ({"prompts": [{"prompt_token_ids": [HUGE]}]}, "prompt_token_ids"),
    "prompt too long": ({"prompts": [{"prompt": LONG_PROMPT}]}, "512"),
    "prompt of all the room": ({"prompts": [{"prompt_token_ids": [60] * 512}]}, ""),
    "n of zero": ({"n": 0}, "n"),
    "n too large": ({"n": 1025}, "1024"),
    "n as text": ({"n": "2"}, "n"),
    "too many prompts": ({"prompts": [{"prompt": "a"}] * 4097}, "4096"),
    "too many samples": ({"prompts": [{"prompt": "a"}] * 100, "n": 1000}, "65536"),
    "negative seed": ({"seed": -1}, "seed"),
    "seed too large": ({"seed": 2**53}, "seed"),
    "seed and seeds": ({"seed": 1, "seeds": [[1]]}, "not both"),
    "seeds of the wrong shape": ({"seeds": [[1, 2]]}, "seeds"),
    "seeds for other prompts": ({"seeds": [[1], [2]]}, "seeds"),
    "seeds out of range": ({"seeds": [[2**53]]}, "seeds"),
    "unknown sampling": ({"sampling": {"temprature": 1}}, "temprature"),
    "negative temperature": ({"sampling": {"temperature": -1}}, "temperature"),
    "top_p of zero": ({"sampling": {"top_p": 0}}, "top_p"),
    "negative top_k": ({"sampling": {"top_k": -5}}, "top_k"),
    "max_tokens of zero": ({"sampling": {"max_tokens": 0}}, "max_tokens"),
    "negative max_tokens": ({"sampling": {"max_tokens": -3}}, "max_tokens"),
    "max_tokens too small to think": ({"sampling": {"max_tokens": 4}}, "max_tokens"),
    "min above max": ({"sampling": {"min_tokens": 99}}, "min_tokens"),
    "lone surrogate as stop": ({"sampling": {"stop": ["\ud800"]}}, "stop"),
    "huge stop token": ({"sampling": {"stop_token_ids": [HUGE]}}, "stop_token_ids"),
    "empty stop": ({"sampling": {"stop": [""]}}, "stop"),
    "stop as text": ({"sampling": {"stop": "x"}}, "stop"),
    "bias of a word": ({"sampling": {"logit_bias": {"word": 1.0}}}, "logit_bias"),
    "bias that is no number": ({"sampling": {"logit_bias": {"5": float("nan")}}}, "finite"),
    "infinite bias": ({"sampling": {"logit_bias": {"5": float("inf")}}}, "finite"),
    "bias out of vocabulary": ({"sampling": {"logit_bias": {"9999": 1.0}}}, "logit_bias"),
    "no allowed tokens": ({"sampling": {"allowed_token_ids": []}}, "allowed_token_ids"),
    "allowed out of vocabulary": ({"sampling": {"allowed_token_ids": [9999]}}, "allowed_token_ids"),
    "penalty out of range": ({"sampling": {"presence_penalty": 9.0}}, "presence_penalty"),
    "bias of a huge number": ({"sampling": {"logit_bias": {str(HUGE): 1.0}}}, "logit_bias"),
    "tiny repetition": ({"sampling": {"repetition_penalty": 1e-320}}, "repetition_penalty"),
    "negative repetition": ({"sampling": {"repetition_penalty": -1.0}}, "repetition_penalty"),
    "not streamed": ({"stream": False}, "stream"),
    "lone surrogate as id": ({"request_id": "\ud800"}, "request_id"),
    "lone surrogate as prompt": ({"prompts": [{"prompt": "\ud800"}]}, ""),
    "lone surrogate as message": (
        {"prompts": [{"messages": [{"role": "user", "content": "\ud800"}]}]},
        "",
    ),
    "request_id too long": ({"request_id": "x" * 201}, "request_id"),
    "huge priority": ({"priority": HUGE}, "priority"),
    "template arguments of another type": ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
}


@pytest.mark.parametrize("name", ROLLOUT_CASES)
def test_a_wrong_rollout_is_refused_before_the_stream(server: Server, name: str) -> None:
    fields, part = ROLLOUT_CASES[name]
    body = json.dumps(rollout_body(**{"cot": SHORT, **fields}))
    headers = {"content-type": "application/json"}
    refused(server.http.post(ROLLOUTS, content=body, headers=headers), part)


GOOD = json.dumps(chat_body(cot_mode="soft", cot=SHORT))
DEEP = "[" * 100_000 + "]" * 100_000


def in_cot(value: str) -> str:
    return GOOD.replace('"max_think_tokens": 12', f'"temperature": {value}')


RAW: dict[str, tuple[str, bytes, str]] = {
    # name -> content type, body, routes' own idea of the message
    "no body": ("application/json", b"", ""),
    "broken JSON": ("application/json", GOOD[:-2].encode(), ""),
    "two objects": ("application/json", (GOOD + GOOD).encode(), ""),
    "a list": ("application/json", b"[1, 2]", ""),
    "null": ("application/json", b"null", ""),
    "a text": ("application/json", b'"soft"', ""),
    "NaN": ("application/json", in_cot("NaN").encode(), ""),
    "Infinity": ("application/json", in_cot("Infinity").encode(), ""),
    "minus Infinity": ("application/json", in_cot("-Infinity").encode(), ""),
    "1e999": ("application/json", in_cot("1e999").encode(), ""),
    "deep nesting": ("application/json", DEEP.encode(), ""),
    "deep nesting in cot": ("application/json", in_cot(DEEP).encode(), ""),
    "not UTF-8": ("application/json", b'{"model": "\xff\xfe"}', ""),
    "a number of 5000 digits": ("application/json", in_cot("1" * 5000).encode(), ""),
    "text/plain": ("text/plain", GOOD.encode(), ""),
    "no content type": ("", GOOD.encode(), ""),
    "a form": ("application/x-www-form-urlencoded", b"cot_mode=soft", ""),
    "msgpack as JSON": ("application/json", msgspec.msgpack.encode(json.loads(GOOD)), ""),
    "JSON as msgpack": ("application/msgpack", GOOD.encode(), ""),
    "broken msgpack": ("application/msgpack", b"\x81\xa3abc", ""),
    "no msgpack body": ("application/msgpack", b"", ""),
    "deep msgpack": ("application/msgpack", b"\x91" * 100_000, ""),
    "msgpack with bytes for text": (
        "application/msgpack",
        msgspec.msgpack.encode({"prompts": [{"prompt": b"a"}]}),
        "",
    ),
    "msgpack with number keys": ("application/msgpack", msgspec.msgpack.encode({1: 2}), ""),
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", RAW)
def test_a_body_that_is_none_is_refused(server: Server, path: str, name: str) -> None:
    kind, body, part = RAW[name]
    headers = {"content-type": kind} if kind else {}
    refused(server.http.post(path, content=body, headers=headers), part)


@pytest.mark.parametrize("path", BODIES)
def test_a_wrong_method_is_refused(server: Server, path: str) -> None:
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        assert server.http.request(method, path).status_code == 405
    assert server.http.post("/v1/cot/info").status_code == 405


@pytest.mark.parametrize(
    ("path", "body", "part"),
    [
        ("/update_weights", {}, "update_info"),
        ("/update_weights", {"update_info": {}}, ""),
        ("/update_weights", {"update_info": {"path": 5}}, ""),
        ("/update_weights", {"update_info": {"path": "/nowhere"}}, ""),
        ("/update_weights", [], ""),
        ("/finish_weight_update", {"weight_version": 5}, "weight_version"),
        ("/finish_weight_update", {"weight_version": "9"}, ""),
        ("/init_weight_transfer_engine", {"init_info": 5}, ""),
        ("/pause?mode=sideways", {}, "mode"),
        ("/update_weight_version", {}, ""),
        ("/weight_checker", {"action": "explode"}, ""),
    ],
)
def test_wrong_control_is_refused(server: Server, path: str, body: Any, part: str) -> None:
    refused(server.post(path, body), part)


def test_after_all_that_the_server_answers(server: Server) -> None:
    assert server.chat(cot_mode="soft", cot=SHORT)["choices"][0]["cot"]["think_tokens"] == 12
    assert server.complete()["choices"]
    _, (sample,), _ = server.rollouts(cot=SHORT)
    assert sample.trace.summary()["think_tokens"] == 12  # type: ignore[union-attr]
    held = server.settle()
    assert held == dict.fromkeys(held, 0)
    assert MODEL in server.http.get("/v1/models").text and MESSAGES and PROMPT
