"""What stays vLLM's: hard requests, the other routes, the key."""

from __future__ import annotations

import json
from typing import Any

import httpx
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

from softvllm.core.fingerprint import fingerprint

pytestmark = pytest.mark.engine

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, chat_body()),
    "chat with log-probs": (CHAT, chat_body(logprobs=True, top_logprobs=3)),
    "chat, sampled": (CHAT, chat_body(temperature=1, seed=5, n=2, max_tokens=8)),
    "chat with a stop string": (CHAT, chat_body(stop=["e"], include_stop_str_in_output=True)),
    "chat with ids": (CHAT, chat_body(return_token_ids=True, max_tokens=5)),
    "chat with a schema": (
        CHAT,
        chat_body(
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "integer"}},
            }
        ),
    ),
    "chat with a tool": (
        CHAT,
        chat_body(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "add"}}),
    ),
    "completion": (COMPLETIONS, completion_body()),
    "completion with echo": (COMPLETIONS, completion_body(echo=True, logprobs=2)),
    "completion without max_tokens": (COMPLETIONS, completion_body(max_tokens=None)),
    "completion of several prompts": (
        COMPLETIONS,
        completion_body(prompt=["a", "b"], n=2, temperature=1, seed=3, max_tokens=6),
    ),
    "completion with prompt log-probs": (COMPLETIONS, completion_body(prompt_logprobs=1)),
}
CHANGING = {"id", "created", "system_fingerprint"}


def without_ids(value: Any) -> Any:
    """The body without what differs between any two requests."""
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in CHANGING}
    return [without_ids(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("fields", [{}, {"cot_mode": "hard"}], ids=["absent", "hard"])
def test_a_hard_request_is_answered_as_by_stock_vllm(
    server: Server, stock_server: Server, name: str, fields: dict[str, Any]
) -> None:
    path, body = PLAIN[name]
    ours, stock = server.ok(path, {**body, **fields}), stock_server.ok(path, body)
    assert without_ids(ours) == without_ids(stock)
    assert list(ours) == list(stock), "the order of keys, too"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_hard_stream_is_that_of_stock_vllm(
    server: Server, stock_server: Server, path: str
) -> None:
    make = chat_body if path == CHAT else completion_body
    body = make(stream_options={"include_usage": True})
    ours = server.stream(path, {**body, "cot_mode": "hard"})
    stock = stock_server.stream(path, body)
    assert without_ids(ours) == without_ids(stock)


def test_a_hard_request_beside_thinking_ones_has_the_same_answer(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    alone = server.chat()["choices"]
    body = chat_body(cot_mode="soft", cot={"max_think_tokens": 60, "seed": 1}, max_tokens=100)
    with ThreadPoolExecutor(6) as pool:
        soft = [pool.submit(server.ok, CHAT, body) for _ in range(4)]
        hard = [pool.submit(server.chat) for _ in range(2)]
        assert all(job.result()["choices"] == alone for job in hard)
        assert all(job.result()["choices"][0]["cot"]["think_tokens"] == 60 for job in soft)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/version", "/ping"])
def test_other_routes_are_stock(server: Server, stock_server: Server, path: str) -> None:
    ours, stock = server.http.get(path), stock_server.http.get(path)
    assert ours.status_code == stock.status_code == 200
    if ours.content:
        remove = {"created", "permission", "root"}

        def kept(answer: httpx.Response) -> Any:
            data = answer.json()
            cards = data.get("data", [])
            return data | {"data": [{k: v for k, v in c.items() if k not in remove} for c in cards]}

        assert kept(ours) == kept(stock)


def test_text_becomes_tokens_and_back(server: Server, stock_server: Server) -> None:
    for body in ({"prompt": PROMPT}, {"messages": MESSAGES}):
        assert server.ok("/tokenize", body) == stock_server.ok("/tokenize", body)
    ids = server.ok("/tokenize", {"prompt": PROMPT})["tokens"]
    assert server.ok("/detokenize", {"tokens": ids})["prompt"] == PROMPT


def test_metrics_of_both_layers_are_side_by_side(server: Server) -> None:
    server.chat(cot_mode="fuzzy", cot={**SHORT, "seed": 1})
    server.post(CHAT, chat_body(cot={"top_k": -1}))
    text = server.http.get("/metrics").text
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    assert any(name.startswith("vllm:generation_tokens_total") for name in values)
    for name in (
        'softvllm_think_end_total{end="budget",mode="fuzzy"}',
        'softvllm_tokens_total{kind="soft",mode="fuzzy"}',
        'softvllm_think_tokens_count{mode="fuzzy"}',
        'softvllm_think_entropy_nats_count{mode="fuzzy"}',
        'softvllm_refused_total{field="cot.top_k"}',
    ):
        assert float(values[name]) >= 1, name
    assert any(name.startswith("softvllm_samples_total") for name in values)


def test_the_fields_are_typed_in_the_openapi_schema(server: Server) -> None:
    schema = server.http.get("/openapi.json").json()
    models = schema["components"]["schemas"]
    for path in (CHAT, COMPLETIONS):
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        model = models[content["schema"]["$ref"].rsplit("/", 1)[1]]["properties"]
        assert "hard" in json.dumps(model["cot_mode"]) and "CoTOptions" in json.dumps(model["cot"])
    fields = models["CoTOptions"]["properties"]
    assert {"mode", "temperature", "top_k", "seed", "record"} <= set(fields)
    assert all(field.get("description") for field in fields.values())
    assert models["CoTOptions"]["additionalProperties"] is False


# ---- routes that cannot think -------------------------------------------------------------------

ELSEWHERE = {
    "/v1/responses": {"model": MODEL, "input": "Hi", "max_output_tokens": 4, "temperature": 0},
    "/v1/messages": {"model": MODEL, "messages": MESSAGES, "max_tokens": 4},
    "/inference/v1/generate": {"token_ids": [5, 6], "sampling_params": {"max_tokens": 2}},
}


@pytest.mark.parametrize("path", ELSEWHERE)
def test_a_route_that_cannot_think_says_so(server: Server, path: str) -> None:
    body = ELSEWHERE[path]
    without = server.post(path, body).status_code
    assert without == (403 if path.startswith("/inference") else 200)  # 403: --enable-scale-out
    for field in ({"cot_mode": "soft"}, {"cot": {}}, {"cot": {"seed": 1}, "stream": True}):
        answer = server.post(path, {**body, **field})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert path in error["message"] and CHAT in error["message"]
        assert error["param"] == next(iter(field))
    # null is what clients send for a field they leave alone.
    assert server.post(path, {**body, "cot_mode": None}).status_code == without


# ---- the key ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer", "tiny-key"])
def test_nothing_but_health_works_without_the_key(server: Server, key: str | None) -> None:
    headers = {} if key is None else {"authorization": key}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as stranger:
        for answer in (
            stranger.get("/v1/cot/info"),
            stranger.get("/v1/models"),
            stranger.post(ROLLOUTS, json=rollout_body()),
            stranger.post(CHAT, json=chat_body(cot_mode="soft")),
            stranger.post(COMPLETIONS, json=completion_body()),
            stranger.post("/pause"),
            stranger.post("/resume"),
            stranger.post("/start_weight_update"),
            stranger.post("/update_weights", json={"update_info": {"path": "/tmp"}}),
            stranger.post("/finish_weight_update"),
            stranger.get("/weight_info"),
            stranger.post("/collective_rpc", json={"method": "x"}),
        ):
            assert answer.status_code == 401, f"{answer.request.url}: {answer.text}"
        assert stranger.get("/health").status_code == 200


def test_control_is_closed_without_enable_rl(thinking_server: Server) -> None:
    for path in ("/pause", "/resume", "/start_weight_update", "/collective_rpc", "/sleep"):
        answer = thinking_server.post(path, {})
        assert answer.status_code == 403, answer.text
        assert "--enable-rl" in answer.json()["error"]["message"]


def test_info_tells_what_the_server_is(server: Server) -> None:
    info = server.info()
    assert info["model"] == MODEL and info["dtype"] == "float32" and info["refusal"] is None
    assert info["modes"] == ["hard", "soft", "fuzzy", "mixed"]
    assert info["enable_rl"] is True and info["reasoning_model"] is False
    assert info["recipe"]["end_strings"] == ["The final answer is:"]
    assert info["limits"]["max_model_len"] == 512 and info["limits"]["max_num_seqs"] == 32
    assert info["embedding"]["vocab_size"] == 509 and info["embedding"]["dim"] == 64
    assert set(info["policies"]) >= {"blend", "interleave", "entropy"}
    assert info["weight_version"] == "default"
    assert info["weights_at_start"] == fingerprint(server.model) is not None


def test_a_pause_holds_requests_and_a_resume_lets_them_go_on(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor, wait

    body = chat_body(cot_mode="soft", cot={"max_think_tokens": 200, "seed": 9}, max_tokens=240)
    want = server.ok(CHAT, body)["choices"]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(server.ok, CHAT, body)
        try:
            assert server.http.post("/pause?mode=keep").status_code == 200
            assert server.http.get("/is_paused").json() == {"is_paused": True}
            late = pool.submit(server.ok, CHAT, body)
            assert not wait([late], timeout=0.5).done
        finally:
            assert server.http.post("/resume").status_code == 200
        assert job.result()["choices"] == want == late.result()["choices"]
