"""From parameters to ids: end strings in every tokenisation, forced texts, budget and seed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EOS, TRAINING_TEXT, VOCAB_SIZE, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from softvllm.core import phases
from softvllm.core.params import (
    MAX_END_LENGTH,
    MAX_END_SEQUENCES,
    MAX_FORCED_LENGTH,
    MAX_SEED,
    MAX_STOP_IDS,
    PAPER_AFTER_CUT,
    PAPER_AFTER_END,
    PAPER_END_STRING,
    CoTParams,
    CoTParamsError,
)
from softvllm.core.phases import EndCause, SlotState
from softvllm.core.resolve import ResolvedCoT, encode, resolve

fast = settings(max_examples=40, deadline=None)  # a deadline would only measure load

EOS_ID = 1
BARE: dict[str, Any] = {"end_strings": [], "force_after_end": [], "force_after_cut": []}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def greedy_merger() -> PreTrainedTokenizerFast:
    """A tokenizer that glues an end string's edges to their neighbours, as large ones do."""
    text = "\n".join(
        f"{before}The final answer is:{after}"
        for before in ("", " ", "**", "$", ".\n\n", "\n")
        for after in ("", "**", "\n", "\n\n", " $", "$", "\\", " 1")
        for _ in range(20)
    )
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(EOS, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator([text, TRAINING_TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS)


def make(tokenizer: Any = None, stop_ids: Any = (EOS_ID,), **given: Any) -> ResolvedCoT:
    """`resolve` with its keywords and the fields of `CoTParams` mixed."""
    keywords = {
        "vocab_size": VOCAB_SIZE,
        "greedy_answer": True,
        "request_seed": None,
        "max_tokens": None,
        "think_limit": None,
    }
    for name in list(given):
        if name in keywords:
            keywords[name] = given.pop(name)
    return resolve(CoTParams(**given), tokenizer, stop_ids=stop_ids, **keywords)


def refusal(*args: Any, **kwargs: Any) -> CoTParamsError:
    with pytest.raises(CoTParamsError) as caught:
        make(*args, **kwargs)
    return caught.value


# ---- end strings -----------------------------------------------------------------------------


def fires_at(cot: ResolvedCoT, ids: list[int]) -> int | None:
    """Index of the token on which the phase machine sees an end sequence."""
    state = SlotState(1, "cpu")
    state.set_request(0, cot)
    for t, token in enumerate(ids):
        one = torch.tensor
        out = phases.advance(state, one([0]), one([t]), one([token]), one([0]), torch.tensor([9.0]))
        if int(out.cause) == EndCause.END_SEQUENCE:
            return t
    return None


def first_shown(tokenizer: Any, ids: list[int], text: str) -> int:
    """Index of the token that completes the text."""
    return next(t for t in range(len(ids)) if text in tokenizer.decode(ids[: t + 1]))


BEFORE = [
    "", "So x = 5. ", "Thus,\n", "5.\n\n", "(2). ", "**", "$x$ ", "Therefore: ", "\t", "## ",
    "1. ", "> ", "word ", "\\]\n\n", "* ",
]  # fmt: skip
AFTER = [
    "", " 42", " \\boxed{3}", " $5$", "\n5", "\n\n$$", "**", " **5**", "**\n", "\\boxed{1}",
    " \\[", "$7$", " the", " -1",
]  # fmt: skip


@pytest.mark.parametrize("text", [PAPER_END_STRING, "Question: x", "</think>"])
def test_an_end_string_fires_wherever_it_is_written(tokenizer, text):
    cot = make(tokenizer, end_strings=[text], max_think_tokens=500)
    for before in BEFORE:
        for after in AFTER:
            ids = encode(tokenizer, before + text + after)
            want = first_shown(tokenizer, ids, text)
            assert fires_at(cot, ids) == want, (before, after)


def test_an_end_string_fires_where_the_tokenizer_glues_its_edges(greedy_merger):
    cot = make(greedy_merger, end_strings=[PAPER_END_STRING], max_think_tokens=500)
    glued = 0
    for before in ("", " ", "\n", ".\n\n", "x = 5. ", "**", "$", "so: "):
        for after in ("", "**", "\n", "\n\n", " $5$", "$5$", "\\boxed{5}", " 12"):
            ids = encode(greedy_merger, before + PAPER_END_STRING + after)
            want = first_shown(greedy_merger, ids, PAPER_END_STRING)
            glued += greedy_merger.decode(ids[: want + 1]).endswith(PAPER_END_STRING) is False
            assert fires_at(cot, ids) == want, (before, after)
    assert len(cot.end_sequences) > 3 and glued > 5, "the tokenizer does glue"


PIECES = [PAPER_END_STRING, "The final", "final answer", "answer is:", "is", ":", "The", "**", "42"]


@fast
@given(words=st.lists(st.sampled_from(PIECES), max_size=8))
def test_an_end_string_fires_only_when_it_was_written(tokenizer_once, words):
    tokenizer, cot = tokenizer_once
    text = " ".join(words)
    ids = encode(tokenizer, text)
    written = [t for t in range(len(ids)) if PAPER_END_STRING in tokenizer.decode(ids[: t + 1])]
    assert fires_at(cot, ids) == (written[0] if written else None)


@pytest.fixture(scope="module")
def tokenizer_once(tokenizer) -> tuple[Any, ResolvedCoT]:
    return tokenizer, make(tokenizer, end_strings=[PAPER_END_STRING], max_think_tokens=500)


def test_an_end_string_that_is_one_special_token_stays_one(tokenizer):
    cot = make(tokenizer, end_strings=["<|user|>"])
    assert cot.end_sequences == [[tokenizer.convert_tokens_to_ids("<|user|>")]]


def test_sequences_hold_no_more_than_it_takes_to_spell_the_text(tokenizer):
    cot = make(tokenizer, end_strings=[PAPER_END_STRING])
    for ids in cot.end_sequences:
        assert PAPER_END_STRING in tokenizer.decode(ids)
        assert PAPER_END_STRING not in tokenizer.decode(ids[1:])
        assert PAPER_END_STRING not in tokenizer.decode(ids[:-1])
        assert 1 <= len(ids) <= MAX_END_LENGTH
    tuples = [tuple(s) for s in cot.end_sequences]
    assert len(set(tuples)) == len(tuples)


def test_texts_and_ids_end_thinking_side_by_side(tokenizer):
    cot = make(tokenizer, end_strings=["Wait"], end_token_ids=[[400, 401], [400, 401], [7]])
    assert [400, 401] in cot.end_sequences and [7] in cot.end_sequences
    assert cot.end_sequences.count([400, 401]) == 1
    assert fires_at(cot, [3, 400, 401]) == 2
    assert fires_at(cot, [3, 7]) == 1


class OneByOne:
    """A tokenizer that is not hashable and encodes one text at a time; counts its work."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self.encoded = self.decoded = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.encoded += 1
        return self.whole.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: list[int]) -> str:
        self.decoded += 1
        return self.whole.decode(ids)


@fast
@given(text=st.sampled_from([*PIECES, "Wait", " \n", "é:", "</think>"]))
def test_a_batch_of_texts_gives_what_single_texts_give(tokenizer, greedy_merger, text):
    for whole in (tokenizer, greedy_merger):
        got = make(OneByOne(whole), end_strings=[text]).end_sequences
        assert got == make(whole, end_strings=[text]).end_sequences


def test_no_token_sequence_is_decoded_twice(tokenizer):
    """Each costs as much as an encoding, and the event loop waits."""
    one = OneByOne(tokenizer)
    make(one, end_strings=[PAPER_END_STRING])
    assert one.decoded < one.encoded, "several decodings of each of the encoded texts"


def test_an_end_string_that_is_too_long_is_refused(tokenizer):
    error = refusal(tokenizer, end_strings=["zqxj" * 20])
    assert error.field == "end_strings" and f"{MAX_END_LENGTH} tokens" in str(error)


def test_too_many_end_sequences_are_refused():
    many = [[i] for i in range(MAX_END_SEQUENCES + 1)]
    error = refusal(**BARE, end_token_ids=many)
    assert error.field == "end_strings" and str(MAX_END_SEQUENCES) in str(error)
    assert len(make(**BARE, end_token_ids=many[:-1]).end_sequences) == MAX_END_SEQUENCES


@pytest.mark.parametrize("field", ["end_strings", "force_after_end", "force_after_cut"])
def test_a_text_without_a_tokenizer_is_refused(field):
    text: Any = ["x"] if field == "end_strings" else "x"
    error = refusal(None, **(BARE | {field: text}))
    assert error.field == field and "tokenizer" in str(error) and "ids" in str(error)


def test_ids_alone_need_no_tokenizer():
    cot = make(None, end_strings=[], force_after_end=[5], force_after_cut=())
    assert cot.after_end == [5] and cot.after_cut == [] and cot.end_sequences == []


# ---- forced texts ----------------------------------------------------------------------------


def test_forced_texts_become_ids_without_special_tokens(tokenizer):
    cot = make(tokenizer)
    assert tokenizer.decode(cot.after_end) == PAPER_AFTER_END
    assert tokenizer.decode(cot.after_cut) == PAPER_AFTER_CUT
    assert make(tokenizer, force_after_end="", force_after_cut="").after_cut == []


@pytest.mark.parametrize("field", ["force_after_end", "force_after_cut"])
@pytest.mark.parametrize("given_as", ["text", "ids"])
def test_a_forced_text_that_would_end_the_request_is_refused(tokenizer, field, given_as):
    value: Any = f"so {EOS} there" if given_as == "text" else [5, EOS_ID]
    error = refusal(tokenizer, **{field: value})
    assert error.field == field
    assert str(EOS_ID) in str(error) and "ends the request" in str(error)
    make(tokenizer, stop_ids=(), **{field: value})  # under ignore_eos it is an ordinary token


@pytest.mark.parametrize("field", ["force_after_end", "force_after_cut"])
def test_a_forced_text_that_is_too_long_is_refused(field):
    error = refusal(**(BARE | {field: [5] * (MAX_FORCED_LENGTH + 1)}))
    assert error.field == field and f"at most {MAX_FORCED_LENGTH}" in str(error)
    make(**(BARE | {field: [5] * MAX_FORCED_LENGTH}))


@pytest.mark.parametrize("field", ["end_token_ids", "force_after_end", "force_after_cut"])
def test_ids_outside_the_vocabulary_are_refused(field):
    """509 tokens, padded to 512: the padding is no token."""
    wrap = (lambda i: [[3, i]]) if field == "end_token_ids" else (lambda i: [3, i])
    error = refusal(**(BARE | {field: wrap(VOCAB_SIZE)}))
    assert error.field == field and str(VOCAB_SIZE) in str(error)
    make(**(BARE | {field: wrap(VOCAB_SIZE - 1)}))
    assert refusal(**(BARE | {field: wrap(2**70)})).field == field


def test_stop_tokens_are_collected_and_bounded():
    assert make(**BARE, stop_ids=[9, 3, 9]).stop_ids == [3, 9]
    assert len(make(**BARE, stop_ids=range(MAX_STOP_IDS)).stop_ids) == MAX_STOP_IDS
    error = refusal(**BARE, stop_ids=range(MAX_STOP_IDS + 1))
    assert str(MAX_STOP_IDS) in str(error) and str(MAX_STOP_IDS + 1) in str(error)


# ---- budget ----------------------------------------------------------------------------------

FORCED3 = BARE | {"force_after_end": [5], "force_after_cut": [5, 6, 7]}


@pytest.mark.parametrize(
    ("given_numbers", "budget"),
    [
        ({}, 512),  # the paper's
        ({"max_tokens": 1000}, 512),
        ({"max_tokens": 512 + 3 + 32}, 512),
        ({"max_tokens": 512 + 3 + 31}, 511),  # the longer forced text and 32 answer tokens fit
        ({"max_tokens": 100}, 65),
        ({"max_tokens": 36}, 17),  # a short max_tokens is shared
        ({"max_tokens": 5}, 1),
        ({"max_tokens": 100, "answer_max_tokens": 10}, 87),
        ({"max_tokens": 100, "answer_max_tokens": 50}, 65),
        ({"think_limit": 40}, 40),
        ({"think_limit": 40, "max_tokens": 50}, 24),
        ({"max_think_tokens": 90, "max_tokens": 94}, 90),  # one answer token is enough if asked
        ({"max_think_tokens": 5000, "max_tokens": None}, 5000),
        ({"max_think_tokens": 0, "max_tokens": 4}, 0),
        ({"max_think_tokens": 40, "think_limit": 40}, 40),
        ({"min_think_tokens": 65, "max_tokens": 100}, 65),
    ],
)
def test_the_budget_is_as_asked_or_what_max_tokens_leaves(given_numbers, budget):
    assert make(**FORCED3, **given_numbers).max_think == budget


@pytest.mark.parametrize(
    ("given_numbers", "field", "words"),
    [
        ({"max_think_tokens": 91, "max_tokens": 94}, "max_think_tokens", ["91", "3 forced", "94"]),
        ({"max_think_tokens": 0, "max_tokens": 3}, "max_think_tokens", ["max_tokens=3"]),
        ({"max_think_tokens": 41, "think_limit": 40}, "max_think_tokens", ["41", "40"]),
        ({"max_tokens": 4}, "max_think_tokens", ["max_tokens=4", "0 tokens"]),
        ({"max_tokens": 2}, "max_think_tokens", ["max_tokens=2", "0 tokens"]),
        ({"min_think_tokens": 66, "max_tokens": 100}, "min_think_tokens", ["66", "65"]),
        ({"min_think_tokens": 513}, "min_think_tokens", ["513", "512", "max_think_tokens"]),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(given_numbers, field, words):
    error = refusal(**FORCED3, **given_numbers)
    assert error.field == field
    for word in words:
        assert word in str(error), str(error)


@fast
@given(
    max_tokens=st.integers(1, 2000),
    max_think=st.one_of(st.none(), st.integers(0, 2000)),
    min_think=st.integers(0, 20),
    limit=st.one_of(st.none(), st.integers(1, 2000)),
    forced=st.integers(0, 10),
    answer=st.one_of(st.none(), st.integers(1, 100)),
)
def test_a_resolved_budget_always_leaves_room_for_the_answer(
    max_tokens, max_think, min_think, limit, forced, answer
):
    try:
        cot = make(
            end_strings=[],
            force_after_end=[],
            force_after_cut=[5] * forced,
            max_tokens=max_tokens,
            max_think_tokens=max_think,
            min_think_tokens=min_think,
            answer_max_tokens=answer,
            think_limit=limit,
        )
    except CoTParamsError:
        return
    assert cot.max_think + forced + 1 <= max_tokens
    assert min_think <= cot.max_think <= (limit or 2000)
    if max_think is not None:
        assert cot.max_think == max_think
    else:
        assert 1 <= cot.max_think <= 512
        left = max_tokens - forced
        assert cot.max_think + min(answer or 32, 32, max(1, left // 2)) <= left


# ---- seed, nonce and the wire ----------------------------------------------------------------


def test_the_seed_is_the_parameters_then_the_requests_then_random():
    assert make(**BARE, seed=5, request_seed=9).seed == 5
    assert make(**BARE, seed=0, request_seed=9).seed == 0
    assert make(**BARE, request_seed=9).seed == 9
    assert make(**BARE, request_seed=0).seed == 0
    for wide in (2**53 + 3, 2**64 - 1, -1):
        assert 0 <= make(**BARE, request_seed=wide).seed < MAX_SEED
    drawn = {make(**BARE).seed for _ in range(20)}
    assert len(drawn) == 20 and all(0 <= s < MAX_SEED for s in drawn)


def test_no_two_samples_share_a_cache_nonce():
    """It keys the KV cache of soft positions: not even equal requests may meet there."""
    cots = [make(**BARE, seed=1) for _ in range(20)]
    cots += [cots[0].with_seed(1) for _ in range(20)]
    assert len({c.nonce for c in cots}) == 40
    assert all(0 <= c.nonce < 2**63 for c in cots)


def test_a_sibling_sample_differs_in_seed_and_nonce_alone():
    one = make(**BARE, seed=1)
    two = one.with_seed(7)
    assert two.seed == 7
    changed = {k for k, v in one.to_dict().items() if two.to_dict()[k] != v}
    assert changed == {"seed", "nonce"}


def test_everything_asked_for_arrives(tokenizer):
    cot = make(
        tokenizer,
        mode="mixed",
        policy="entropy",
        policy_params={"low": 1, "high": 2},
        temperature=0.7,
        top_k=9,
        top_p=0.5,
        min_p=0.25,
        noise_scale=0.1,
        seed=3,
        max_think_tokens=20,
        min_think_tokens=4,
        cold_stop_entropy=0.5,
        cold_stop_steps=6,
        record="top",
        record_top=2,
        answer_max_tokens=7,
        greedy_answer=False,
    )
    assert (cot.mode, cot.policy, cot.policy_values) == ("mixed", "entropy", [1, 2, 1, 0])
    assert (cot.tau, cot.gamma, cot.top_k, cot.top_p, cot.min_p) == (0.7, 0.1, 9, 0.5, 0.25)
    assert (cot.seed, cot.max_think, cot.min_think) == (3, 20, 4)
    assert (cot.cold_entropy, cot.cold_steps) == (0.5, 6)
    assert (cot.record, cot.record_top, cot.answer_max, cot.greedy_answer) == ("top", 2, 7, False)
    assert make(**BARE, top_k=1024).top_k == VOCAB_SIZE, "no more columns than tokens"
    plain = make(**BARE)
    assert (plain.cold_entropy, plain.answer_max) == (0.0, 0)


def test_a_resolved_request_survives_the_way_to_the_engine(tokenizer):
    cot = make(tokenizer, mode="fuzzy", seed=2**53 - 1)
    wire = json.loads(json.dumps(cot.to_dict()))
    assert ResolvedCoT.from_dict(wire) == cot
