"""`/v1/chat/completions` with a think phase: what comes back, streamed and in one piece."""

from __future__ import annotations

import base64
import json
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_host import (
    CHAT,
    KEY,
    MESSAGES,
    MODEL,
    SHORT,
    Server,
    chat_body,
    joined,
    last_cot,
)

from softvllm.core.noise import derive_seed
from softvllm.core.phases import Phase
from softvllm.core.trace import Kind, Trace, decode, encode

pytestmark = pytest.mark.engine

BROKEN = "\ufffd"
MODES = ("hard", "soft", "fuzzy", "mixed")


def trace_of(choice: dict[str, Any]) -> Trace:
    return decode(base64.b64decode(choice["cot"]["trace"]))


def test_the_mode_alone_is_enough(server: Server) -> None:
    answer = server.chat(cot_mode="soft", max_tokens=64)
    (choice,) = answer["choices"]
    # 64 tokens less 32 for the answer and what is forced.
    think = choice["cot"]["think_tokens"]
    assert choice["cot"]["mode"] == "soft" and think >= 16
    assert choice["message"]["reasoning"]
    assert choice["message"]["content"].startswith(" The final answer is: \\boxed{")
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == think


def test_the_options_alone_mean_soft(server: Server) -> None:
    assert server.chat(cot={"max_think_tokens": 4})["choices"][0]["cot"]["mode"] == "soft"


@pytest.mark.parametrize("mode", MODES)
def test_the_block_adds_up(server: Server, mode: str) -> None:
    cot = {**SHORT, "seed": 3, "record": "trace"}
    answer = server.chat(cot_mode=mode, cot=cot, max_tokens=24)
    (choice,) = answer["choices"]
    block, usage = choice["cot"], answer["usage"]
    trace = trace_of(choice)
    think = trace.phase == Phase.THINK

    assert block["mode"] == mode and block["seed"] == 3 and block["end_cause"] == "budget"
    assert block["policy"] == {"mixed": "blend", "hard": "hard"}.get(mode, "soft")
    assert block["think_tokens"] == 12 == int(think.sum())
    assert block["soft_steps"] + block["hard_steps"] == 12
    assert block["hard_steps"] == (12 if mode == "hard" else 0)
    assert block["forced_tokens"] == int((trace.kind == Kind.FORCED).sum()) > 0
    total = block["think_tokens"] + block["forced_tokens"] + block["answer_tokens"]
    assert total == usage["completion_tokens"] == len(trace) <= 24
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 12}
    assert block["mean_entropy"] == pytest.approx(float(trace.entropy[think].mean()))
    assert block["tau"] == {"hard": 1.0, "fuzzy": 1e-4}.get(mode, 0.5)
    rms = server.info()["embedding"]["rms"]
    assert block["sigma"] == (0 if mode == "hard" else pytest.approx(0.33 * rms, rel=1e-5))
    assert block["weight_version"] == "default"
    assert (trace.dense is None) == (mode == "hard")


@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_repeats_text_and_trace_to_the_byte(server: Server, mode: str) -> None:
    def ask(seed: int) -> tuple[Any, ...]:
        cot = {**SHORT, "seed": seed, "record": "trace"}
        body = server.chat(cot_mode=mode, cot=cot, temperature=1)
        message = body["choices"][0]["message"]
        return message["reasoning"], message["content"], body["choices"][0]["cot"]["trace"]

    assert ask(5) == ask(5)
    first, second = ask(5), ask(6)
    assert first[2] != second[2]
    # A fuzzy chain may survive other noise, but its answer is drawn with other numbers.
    assert first[:2] != second[:2]


def test_the_top_level_seed_counts_where_cot_has_none(server: Server) -> None:
    answer = server.chat(cot_mode="soft", cot=SHORT, seed=11)
    assert answer["choices"][0]["cot"]["seed"] == 11
    answer = server.chat(cot_mode="soft", cot={**SHORT, "seed": 12}, seed=11)
    assert answer["choices"][0]["cot"]["seed"] == 12


def test_the_reported_seed_repeats_an_unseeded_sample(server: Server) -> None:
    cot = {**SHORT, "record": "trace"}
    first = server.chat(cot_mode="soft", cot=cot, temperature=1)["choices"][0]
    other = server.chat(cot_mode="soft", cot=cot, temperature=1)["choices"][0]
    assert first["cot"]["seed"] != other["cot"]["seed"]
    seed = {"seed": first["cot"]["seed"]}
    again = server.chat(cot_mode="soft", cot={**cot, **seed}, temperature=1)["choices"][0]
    assert again["message"] == first["message"] and again["cot"] == first["cot"]


def test_each_of_several_samples_has_a_seed_that_repeats_it(server: Server) -> None:
    together = server.chat(cot_mode="soft", cot={**SHORT, "seed": 21}, temperature=1, n=3)
    choices = together["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2]
    assert [c["cot"]["seed"] for c in choices] == [derive_seed(21, i) for i in range(3)]
    think = sum(c["cot"]["think_tokens"] for c in choices)
    assert together["usage"]["completion_tokens_details"]["reasoning_tokens"] == think
    for choice in choices:
        seed = choice["cot"]["seed"]
        alone = server.chat(cot_mode="soft", cot={**SHORT, "seed": seed}, temperature=1)
        assert alone["choices"][0]["message"] == choice["message"]


@pytest.mark.parametrize("mode", MODES)
def test_the_pieces_of_a_stream_are_the_whole(server: Server, mode: str) -> None:
    cot = {**SHORT, "seed": 31, "record": "top", "record_top": 3}
    body = chat_body(cot_mode=mode, cot=cot, temperature=1)
    whole = server.ok(CHAT, body)["choices"][0]
    chunks = server.stream(CHAT, {**body, "stream_options": {"include_usage": True}})
    assert joined(chunks, "reasoning") == whole["message"]["reasoning"]
    assert joined(chunks, "content") == whole["message"]["content"]

    # The stream shows each think step once, in the chunk of its token; the rest comes at the end.
    steps = [
        step
        for chunk in chunks
        for choice in chunk["choices"]
        for step in choice.get("cot", {}).get("steps", ())
    ]
    assert steps == whole["cot"].pop("steps")
    assert len(steps) == 12
    end = last_cot(chunks)
    end.pop("steps", None)
    assert end == whole["cot"]
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}


def test_recorded_steps_are_weights_of_tokens(server: Server) -> None:
    cot = {**SHORT, "seed": 2, "record": "top", "record_top": 4}
    choice = server.chat(cot_mode="soft", cot=cot)["choices"][0]
    for step in choice["cot"]["steps"]:
        weights = [weight for _, _, weight in step["top"]]
        assert step["soft"] is True and step["entropy"] > 0
        assert len(weights) == 4 and weights == sorted(weights, reverse=True)
        assert weights[-1] > 0 and sum(weights) <= 1 + 1e-5
        # The shadow is the most likely token at any temperature.
        assert step["top"][0][:2] == [step["token"], step["id"]]


@pytest.mark.parametrize("record", ["steps", "top", "sparse", "dense", "trace"])
def test_what_is_recorded_is_what_was_asked(server: Server, record: str) -> None:
    cot = {**SHORT, "seed": 2, "record": record, "top_k": 4}
    block = server.chat(cot_mode="soft", cot=cot)["choices"][0]["cot"]
    assert ("steps" in block) == (record == "top")
    assert ("trace" in block) == (record in ("sparse", "dense", "trace"))
    if "trace" in block:
        trace = decode(base64.b64decode(block["trace"]))
        assert encode(trace) == base64.b64decode(block["trace"])
        assert (trace.dense is not None) == (record == "dense")
        assert (trace.sparse_ids is not None) == (record != "dense")


def test_several_samples_stream_side_by_side(server: Server) -> None:
    cot = {**SHORT, "seed": 41, "record": "top"}
    body = chat_body(cot_mode="mixed", cot=cot, temperature=1, n=3)
    whole = {c["index"]: c for c in server.ok(CHAT, body)["choices"]}
    chunks = server.stream(CHAT, body)
    for index in range(3):
        message = whole[index]["message"]
        assert joined(chunks, "reasoning", index) == message["reasoning"]
        assert joined(chunks, "content", index) == message["content"]
        steps = [
            step["id"]
            for chunk in chunks
            for choice in chunk["choices"]
            if choice["index"] == index
            for step in choice.get("cot", {}).get("steps", ())
        ]
        assert steps == [step["id"] for step in whole[index]["cot"]["steps"]]
        assert last_cot(chunks, index)["seed"] == derive_seed(41, index)


def test_bytes_of_a_character_spread_over_tokens_reach_the_right_side(server: Server) -> None:
    """Hot sampling from a byte-level vocabulary gives characters of several tokens, and broken
    ones, everywhere, also across the border between the phases."""
    late = 0
    for seed in range(6):
        cot = {**SHORT, "seed": seed, "record": "trace", "temperature": 100.0}
        body = chat_body(cot_mode="hard", cot=cot, temperature=2, max_tokens=40)
        whole = server.ok(CHAT, body)["choices"][0]
        chunks = server.stream(CHAT, body)
        message = whole["message"]
        assert joined(chunks, "reasoning") == message["reasoning"]
        assert joined(chunks, "content") == message["content"]
        ids = trace_of(whole).token.tolist()
        text = message["reasoning"] + message["content"]
        # A character that is unfinished at the very end is never shown.
        assert detokenized(server, ids).rstrip(BROKEN) == text.rstrip(BROKEN)
        texts = [chunk["choices"][0]["delta"].get("reasoning") for chunk in chunks]
        late += len(texts) < 40
    assert late, "no token was held back; the test does not test what it says"


def detokenized(server: Server, ids: list[int]) -> str:
    """The ids as vLLM's incremental detokenizer shows them: special tokens left out."""
    from tiny_models import SPECIAL_TOKENS
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(str(server.model))
    return tokenizer.decode([i for i in ids if i >= len(SPECIAL_TOKENS)])


# ---- OpenAI's own fields beside ours ------------------------------------------------------------


def test_a_stop_string_in_the_think_phase_ends_the_request(server: Server) -> None:
    cot = {**SHORT, "seed": 51}
    whole = server.chat(cot_mode="soft", cot=cot)["choices"][0]["message"]["reasoning"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    body = chat_body(cot_mode="soft", cot=cot, stop=[stop])
    cut = server.ok(CHAT, body)["choices"][0]
    assert cut["finish_reason"] == "stop" and cut["stop_reason"] == stop
    assert cut["message"]["reasoning"] == whole[: whole.index(stop)]
    assert not cut["message"]["content"]
    assert cut["cot"]["end_cause"] == "unfinished" and cut["cot"]["answer_tokens"] == 0
    chunks = server.stream(CHAT, body)
    assert joined(chunks, "reasoning") == cut["message"]["reasoning"]
    assert joined(chunks, "content") == ""
    assert last_cot(chunks) == cut["cot"]


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_in_the_answer_cuts_the_answer(server: Server, included: bool) -> None:
    cot = {**SHORT, "seed": 52, "force_after_cut": " 42"}
    whole = server.chat(cot_mode="soft", cot=cot)["choices"][0]["message"]["content"]
    stop = whole[-6:-3]
    body = chat_body(cot_mode="soft", cot=cot, stop=stop, include_stop_str_in_output=included)
    cut = server.ok(CHAT, body)["choices"][0]
    end = whole.index(stop) + (len(stop) if included else 0)
    assert cut["message"]["content"] == whole[:end]
    assert cut["cot"]["think_tokens"] == 12
    chunks = server.stream(CHAT, body)
    # The stream must not show text that a longer look takes back.
    assert joined(chunks, "content") == whole[:end]


def test_logprobs_cover_every_token(server: Server) -> None:
    answer = server.chat(cot_mode="soft", cot={**SHORT, "seed": 1}, logprobs=True, top_logprobs=2)
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert len(tokens) == answer["usage"]["completion_tokens"]
    assert all(len(t["top_logprobs"]) == 2 and t["logprob"] <= 0 for t in tokens)


def test_hidden_reasoning_is_left_out_and_counted(server: Server) -> None:
    fields: dict[str, Any] = {"cot_mode": "soft", "cot": {**SHORT, "seed": 61}}
    shown = server.chat(**fields)["choices"][0]["message"]
    body = chat_body(**fields, include_reasoning=False)
    hidden = server.ok(CHAT, body)
    message = hidden["choices"][0]["message"]
    assert shown["reasoning"] and not message.get("reasoning")
    assert message["content"] == shown["content"]
    assert hidden["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}
    chunks = server.stream(CHAT, body)
    assert joined(chunks, "reasoning") == "" and joined(chunks, "content") == shown["content"]
    assert last_cot(chunks)["think_tokens"] == 12


def test_usage_is_counted_along_the_stream(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = chat_body(cot_mode="soft", cot={**SHORT, "seed": 62}, stream_options=options)
    chunks = server.stream(CHAT, body)
    counts = [
        (
            chunk["usage"]["completion_tokens"],
            chunk["usage"]["completion_tokens_details"]["reasoning_tokens"],
        )
        for chunk in chunks
    ]
    assert counts == sorted(counts), "usage never goes back"
    assert all(reasoning == min(total, 12) for total, reasoning in counts)
    assert counts[-1][0] > 12


def test_token_ids_on_request_are_the_trace(server: Server) -> None:
    cot = {**SHORT, "seed": 63, "record": "trace"}
    choice = server.chat(cot_mode="soft", cot=cot, return_token_ids=True)["choices"][0]
    assert choice["token_ids"] == trace_of(choice).token.tolist()


def test_an_answer_limit_and_a_token_limit_are_kept(server: Server) -> None:
    cot = {**SHORT, "seed": 64, "answer_max_tokens": 3}
    choice = server.chat(cot_mode="soft", cot=cot)["choices"][0]
    assert choice["cot"]["answer_tokens"] <= 3
    answer = server.chat(cot_mode="soft", cot=SHORT, max_tokens=15, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 15
    assert answer["choices"][0]["finish_reason"] == "length"
    answer = server.chat(
        cot_mode="soft", cot=SHORT, max_completion_tokens=16, max_tokens=None, ignore_eos=True
    )
    assert answer["usage"]["completion_tokens"] == 16


def test_a_sample_that_never_leaves_the_think_phase_has_no_content(server: Server) -> None:
    cot = {"max_think_tokens": 0, "seed": 1, "force_after_cut": " 42"}
    none = server.chat(cot_mode="soft", cot=cot)["choices"][0]
    assert none["cot"]["think_tokens"] == 0 and not none["message"].get("reasoning")
    assert none["cot"]["mean_entropy"] is None
    assert none["message"]["content"].startswith(" 42")


def test_an_end_string_of_the_request_ends_thinking(server: Server) -> None:
    cot = {"max_think_tokens": 40, "seed": 71, "force_after_end": " 42", "end_strings": []}
    body: dict[str, Any] = {"cot_mode": "hard", "max_tokens": 64, "temperature": 1}
    whole = server.chat(**body, cot={**cot, "record": "top"})["choices"][0]["cot"]["steps"]
    word = next(s["token"] for s in whole[5:] if s["token"].isascii() and s["token"].isalpha())
    choice = server.chat(**body, cot={**cot, "end_strings": [word]})["choices"][0]
    assert choice["cot"]["end_cause"] == "end_sequence"
    end = [step["token"] for step in whole].index(word)
    assert choice["cot"]["think_tokens"] == end + 1 < 40
    assert choice["message"]["reasoning"].endswith(word)
    assert choice["message"]["content"].startswith(" 42")


@settings(max_examples=12, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    think=st.integers(0, 20),
    answer=st.integers(1, 8),
    seed=st.integers(0, 2**53 - 1),
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 1024]),
    n=st.integers(1, 3),
)
def test_any_sensible_request_streams_what_it_answers(server: Server, **given: Any) -> None:
    n = given["n"] if given["temperature"] else 1
    cot = {
        "seed": given["seed"],
        "max_think_tokens": given["think"],
        "top_k": given["top_k"],
        "force_after_cut": "\n",
        "force_after_end": "\n",
    }
    body = chat_body(
        cot_mode=given["mode"],
        cot=cot,
        n=n,
        max_tokens=given["think"] + given["answer"] + 1,
        temperature=given["temperature"],
    )
    whole = server.ok(CHAT, body)
    chunks = server.stream(CHAT, body)
    for choice in whole["choices"]:
        index = choice["index"]
        assert joined(chunks, "reasoning", index) == (choice["message"].get("reasoning") or "")
        assert joined(chunks, "content", index) == (choice["message"]["content"] or "")
        assert last_cot(chunks, index) == choice["cot"]
        assert choice["cot"]["think_tokens"] <= given["think"]


# ---- the openai package -------------------------------------------------------------------------


def test_the_openai_package_needs_only_extra_body(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 32,
        "extra_body": {"cot_mode": "soft", "cot": {**SHORT, "seed": 5}},
    }
    whole = client.chat.completions.create(**fields)
    choice = whole.choices[0]
    assert choice.message.model_extra and choice.model_extra
    parts = list(client.chat.completions.create(**fields, stream=True))
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == choice.message.content
    last = parts[-1].choices[0].model_extra
    assert last is not None and last["cot"] == choice.model_extra["cot"]
    assert json.dumps(choice.model_extra["cot"])
