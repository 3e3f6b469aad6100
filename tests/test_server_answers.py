"""What a grammar or a tool parser reads is the answer alone; models with `</think>`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_host import (
    CHAT,
    COMPLETIONS,
    SHORT,
    Server,
    chat_body,
    completion_body,
    joined,
    last_cot,
)

pytestmark = pytest.mark.engine

MODES = ("hard", "soft", "fuzzy", "mixed")
THINK = {"max_think_tokens": 10, "seed": 7}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": [12, 345]}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA}}
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look a city up.",
        "strict": True,  # else vLLM lets the arguments be any JSON
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def check_answer(text: str) -> None:
    data = json.loads(text)
    assert set(data) == {"answer", "sure"} and data["answer"] in (12, 345)


@pytest.mark.parametrize("mode", MODES)
def test_the_answer_obeys_a_schema_and_the_thoughts_do_not(server: Server, mode: str) -> None:
    body = chat_body(cot_mode=mode, cot=THINK, max_tokens=90, response_format=FORMAT)
    choice = server.ok(CHAT, body)["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["cot"]["think_tokens"] == 10
    check_answer(choice["message"]["content"])
    with pytest.raises(ValueError):
        json.loads(choice["message"]["reasoning"])
    chunks = server.stream(CHAT, body)
    assert joined(chunks, "content") == choice["message"]["content"]
    assert joined(chunks, "reasoning") == choice["message"]["reasoning"]


def test_a_choice_is_one_of_those_given(server: Server) -> None:
    choices = ["Paris", "Rome"]
    for path, make in ((CHAT, chat_body), (COMPLETIONS, completion_body)):
        body = make(cot_mode="soft", cot=THINK, structured_outputs={"choice": choices})
        choice = server.ok(path, body)["choices"][0]
        if path == CHAT:
            answer = choice["message"]["content"]
        else:
            answer = choice["text"][choice["cot"]["answer_start"] :]
        assert answer.strip() in choices


def test_a_schema_works_on_completions(server: Server) -> None:
    body = completion_body(cot_mode="soft", cot=THINK, max_tokens=90, response_format=FORMAT)
    choice = server.ok(COMPLETIONS, body)["choices"][0]
    check_answer(choice["text"][choice["cot"]["answer_start"] :])


@pytest.mark.parametrize("kind", ["json_object", "regex", "grammar"])
def test_other_grammars_work_after_thinking(server: Server, kind: str) -> None:
    fields: dict[str, Any] = {
        "json_object": {"response_format": {"type": "json_object"}},
        "regex": {"structured_outputs": {"regex": r"[0-9]{3}"}},
        "grammar": {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}},
    }[kind]
    choice = server.chat(cot_mode="mixed", cot=THINK, max_tokens=200, **fields)["choices"][0]
    text = choice["message"]["content"].strip()
    if kind == "regex":
        assert len(text) == 3 and text.isdigit()
    elif kind == "grammar":
        assert text in ("yes", "no")
    else:
        assert text.startswith("{")


@pytest.mark.parametrize("mode", MODES)
def test_a_named_tool_is_called_after_thinking(server: Server, mode: str) -> None:
    body = chat_body(
        cot_mode=mode,
        cot=THINK,
        max_tokens=90,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "lookup"}},
    )
    choice = server.ok(CHAT, body)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "lookup"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    assert choice["message"]["reasoning"] and choice["cot"]["think_tokens"] == 10
    name, arguments, chunks = streamed_call(server, body)
    assert name == "lookup"
    assert json.loads(arguments) == json.loads(call["function"]["arguments"])
    assert joined(chunks, "reasoning") == choice["message"]["reasoning"]
    assert last_cot(chunks) == choice["cot"]


def test_a_required_tool_is_called_after_thinking(server: Server) -> None:
    body = chat_body(
        cot_mode="soft",
        cot=THINK,
        max_tokens=120,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,  # a second call that the limit cuts would spoil the first
    )
    choice = server.ok(CHAT, body)["choices"][0]
    (call, *_) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "lookup"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    name, arguments, _ = streamed_call(server, body)
    assert name == "lookup"
    assert json.loads(arguments) == json.loads(call["function"]["arguments"])


def streamed_call(server: Server, body: dict[str, Any]) -> tuple[str, str, list[dict[str, Any]]]:
    """(name, arguments) of the first call in a stream, and the chunks."""
    chunks = server.stream(CHAT, body)
    name, arguments = "", ""
    for chunk in chunks:
        for call in chunk["choices"][0]["delta"].get("tool_calls") or ():
            if call["index"] == 0:
                name += call["function"].get("name") or ""
                arguments += call["function"].get("arguments") or ""
    return name, arguments, chunks


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_tools_that_are_not_called_leave_a_text(server: Server, choice: str) -> None:
    body = chat_body(cot_mode="soft", cot=THINK, tools=[TOOL], tool_choice=choice)
    message = server.ok(CHAT, body)["choices"][0]["message"]
    assert message["content"] and not message.get("tool_calls")
    chunks = server.stream(CHAT, body)
    assert joined(chunks, "content") == message["content"]


def test_a_call_in_the_models_own_words_is_found_after_thinking(server: Server) -> None:
    """The forced text spells a hermes call, as a trained model would write it itself."""
    call = '<tool_call>{"name":"lookup","arguments":{"city":"Rome"}}</tool_call>'
    cot = {**THINK, "force_after_cut": call, "answer_max_tokens": 1}
    body = chat_body(cot_mode="soft", cot=cot, max_tokens=120, tools=[TOOL], tool_choice="auto")
    choice = server.ok(CHAT, body)["choices"][0]
    (found,) = choice["message"]["tool_calls"]
    assert found["function"]["name"] == "lookup"
    assert json.loads(found["function"]["arguments"]) == {"city": "Rome"}
    name, arguments, _ = streamed_call(server, body)
    assert name == "lookup" and json.loads(arguments) == {"city": "Rome"}


# ---- a model with </think> ----------------------------------------------------------------------


def test_markers_belong_to_neither_side(thinking_server: Server) -> None:
    body = chat_body(cot_mode="soft", cot={"seed": 3})
    choice = thinking_server.ok(CHAT, body)["choices"][0]
    message = choice["message"]
    assert choice["cot"]["end_cause"] == "budget" and choice["cot"]["think_tokens"] == 10
    assert "think>" not in message["reasoning"] + message["content"]
    assert message["content"].startswith("\n")
    chunks = thinking_server.stream(CHAT, body)
    assert joined(chunks, "reasoning") == message["reasoning"]
    assert joined(chunks, "content") == message["content"]


def test_the_models_own_marker_ends_thinking(thinking_server: Server) -> None:
    """A hot chain over the whole vocabulary meets `</think>` sooner or later."""
    cot = {"seed": 1, "max_think_tokens": 300, "temperature": 100.0}
    body = chat_body(cot_mode="hard", cot=cot, n=8, temperature=1, max_tokens=330)
    choices = thinking_server.ok(CHAT, body)["choices"]
    ended = [c for c in choices if c["cot"]["end_cause"] == "end_sequence"]
    assert ended, "no sample met the marker; choose another seed"
    for choice in ended:
        assert choice["cot"]["forced_tokens"] == 0
        assert "</think>" not in choice["message"]["reasoning"]
        assert not choice["message"]["content"].startswith("</think>")
    chunks = thinking_server.stream(CHAT, body)
    for choice in choices:
        assert joined(chunks, "reasoning", choice["index"]) == choice["message"]["reasoning"]
        assert joined(chunks, "content", choice["index"]) == choice["message"]["content"]


def test_the_servers_defaults_fill_what_a_request_leaves_open(thinking_server: Server) -> None:
    block = thinking_server.chat()["choices"][0]["cot"]
    rms = thinking_server.info()["embedding"]["rms"]
    assert block["mode"] == "fuzzy" and block["think_tokens"] == 10
    assert block["sigma"] == pytest.approx(0.2 * rms, rel=1e-5)
    block = thinking_server.chat(cot_mode="soft", cot={"max_think_tokens": 4})["choices"][0]["cot"]
    assert block["mode"] == "soft" and block["think_tokens"] == 4
    assert "cot" not in thinking_server.chat(cot_mode="hard")["choices"][0]
    hard = thinking_server.chat(cot_mode="hard", cot={})["choices"][0]["cot"]
    assert hard["mode"] == "hard" and hard["think_tokens"] == 10


def test_a_schema_is_obeyed_after_the_marker(thinking_server: Server) -> None:
    body = chat_body(cot_mode="soft", cot={"seed": 2}, max_tokens=90, response_format=FORMAT)
    choice = thinking_server.ok(CHAT, body)["choices"][0]
    check_answer(choice["message"]["content"])
    assert "</think>" not in choice["message"]["content"]


def test_info_knows_the_recipe_and_the_defaults(thinking_server: Server) -> None:
    info = thinking_server.info()
    assert info["reasoning_model"] is True and info["default_mode"] == "fuzzy"
    assert info["enable_rl"] is False
    assert info["recipe"]["end_strings"] == ["</think>"]
    assert info["recipe"]["max_think_tokens"] == 10


def test_a_rollout_takes_the_servers_defaults_too(thinking_server: Server) -> None:
    _, (sample,), _ = thinking_server.rollouts(seed=1)
    summary = sample.trace.summary()  # type: ignore[union-attr]
    assert summary["mode"] == "fuzzy" and summary["think_tokens"] == 10
    assert SHORT["max_think_tokens"] != 10
