"""The KV of a soft position is never matched by its token ids, nor by another request.

First the block hashes, on vLLM's own `Request` objects; then an engine in which a follow-up
prompt repeats the shadow ids of a first answer, as every multi-turn chat does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_harness import Engine, Sample
from traces import calm_llama

from softvllm import soft_params
from softvllm.engine import compat
from softvllm.engine.keys import USER_KEY, WIRE_KEY

BLOCK = 16
PROMPT = list(range(100, 140))  # two whole blocks and half of a third
GENERATED = list(range(200, 240))  # the third and two more


# ---- hashes -------------------------------------------------------------------------------


@pytest.fixture
def hasher() -> Callable:
    compat.apply()
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils

    kv_cache_utils.init_none_hash(sha256)
    return kv_cache_utils.get_request_block_hasher(BLOCK, sha256)


def new_request(hasher: Callable, cot: dict | None = None, prompt: list[int] = PROMPT) -> Any:
    """A vLLM request as the engine core sees it; the front end has resolved its CoT object."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=100)
    if cot is not None:
        params = soft_params(max_tokens=100, end_strings=(), force_after_cut=(3,), **cot)
        extra = params.extra_args
        assert extra is not None
        extra[WIRE_KEY] = resolved(extra.pop(USER_KEY))
    return Request("r", prompt, params, None, block_hasher=hasher)


def resolved(raw: dict) -> dict:
    from softvllm.core.params import CoTParams
    from softvllm.core.resolve import resolve

    cot = CoTParams.from_dict({**raw, "force_after_end": ()})
    return resolve(cot, None, stop_ids=(), vocab_size=509, greedy_answer=True).to_dict()


def hashes(request: Any, generated: list[int] = GENERATED) -> list[bytes]:
    """Block hashes after the request generated these tokens, one by one."""
    for token in generated:
        request.append_output_token_ids(token)
    return list(request.block_hashes)


MIXED = {"mode": "mixed", "policy": "interleave"}
SOFT_KINDS = [{"mode": "soft"}, {"mode": "fuzzy"}, MIXED, {"mode": "soft", "top_k": 5}]


@pytest.mark.parametrize("cot", SOFT_KINDS, ids=lambda cot: "-".join(map(str, cot.values())))
def test_soft_requests_share_blocks_of_the_prompt_and_no_others(
    hasher: Callable, cot: dict
) -> None:
    stock = hashes(new_request(hasher))
    one, other = (hashes(new_request(hasher, {**cot, "seed": 1})) for _ in range(2))
    assert len(stock) == len(one) == len(other) == 5
    whole = len(PROMPT) // BLOCK
    assert stock[:whole] == one[:whole] == other[:whole]
    # Not even the same request, sent twice, is matched: every sample has its own nonce.
    assert len({*stock[whole:], *one[whole:], *other[whole:]}) == 3 * (5 - whole)


def test_a_prompt_made_of_a_soft_answer_does_not_match_it(hasher: Callable) -> None:
    soft = hashes(new_request(hasher, {"mode": "soft"}))
    for follow_up in (None, {"mode": "soft"}, {"mode": "hard"}):
        prompt = new_request(hasher, follow_up, prompt=PROMPT + GENERATED)
        again = list(prompt.block_hashes)
        assert again[:2] == soft[:2]
        assert not set(again[2:]) & set(soft[2:])


def test_a_request_matches_itself_when_it_resumes(hasher: Callable) -> None:
    request = new_request(hasher, {"mode": "soft"})
    before = hashes(request)
    # What a preemption leaves: the same object, whose hashes are computed from its ids.
    request.block_hashes = []
    request.update_block_hashes()
    assert list(request.block_hashes) == before


def test_a_prompt_that_ends_on_a_block_shares_that_block(hasher: Callable) -> None:
    even = PROMPT[: 2 * BLOCK]
    one, other = (hashes(new_request(hasher, {"mode": "soft"}, even)) for _ in range(2))
    assert one[:2] == other[:2]
    assert not set(one[2:]) & set(other[2:])


def test_samples_of_a_group_share_the_prompt_only(hasher: Callable) -> None:
    from softvllm.engine.frontend import child_extra_args

    samples = []
    parent = new_request(hasher, {"mode": "soft", "seed": 1})
    for index in range(3):
        child = new_request(hasher, {"mode": "soft", "seed": 1})
        child.sampling_params.extra_args = child_extra_args(
            parent.sampling_params.extra_args, index
        )
        samples.append(hashes(child))
    assert samples[0][:2] == samples[1][:2] == samples[2][:2]
    assert len({h for sample in samples for h in sample[2:]}) == 9


def test_hard_requests_hash_as_stock_does(
    hasher: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core import kv_cache_utils

    plain = hashes(new_request(hasher))
    hard = hashes(new_request(hasher, {"mode": "hard"}))
    stock = kv_cache_utils.generate_block_hash_extra_keys.__wrapped__
    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", stock)
    assert plain == hard == hashes(new_request(hasher))


# ---- an engine ----------------------------------------------------------------------------

SIZE = 32  # tokens of a block, the smallest the CPU has
TURN = list(range(60, 60 + 2 * SIZE))
THINK, FORCED, ANSWER = 3 * SIZE, (40, 41, 42), 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calm_llama(tmp_path_factory.mktemp("calm"))


@pytest.fixture(scope="module")
def cached(model: Path) -> Iterator[Engine]:
    with Engine(model, block_size=SIZE, enable_prefix_caching=True) as engine:
        engine.call("traces:watch")
        yield engine


@pytest.fixture(scope="module")
def fresh(model: Path) -> Iterator[Engine]:
    with Engine(model, block_size=SIZE, enable_prefix_caching=False) as engine:
        yield engine


def first_turn(**kwargs: object) -> Any:
    return soft_params(
        max_think_tokens=THINK,
        end_strings=(),
        force_after_cut=FORCED,
        max_tokens=THINK + len(FORCED) + ANSWER,
        ignore_eos=True,
        **{"mode": "soft", "seed": 1, **kwargs},
    )


def follow_up(engine: Engine, first: Sample) -> Sample:
    """An ordinary request whose prompt repeats the first turn, shadow ids and all."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=8, logprobs=5, ignore_eos=True)
    return engine.one(TURN + first.token_ids + [7, 8, 9], greedy)


def apart(got: Sample, want: Sample) -> float:
    """Largest difference of the log-probs of the same tokens; infinite where tokens differ."""
    assert got.logprobs is not None and want.logprobs is not None
    if got.token_ids != want.token_ids:
        return float("inf")
    pairs = zip(got.logprobs, want.logprobs)
    return max(abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys())


@pytest.mark.engine
@pytest.mark.parametrize("cot", [{"mode": "soft"}, {"mode": "fuzzy"}, MIXED], ids=str)
def test_a_follow_up_reads_none_of_the_soft_cache(cached: Engine, fresh: Engine, cot: dict) -> None:
    cached.call("traces:clear_cache")
    first = cached.one(TURN, first_turn(**cot))
    got = follow_up(cached, first)
    assert got.num_cached_tokens == len(TURN), "the first prompt is shared, nothing else"
    assert apart(got, follow_up(fresh, first)) < 1e-4


@pytest.mark.engine
def test_a_follow_up_on_the_soft_cache_would_be_noticed(cached: Engine, fresh: Engine) -> None:
    """The negative control: with vLLM's own keys the follow-up reads the soft positions."""
    cached.call("traces:clear_cache")
    cached.call("traces:share_soft_blocks", True)
    try:
        first = cached.one(TURN, first_turn())
        got = follow_up(cached, first)
    finally:
        cached.call("traces:share_soft_blocks", False)
        cached.call("traces:clear_cache")
    assert got.num_cached_tokens is not None and got.num_cached_tokens > len(TURN)
    assert apart(got, follow_up(fresh, first)) > 0.1


@pytest.mark.engine
def test_a_follow_up_of_a_hard_thinker_reads_its_cache(cached: Engine, fresh: Engine) -> None:
    cached.call("traces:clear_cache")
    first = cached.one(TURN, first_turn(mode="hard"))
    got = follow_up(cached, first)
    whole = (len(TURN) + len(first.token_ids)) // SIZE * SIZE
    assert got.num_cached_tokens == whole, "its positions were fed as tokens, so all are shared"
    assert apart(got, follow_up(fresh, first)) < 1e-4


@pytest.mark.engine
def test_a_soft_request_sent_twice_reads_only_its_prompt(cached: Engine) -> None:
    cached.call("traces:clear_cache")
    one = cached.one(TURN + [5], first_turn())
    two = cached.one(TURN + [5], first_turn())
    other = cached.one(TURN + [5] + one.token_ids, first_turn(seed=2))
    cached_tokens = [sample.num_cached_tokens for sample in (one, two, other)]
    assert cached_tokens == [0, len(TURN), len(TURN)]
