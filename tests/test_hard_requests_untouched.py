"""Requests without a CoT object get from a softvllm engine exactly what stock vLLM gives.

Same tokens and, to rounding, the same log-probs: with only hard requests in the batch and
with soft neighbours, on both runners, for every sampling parameter that passes through the
layer (float32; sampling is seeded, so tokens can be compared).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from engine_harness import Engine, Sample
from traces import calm_llama
from vllm import SamplingParams

from softvllm import soft_params

pytestmark = pytest.mark.engine

LOGPROB_BOUND = 1e-5
TOKENS = 12


def prompt(length: int, start: int) -> list[int]:
    return [5 + (start + 11 * i * i + 5 * i) % 480 for i in range(length)]


def asks(**kwargs: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": TOKENS, "logprobs": 5, "ignore_eos": True, **kwargs})


HARD = {
    "greedy": asks(temperature=0),
    "greedy without logprobs": asks(temperature=0, logprobs=None),
    "sampled": asks(temperature=1.0, seed=1),
    "top-p": asks(temperature=0.9, top_p=0.8, seed=2),
    "top-k": asks(temperature=1.1, top_k=20, seed=3),
    "top-k and top-p": asks(temperature=0.8, top_k=40, top_p=0.7, seed=4),
    "min-p": asks(temperature=1.2, min_p=0.05, seed=5),
    "penalties": asks(
        temperature=0.7, seed=6, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4
    ),
    "greedy with penalties": asks(temperature=0, repetition_penalty=1.5, frequency_penalty=0.5),
    "logit bias": asks(temperature=1.0, seed=7, logit_bias={50: 4.0, 60: -100.0}),
    "min tokens": asks(temperature=1.0, seed=8, ignore_eos=False, min_tokens=8),
    "stop ids": asks(temperature=1.0, seed=9, stop_token_ids=list(range(0, 500, 4))),
    "allowed ids": asks(temperature=1.0, seed=10, allowed_token_ids=list(range(30, 90))),
    "two samples": asks(temperature=1.0, seed=11, n=2),
}
PROMPTS = {name: prompt(9 + 5 * i, i) for i, name in enumerate(HARD)}
NEIGHBOURS = [
    (
        prompt(12 + 7 * i, 40 + i),
        soft_params(
            max_think_tokens=10,
            end_strings=(),
            force_after_cut=(40, 41),
            max_tokens=24,
            seed=i,
            ignore_eos=True,
            **kwargs,
        ),
    )
    for i, kwargs in enumerate(
        (
            {"mode": "soft", "record": "dense"},
            {"mode": "soft", "top_k": 8, "logprobs": 2},
            {"mode": "fuzzy", "temperature": 0.7, "top_p": 0.8},
            {"mode": "mixed", "policy": "blend", "temperature": 1.0, "repetition_penalty": 1.2},
            {"mode": "hard", "temperature": 1.0, "min_p": 0.1},
        )
    )
]


class Pair(NamedTuple):
    """Stock vLLM's samples and an engine with the layer, on one runner."""

    name: str
    stock: dict[str, list[Sample]]
    layered: Engine


def run_hard(engine: Engine, neighbours: bool = False) -> dict[str, list[Sample]]:
    """All hard requests in one batch; neighbours stand before, between and behind them."""
    batch: list[tuple[str, list[int], SamplingParams]] = []
    for i, (name, params) in enumerate(HARD.items()):
        if neighbours and i % 3 == 0:
            batch.append(("", *NEIGHBOURS[i // 3]))
        batch.append((name, PROMPTS[name], params))
    outputs = engine.generate([p for _, p, _ in batch], [s for _, _, s in batch])
    for (name, _, _), samples in zip(batch, outputs):
        assert all((s.trace_bytes is None) == bool(name) for s in samples), "cot is None if hard"
    return {name: samples for (name, _, _), samples in zip(batch, outputs) if name}


@pytest.fixture(scope="module", params=["v1", "v2-async"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    model = calm_llama(tmp_path_factory.mktemp("calm"))
    runner, is_async = request.param[:2], request.param.endswith("async")
    # All run at once; without prefix caching every run computes the same things.
    options = {"max_num_seqs": 32, "enable_prefix_caching": False}
    with Engine(model, runner=runner, async_scheduling=is_async, stock=True, **options) as stock:
        expected = run_hard(stock)
    with Engine(model, runner=runner, async_scheduling=is_async, **options) as layered:
        yield Pair(request.param, expected, layered)


def assert_untouched(got: dict[str, list[Sample]], want: dict[str, list[Sample]]) -> None:
    worst = 0.0
    for name in HARD:
        assert len(got[name]) == len(want[name])
        for a, b in zip(got[name], want[name]):
            assert a.token_ids == b.token_ids, name
            assert (a.text, a.finish_reason, a.stop_reason) == (
                b.text,
                b.finish_reason,
                b.stop_reason,
            ), name
            assert (a.logprobs is None) == (b.logprobs is None), name
            for x, y in zip(a.logprobs or [], b.logprobs or []):
                assert x.keys() == y.keys(), name
                worst = max([worst, *(abs(x[token] - y[token]) for token in x)])
    print(f"log-probs at most {worst:.1e} apart")
    assert worst < LOGPROB_BOUND


def test_the_requests_differ_from_each_other(pair: Pair) -> None:
    """Parameters without effect would make the comparison weaker than it looks."""
    answers = [tuple(s.token_ids) for samples in pair.stock.values() for s in samples]
    assert len(set(answers)) == len(answers)
    assert any(s.finish_reason == "stop" for s in pair.stock["stop ids"])


def test_hard_requests_among_themselves_equal_stock(pair: Pair) -> None:
    assert_untouched(run_hard(pair.layered), pair.stock)


def test_hard_requests_beside_and_after_soft_ones_equal_stock(pair: Pair) -> None:
    """Afterwards, too: slots and buffers that soft requests left behind are of no consequence."""
    assert_untouched(run_hard(pair.layered, neighbours=True), pair.stock)
    assert_untouched(run_hard(pair.layered), pair.stock)


def test_generate_and_chat_without_a_cot_object_have_none(pair: Pair) -> None:
    if pair.name != "v1":
        pytest.skip("the front end does not depend on the runner")
    assert pair.layered.call("traces:cots_of_plain_calls") == [None] * 4
