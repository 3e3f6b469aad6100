"""`/v1/completions` with a think phase."""

from __future__ import annotations

from typing import Any

import pytest
from server_host import COMPLETIONS, PROMPT, SHORT, Server, completion_body, joined, last_cot

from softvllm.core.noise import derive_seed

pytestmark = pytest.mark.engine

MODES = ("hard", "soft", "fuzzy", "mixed")
FORCED = {**SHORT, "force_after_cut": " 42", "seed": 4}


@pytest.mark.parametrize("mode", MODES)
def test_the_answer_begins_where_the_block_says(server: Server, mode: str) -> None:
    body = completion_body(cot_mode=mode, cot=FORCED)
    whole = server.ok(COMPLETIONS, body)
    (choice,) = whole["choices"]
    start = choice["cot"]["answer_start"]
    assert 0 < start < len(choice["text"]) and choice["text"][start:].startswith(" 42")
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}

    chunks = server.stream(COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
    assert joined(chunks, "text") == choice["text"]
    assert last_cot(chunks) == choice["cot"]
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}


def test_an_echoed_prompt_comes_before_the_thoughts(server: Server) -> None:
    body = completion_body(cot_mode="soft", cot=FORCED)
    plain = server.ok(COMPLETIONS, body)["choices"][0]
    echo = server.ok(COMPLETIONS, {**body, "echo": True})["choices"][0]
    assert echo["text"] == PROMPT + plain["text"]
    assert echo["cot"]["answer_start"] == len(PROMPT) + plain["cot"]["answer_start"]
    assert echo["text"][echo["cot"]["answer_start"] :].startswith(" 42")
    chunks = server.stream(COMPLETIONS, {**body, "echo": True})
    assert joined(chunks, "text") == echo["text"]
    assert last_cot(chunks) == echo["cot"]


def test_without_max_tokens_there_is_room_to_think(server: Server) -> None:
    body = completion_body(cot_mode="soft", cot={"seed": 1, "max_think_tokens": 40}, echo=True)
    del body["max_tokens"]
    for prompt in (PROMPT, [60] * 400):
        whole = server.ok(COMPLETIONS, {**body, "prompt": prompt})
        assert whole["choices"][0]["cot"]["think_tokens"] == 40
        assert whole["usage"]["total_tokens"] <= 512
        chunks = server.stream(COMPLETIONS, {**body, "prompt": prompt})
        assert joined(chunks, "text") == whole["choices"][0]["text"]
    several = server.ok(COMPLETIONS, {**body, "prompt": [[60] * 400, [60]], "ignore_eos": True})
    assert several["usage"]["total_tokens"] == 2 * 512


def test_several_prompts_and_samples_are_numbered_as_vllm_does(server: Server) -> None:
    prompts = [PROMPT, "Once upon a time"]
    body = completion_body(
        prompt=prompts, n=2, temperature=1, cot_mode="soft", cot={**SHORT, "seed": 8}
    )
    whole = server.ok(COMPLETIONS, body)
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
    seeds = [derive_seed(8, 0), derive_seed(8, 1)] * 2
    assert [c["cot"]["seed"] for c in whole["choices"]] == seeds
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 48}
    chunks = server.stream(COMPLETIONS, body)
    for choice in whole["choices"]:
        alone = completion_body(
            prompt=prompts[choice["index"] // 2],
            temperature=1,
            cot_mode="soft",
            cot={**SHORT, "seed": choice["cot"]["seed"]},
        )
        assert server.ok(COMPLETIONS, alone)["choices"][0]["text"] == choice["text"]
        assert joined(chunks, "text", choice["index"]) == choice["text"]


def test_token_ids_are_a_prompt_too(server: Server) -> None:
    ids = server.ok("/tokenize", {"prompt": PROMPT})["tokens"]
    body = completion_body(cot_mode="soft", cot=FORCED)
    by_text = server.ok(COMPLETIONS, body)["choices"][0]
    by_ids = server.ok(COMPLETIONS, {**body, "prompt": ids})["choices"][0]
    assert by_ids == by_text


def test_stop_strings_logprobs_and_suffix_fields_work_beside(server: Server) -> None:
    body = completion_body(cot_mode="soft", cot=FORCED, logprobs=1)
    choice = server.ok(COMPLETIONS, body)["choices"][0]
    tokens = choice["logprobs"]["tokens"]
    block = choice["cot"]
    total = block["think_tokens"] + block["forced_tokens"] + block["answer_tokens"]
    assert len(tokens) == len(choice["logprobs"]["token_logprobs"]) == total
    stop = choice["text"][block["answer_start"] + 3 :][1:4]
    cut = server.ok(COMPLETIONS, {**body, "stop": stop})["choices"][0]
    assert cut["text"] == choice["text"][: choice["text"].index(stop)]
    chunks = server.stream(COMPLETIONS, {**body, "stop": stop})
    assert joined(chunks, "text") == cut["text"] and last_cot(chunks) == cut["cot"]


def test_a_stop_inside_the_thoughts_leaves_no_answer(server: Server) -> None:
    body = completion_body(cot_mode="soft", cot=FORCED)
    text = server.ok(COMPLETIONS, body)["choices"][0]["text"]
    cut = server.ok(COMPLETIONS, {**body, "stop": text[6:9]})["choices"][0]
    assert cut["text"] == text[: text.index(text[6:9])]
    assert cut["cot"]["answer_start"] == len(cut["text"])


def test_steps_and_traces_come_with_completions(server: Server) -> None:
    fields: dict[str, Any] = {**FORCED, "record": "top", "record_top": 2}
    body = completion_body(cot_mode="mixed", cot=fields)
    whole = server.ok(COMPLETIONS, body)["choices"][0]["cot"]
    assert len(whole["steps"]) == whole["think_tokens"] == 12
    chunks = server.stream(COMPLETIONS, body)
    steps = [
        step
        for chunk in chunks
        for choice in chunk["choices"]
        for step in choice.get("cot", {}).get("steps", ())
    ]
    assert steps == whole["steps"]
    traced = completion_body(cot_mode="mixed", cot={**FORCED, "record": "trace"})
    first = server.ok(COMPLETIONS, traced)["choices"][0]
    assert first["cot"]["trace"] == server.ok(COMPLETIONS, traced)["choices"][0]["cot"]["trace"]
    assert last_cot(server.stream(COMPLETIONS, traced)) == first["cot"]
