"""Whatever `/openapi.json` allows or forbids, our routes never answer 5xx (schemathesis)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from server_host import CHAT, COMPLETIONS, KEY, ROLLOUTS, Server

pytestmark = pytest.mark.engine

FIELDS = {
    CHAT: (
        "model messages temperature max_tokens n stop stream seed top_p logprobs top_logprobs "
        "include_reasoning cot_mode cot"
    ),
    COMPLETIONS: "model prompt temperature max_tokens n stop stream seed top_p echo cot_mode cot",
    ROLLOUTS: "prompts n seed seeds cot_mode cot sampling request_id priority",
}
"""What is varied. The other fields of the stock routes are vLLM's, and generating them takes
minutes. A 5xx known there, without fields of ours: a lone surrogate in `stop`, `bad_words` or
`request_id` of a request that does not think (texts made here have none)."""
MESSAGES = {
    "type": "array",
    "maxItems": 3,
    "items": {
        "type": "object",
        "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": {}},
        "required": ["role", "content"],
    },
}
"""vLLM's own union of messages has hundreds of kinds of parts."""


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    """The server's own schema, cut down to the fields above and to small numbers."""
    raw = server.http.get("/openapi.json").json()
    models = raw["components"]["schemas"]
    paths = {path: raw["paths"][path] for path in (*FIELDS, "/v1/cot/info")}
    for path, names in FIELDS.items():
        content = paths[path]["post"]["requestBody"]["content"]
        content.pop("application/msgpack", None)
        body = content["application/json"]["schema"]
        if "$ref" in body:
            body = copy.deepcopy(models[body["$ref"].rpartition("/")[2]])
            content["application/json"]["schema"] = body
        assert set(names.split()) <= set(body["properties"]), "a field was renamed"
        body["properties"] = {name: body["properties"][name] for name in names.split()}
        body["properties"]["n"] = {"type": "integer", "maximum": 3}
        if "messages" in body["properties"]:
            body["properties"]["messages"] = MESSAGES
        if "max_tokens" in body["properties"]:
            body["properties"]["max_tokens"] = {"type": "integer", "maximum": 24}
            body["required"] = sorted({*body.get("required", ()), "max_tokens"})
    sampling = paths[ROLLOUTS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    short = sampling["properties"]["sampling"]
    short["properties"]["max_tokens"] = {"type": "integer", "maximum": 24}
    short["required"] = ["max_tokens"]
    sampling["required"] = ["prompts", "sampling"]
    return schemathesis.openapi.from_dict({**raw, "paths": paths})


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", FIELDS)
def test_no_body_makes_a_5xx(server: Server, schema: Any, path: str, mode: GenerationMode) -> None:
    statuses: set[int] = set()

    @settings(
        max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    def probe(case: Any) -> None:
        answer = case.call(
            base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60
        )
        statuses.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code == 200:
            assert '"code":500' not in answer.text

    probe()
    assert statuses


@settings(max_examples=25, deadline=None)
@given(
    body=st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(["cot", "cot_mode", "prompts", "n"]), inner),
        ),
        max_leaves=8,
    )
)
def test_no_json_makes_a_5xx(server: Server, body: Any) -> None:
    import json

    raw = json.dumps(body)
    for path in FIELDS:
        answer = server.http.post(path, content=raw, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, f"{path}: {answer.text}"


def test_info_is_in_the_schema_and_needs_nothing(server: Server, schema: Any) -> None:
    assert "get" in schema.raw_schema["paths"]["/v1/cot/info"]
    assert server.http.get("/v1/cot/info?x=1").status_code == 200


def test_after_all_that_nothing_is_held(server: Server) -> None:
    held = server.settle()
    assert held == dict.fromkeys(held, 0)
