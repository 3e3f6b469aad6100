"""`POST /v1/rollouts`: everything that was asked for, in whatever order, to the bit."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from server_host import (
    COMPLETIONS,
    KEY,
    MESSAGES,
    MODEL,
    PROMPT,
    ROLLOUTS,
    SHORT,
    Server,
    completion_body,
    frames_of,
    rollout_body,
)

from softvllm.core.noise import derive_seed
from softvllm.core.phases import Phase
from softvllm.core.rollout import MEDIA_TYPE, Sample
from softvllm.core.trace import reconstruct

pytestmark = pytest.mark.engine

MSGPACK = "application/msgpack"


def samples(server: Server, **fields: Any) -> dict[tuple[int, int], Sample]:
    """The samples of a request without failures, by (prompt, sample)."""
    start, frames, end = server.rollouts(**fields)
    assert all(isinstance(frame, Sample) for frame in frames), frames
    found = {(f.prompt, f.sample): f for f in frames if isinstance(f, Sample)}
    assert len(found) == len(frames) == end.samples and end.errors == 0
    assert set(found) == {
        (i, k) for i in range(start.num_prompts) for k in range(start.num_samples)
    }
    return found


@pytest.fixture(scope="module")
def table(server: Server) -> torch.Tensor:
    """The embedding table in the model's folder."""
    return load_file(server.model / "model.safetensors")["model.embed_tokens.weight"]


def three_prompts(server: Server) -> list[dict[str, Any]]:
    ids = server.ok("/tokenize", {"prompt": "Once upon"})["tokens"]
    return [{"prompt_token_ids": ids}, {"messages": MESSAGES}, {"prompt": PROMPT}]


def test_every_prompt_and_sample_comes_back_once(server: Server) -> None:
    found = samples(server, prompts=three_prompts(server), n=4, seed=7, cot_mode="soft", cot=SHORT)
    assert len(found) == 12
    for (prompt, k), sample in found.items():
        trace = sample.trace
        assert trace.meta["seed"] == derive_seed(derive_seed(7, prompt), k)
        assert trace.dense is not None and trace.meta["record"] == "dense"
        assert trace.summary()["think_tokens"] == 12
        assert sample.finish_reason in ("stop", "length")
        assert 0 < sample.answer_start <= len(sample.text) and sample.answer.startswith("\n")
        versions = trace.meta["weight_versions"]
        assert versions and versions[0][1] == 0 and versions[0][0] == "default"


def test_prompts_are_fed_as_the_other_routes_tokenise_them(server: Server) -> None:
    prompts = three_prompts(server)
    found = samples(server, prompts=prompts, cot=SHORT)
    want = [
        prompts[0]["prompt_token_ids"],
        server.ok("/tokenize", {"messages": MESSAGES, "add_generation_prompt": True})["tokens"],
        server.ok("/tokenize", {"prompt": PROMPT})["tokens"],
    ]
    assert [found[i, 0].prompt_token_ids.tolist() for i in range(3)] == want


def test_msgpack_asks_for_the_same_as_json(server: Server) -> None:
    body = rollout_body(seed=3, n=2, cot_mode="mixed", cot=SHORT)
    answers = []
    for kind, data in (
        ("application/json", json.dumps(body).encode()),
        (MSGPACK, msgspec.msgpack.encode(body)),
        ("application/x-msgpack; charset=binary", msgspec.msgpack.encode(body)),
    ):
        answer = server.http.post(ROLLOUTS, content=data, headers={"content-type": kind})
        assert answer.status_code == 200 and answer.headers["content-type"] == MEDIA_TYPE
        _, frames, _ = frames_of([answer.content])
        answers.append(sorted((f.sample, f.trace_bytes) for f in frames))  # type: ignore[union-attr]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("mode", ["hard", "soft", "fuzzy", "mixed"])
def test_the_same_request_gives_the_same_bytes(server: Server, mode: str) -> None:
    fields: dict[str, Any] = {"n": 3, "seed": 5, "cot_mode": mode, "cot": SHORT}
    fields["sampling"] = {"temperature": 1.0}
    first, second = samples(server, **fields), samples(server, **fields)
    # Equal texts, not equal bytes, are promised between batch shapes; alone there is one shape.
    assert {k: s.text for k, s in first.items()} == {k: s.text for k, s in second.items()}
    one = {**fields, "n": 1}
    assert samples(server, **one)[0, 0].trace_bytes == samples(server, **one)[0, 0].trace_bytes
    other = samples(server, **{**one, "seed": 6})[0, 0]
    assert other.trace_bytes != samples(server, **one)[0, 0].trace_bytes


def test_seeds_can_be_given_one_by_one_and_repeat_other_routes(server: Server) -> None:
    found = samples(server, n=2, seeds=[[11, 2**53 - 1]], cot_mode="soft", cot=SHORT)
    assert [found[0, k].trace.meta["seed"] for k in range(2)] == [11, 2**53 - 1]
    body = completion_body(cot_mode="soft", cot={**SHORT, "seed": 11})
    assert server.ok(COMPLETIONS, body)["choices"][0]["text"] == found[0, 0].text


def test_without_a_seed_two_requests_differ(server: Server) -> None:
    fields: dict[str, Any] = {"cot_mode": "soft", "cot": SHORT}
    first, second = samples(server, **fields)[0, 0], samples(server, **fields)[0, 0]
    assert first.trace.meta["seed"] != second.trace.meta["seed"]


def test_dense_inputs_are_rebuilt_from_the_models_own_table(
    server: Server, table: torch.Tensor
) -> None:
    sample = samples(server, seed=1, cot_mode="soft", cot={**SHORT, "record": "dense"})[0, 0]
    trace = sample.trace
    rebuilt = reconstruct(trace, table)
    soft = trace.soft_positions
    assert len(soft) == 12
    assert rebuilt[soft].numpy().tobytes() == np.asarray(trace.dense).tobytes()
    hard = np.flatnonzero(trace.phase != Phase.THINK)
    assert torch.equal(rebuilt[hard], table[torch.from_numpy(trace.token[hard].astype(np.int64))])


@pytest.mark.parametrize("mode", ["soft", "fuzzy", "mixed"])
def test_sparse_inputs_are_those_that_were_fed(
    server: Server, table: torch.Tensor, mode: str
) -> None:
    cot = {**SHORT, "top_k": 5}
    sparse = samples(server, seed=2, cot_mode=mode, cot=cot)[0, 0].trace
    dense = samples(server, seed=2, cot_mode=mode, cot={**cot, "record": "dense"})[0, 0].trace
    assert sparse.meta["record"] == "sparse" and sparse.dense is None
    assert sparse.token.tolist() == dense.token.tolist()
    rebuilt, fed = reconstruct(sparse, table), reconstruct(dense, table)
    assert torch.allclose(rebuilt, fed, rtol=1e-5, atol=1e-5 * float(dense.meta["sigma"]))


def test_hard_rollouts_record_steps(server: Server) -> None:
    sample = samples(server, seed=2, cot_mode="hard", cot=SHORT)[0, 0]
    trace = sample.trace
    assert trace.meta["mode"] == "hard" and trace.dense is None and trace.sparse_ids is None
    assert len(trace.soft_positions) == 0 and (trace.log_prob[:12] < 0).all()


def test_sampling_parameters_shape_the_answer(server: Server) -> None:
    fields: dict[str, Any] = {"seed": 4, "cot_mode": "soft", "cot": SHORT}
    whole = samples(server, **fields)[0, 0]
    stop = whole.answer[-5:-3]
    cut = samples(server, **fields, sampling={"stop": [stop]})[0, 0]
    assert cut.finish_reason == "stop" and cut.stop_reason == stop
    assert cut.text == whole.text[: whole.text.index(stop)]
    only = samples(server, **fields, sampling={"allowed_token_ids": [60, 61]})[0, 0].trace
    assert set(only.token[only.phase == Phase.ANSWER].tolist()) <= {60, 61}
    long = samples(server, **fields, sampling={"max_tokens": 10**6, "ignore_eos": True})[0, 0]
    assert len(long.prompt_token_ids) + len(long.trace) == 512
    none = samples(server, **fields, sampling={"max_tokens": None})[0, 0]
    assert len(none.trace) >= len(whole.trace)


def test_start_names_the_request(server: Server) -> None:
    start, _, _ = server.rollouts(request_id="mine", model=MODEL, cot=SHORT)
    assert (start.request_id, start.model, start.version) == ("mine", MODEL, 1)
    assert start.weight_version == "default"


def test_frames_arrive_as_samples_finish(server: Server) -> None:
    """A long sample and a short one: the short one is there before the long one is done."""
    ids = server.ok("/tokenize", {"prompt": PROMPT})["tokens"]
    prompts = [{"prompt_token_ids": ids[:3]}, {"prompt_token_ids": ids * 40}]
    body = rollout_body(
        prompts=prompts, seed=1, cot=SHORT, sampling={"max_tokens": 10**6, "ignore_eos": True}
    )
    _, frames, _ = frames_of([server.post(ROLLOUTS, body).content])
    assert [frame.prompt for frame in frames] == [1, 0]


def test_many_more_samples_than_slots_are_all_served(server: Server) -> None:
    found = samples(
        server, n=150, seed=3, cot_mode="soft", cot={"max_think_tokens": 3, "record": "steps"}
    )
    assert len({sample.trace.meta["seed"] for sample in found.values()}) == 150


# ---- clients that leave -------------------------------------------------------------------------

LONG: dict[str, Any] = {
    "cot_mode": "soft",
    "cot": {"max_think_tokens": 400, "min_think_tokens": 400, "seed": 1},
    "max_tokens": 450,
    "ignore_eos": True,
}


@pytest.fixture
def quiet(server: Server) -> Iterator[None]:
    """Nothing in flight before, and nothing left behind after."""
    assert not any(server.settle().values())
    yield
    held = server.settle()
    assert held == dict.fromkeys(held, 0)


def test_a_rollout_whose_client_leaves_is_aborted(server: Server, quiet: None) -> None:
    cot = {"max_think_tokens": 400, "min_think_tokens": 400}
    sampling = {"max_tokens": 450, "ignore_eos": True}
    body = rollout_body(n=64, cot=cot, sampling=sampling)
    with server.http.stream("POST", ROLLOUTS, json=body) as answer:
        chunks = answer.iter_raw()  # kept: when it is collected, the connection closes
        next(chunks)  # the start frame, before anything is scheduled
        deadline = time.monotonic() + 60
        while not server.info()["held"]["cot_requests"]:
            assert time.monotonic() < deadline, "nothing was ever scheduled"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", COMPLETIONS])
def test_a_request_whose_client_leaves_is_aborted(
    server: Server, quiet: None, path: str, stream: bool
) -> None:
    prompt = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": MESSAGES}

    async def leave() -> int:
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client:
            body = {"model": MODEL, **prompt, **LONG, "stream": stream, "n": 3, "temperature": 1}
            job = asyncio.create_task(client.post(path, json=body))
            held = 0
            while not held and not job.done():
                held = (await client.get("/v1/cot/info")).json()["held"]["cot_requests"]
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)
            return held

    assert asyncio.run(leave()) > 0
