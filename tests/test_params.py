"""`CoTParams`: the paper's defaults, and a refusal with name and range for everything else."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softvllm.core.params import (
    MAX_SEED,
    CoTParams,
    CoTParamsError,
    Mode,
    Noise,
    Record,
)

fast = settings(max_examples=60, deadline=None)  # a deadline would only measure load

MIXED = {"mode": "mixed", "policy": "blend"}
NAN, INF = math.nan, math.inf
INT31 = "2147483647]"

# field (as named by the error), what is given, words the message must hold besides the field
REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    # choices
    ("mode", {"mode": "sofd"}, ["hard, soft, fuzzy, mixed", "'sofd'"]),
    ("mode", {"mode": None}, ["hard, soft, fuzzy, mixed", "None"]),
    ("mode", {"mode": ["soft"]}, ["hard, soft, fuzzy, mixed"]),
    ("mode", {"mode": 1}, ["hard, soft, fuzzy, mixed"]),
    ("noise", {"noise": "uniform"}, ["gaussian, none", "'uniform'"]),
    ("noise", {"noise": False}, ["gaussian, none"]),
    ("record", {"record": "all"}, ["steps, top, sparse, dense", "'all'"]),
    ("record", {"record": None}, ["steps, top, sparse, dense"]),
    ("answer_greedy", {"answer_greedy": 1}, ["true or false", "1"]),
    # numbers out of range
    ("temperature", {"temperature": 0.0}, ["a number in [1e-06, 100]", "0.0"]),
    ("temperature", {"temperature": -1}, ["a number in [1e-06, 100]"]),
    ("temperature", {"temperature": 100.5}, ["a number in [1e-06, 100]"]),
    ("temperature", {"temperature": NAN}, ["a number in [1e-06, 100]", "nan"]),
    ("temperature", {"temperature": INF}, ["a number in [1e-06, 100]"]),
    ("temperature", {"temperature": 10**400}, ["a number in [1e-06, 100]"]),
    ("noise_scale", {"noise_scale": -0.1}, ["a number in [0, 100]"]),
    ("noise_scale", {"noise_scale": 101}, ["a number in [0, 100]"]),
    ("noise_scale", {"noise_scale": NAN}, ["a number in [0, 100]"]),
    ("top_k", {"top_k": -1}, ["an integer in [0, 1024]"]),
    ("top_k", {"top_k": 1025}, ["an integer in [0, 1024]", "1025"]),
    # below this, float32 on the device would turn logits / tau into infinities
    ("temperature", {"temperature": 1e-39}, ["a number in [1e-06, 100]"]),
    ("top_p", {"top_p": 1e-46}, ["a number in [1e-06, 1]"]),
    ("end_strings", {"end_strings": ["x"] * 33}, ["at most 32 texts", "33"]),
    ("end_strings", {"end_strings": ["x" * 300]}, ["256 characters", "300"]),
    ("end_strings", {"end_strings": ["\ud800"]}, ["not valid Unicode"]),
    ("force_after_cut", {"force_after_cut": "x" * 300}, ["256 characters", "token ids"]),
    ("top_p", {"top_p": 0.0}, ["a number in [1e-06, 1]"]),
    ("top_p", {"top_p": 1.01}, ["a number in [1e-06, 1]"]),
    ("top_p", {"top_p": NAN}, ["a number in [1e-06, 1]"]),
    ("min_p", {"min_p": -0.01}, ["a number in [0, 1)"]),
    ("min_p", {"min_p": 1.0}, ["a number in [0, 1)"]),
    ("min_p", {"min_p": NAN}, ["a number in [0, 1)"]),
    ("seed", {"seed": -1}, ["an integer in [0, 9007199254740991]"]),
    ("seed", {"seed": MAX_SEED}, ["an integer in [0, 9007199254740991]"]),
    ("max_think_tokens", {"max_think_tokens": -1}, ["an integer in [0, " + INT31]),
    ("max_think_tokens", {"max_think_tokens": 2**31}, ["an integer in [0, " + INT31]),
    ("min_think_tokens", {"min_think_tokens": -1}, ["an integer in [0, " + INT31]),
    ("min_think_tokens", {"min_think_tokens": 10**30}, ["an integer in [0, " + INT31]),
    ("cold_stop_entropy", {"cold_stop_entropy": 0.0}, ["a number in (0, 1000]"]),
    ("cold_stop_entropy", {"cold_stop_entropy": INF}, ["a number in (0, 1000]"]),
    ("cold_stop_steps", {"cold_stop_steps": 0}, ["an integer in [1, " + INT31]),
    ("record_top", {"record_top": 0}, ["an integer in [1, 64]"]),
    ("record_top", {"record_top": 65}, ["an integer in [1, 64]"]),
    ("answer_max_tokens", {"answer_max_tokens": 0}, ["an integer in [1, " + INT31]),
    # wrong types
    ("temperature", {"temperature": "0.5"}, ["a number in [1e-06, 100]", "'0.5'"]),
    ("temperature", {"temperature": True}, ["a number in [1e-06, 100]"]),
    ("top_k", {"top_k": 5.0}, ["an integer in [0, 1024]"]),
    ("top_k", {"top_k": True}, ["an integer in [0, 1024]"]),
    ("top_k", {"top_k": None}, ["an integer in [0, 1024]"]),
    ("top_p", {"top_p": [0.9]}, ["a number in [1e-06, 1]"]),
    ("seed", {"seed": 1.5}, ["an integer in [0, 9007199254740991]"]),
    ("seed", {"seed": "1"}, ["an integer in [0, 9007199254740991]"]),
    ("max_think_tokens", {"max_think_tokens": 8.0}, ["an integer in [0, " + INT31]),
    ("cold_stop_steps", {"cold_stop_steps": None}, ["an integer in [1, " + INT31]),
    # texts and ids
    ("end_strings", {"end_strings": "The end"}, ["a list of texts"]),
    ("end_strings", {"end_strings": b"The end"}, ["a list of texts"]),
    ("end_strings", {"end_strings": None}, ["a list of texts"]),
    ("end_strings", {"end_strings": ["ok", ""]}, ["non-empty texts", "''"]),
    ("end_strings", {"end_strings": [7]}, ["non-empty texts", "7"]),
    ("end_token_ids", {"end_token_ids": "abc"}, ["a list of lists of token ids"]),
    ("end_token_ids", {"end_token_ids": 5}, ["a list of lists of token ids"]),
    ("end_token_ids", {"end_token_ids": [5, 6]}, ["a list of token ids", "5"]),
    ("end_token_ids", {"end_token_ids": ["abc"]}, ["a list of token ids", "'abc'"]),
    ("end_token_ids", {"end_token_ids": [[1, -2]]}, ["integers >= 0", "-2"]),
    ("end_token_ids", {"end_token_ids": [[1.0]]}, ["integers >= 0", "1.0"]),
    ("end_token_ids", {"end_token_ids": [[True]]}, ["integers >= 0"]),
    ("end_token_ids", {"end_token_ids": [[]]}, ["1 to 16 ids", "got 0"]),
    ("end_token_ids", {"end_token_ids": [[1] * 17]}, ["1 to 16 ids", "got 17"]),
    ("force_after_end", {"force_after_end": 7}, ["a text or a list of token ids", "7"]),
    ("force_after_end", {"force_after_end": b"x"}, ["a text or a list of token ids"]),
    ("force_after_end", {"force_after_end": None}, ["a text or a list of token ids"]),
    ("force_after_cut", {"force_after_cut": [-1]}, ["integers >= 0", "-1"]),
    ("force_after_cut", {"force_after_cut": ["a"]}, ["integers >= 0", "'a'"]),
    # policies (their numbers: test_policies.py)
    ("policy", {"mode": "mixed"}, ["blend, interleave, entropy", "None"]),
    ("policy", {"mode": "mixed", "policy": "hard"}, ["blend, interleave, entropy", "'hard'"]),
    ("policy_params", MIXED | {"policy_params": [0.5]}, ["an object of numbers"]),
    ("policy_params", MIXED | {"policy_params": None}, ["an object of numbers"]),
    ("policy_params", MIXED | {"policy_params": {"p": 0.5}}, ["weight", "'p'"]),
    # contradictions
    ("policy", {"mode": "soft", "policy": "blend"}, ["only mode mixed", "soft"]),
    ("policy", {"mode": "hard", "policy": "blend"}, ["only mode mixed", "hard"]),
    ("policy_params", {"policy_params": {"weight": 0.5}}, ["only mode mixed", "soft"]),
    ("noise", {"mode": "hard", "noise": "gaussian"}, ["hard", "soft, fuzzy or mixed"]),
    ("noise", {"mode": "hard", "noise_scale": 0.33}, ["hard", "soft, fuzzy or mixed"]),
    ("record", {"mode": "hard", "record": "dense"}, ["hard", "steps or top", "dense"]),
    ("record", {"mode": "hard", "record": "sparse", "top_k": 5}, ["hard", "steps or top"]),
    ("noise_scale", {"noise": "none", "noise_scale": 0.33}, ["noise is none", "0 or absent"]),
    ("record", {"record": "sparse"}, ["top_k (1 to 1024)", "dense"]),
    (
        "min_think_tokens",
        {"min_think_tokens": 9, "max_think_tokens": 8},
        ["max_think_tokens (8)", "got 9"],
    ),
    # unknown fields
    ("temprature", {"temprature": 0.5}, ["unknown field", "temperature", "max_think_tokens"]),
    ("", {"": 1}, ["unknown field"]),
    ("policy_name", {"policy_name": "blend"}, ["unknown field"]),
]


def test_the_table_of_refusals_covers_every_field():
    assert len(REFUSED) >= 50
    fields = {f.name for f in dataclasses.fields(CoTParams)}
    assert fields - {field for field, _, _ in REFUSED} == set()


@pytest.mark.parametrize(
    ("field", "given", "words"),
    REFUSED,
    ids=[f"{i}-{field or 'empty'}" for i, (field, _, _) in enumerate(REFUSED)],
)
def test_wrong_input_is_refused_with_field_and_range(field, given, words):
    with pytest.raises(CoTParamsError) as caught:
        CoTParams.from_dict(given)
    assert caught.value.field == field
    message = str(caught.value)
    assert message.startswith(f"cot.{field}: " if field else "cot")
    for word in words:
        assert word in message, message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("raw", [None, 5, "soft", [("mode", "soft")], [1]])
def test_something_that_is_no_object_is_refused(raw):
    with pytest.raises(CoTParamsError, match=r"^cot: must be an object of fields, got"):
        CoTParams.from_dict(raw)


def test_the_edges_of_every_range_are_allowed():
    for params in (
        {"temperature": 100, "noise_scale": 100, "top_k": 1024, "top_p": 1, "min_p": 0.9999999},
        {"temperature": 1e-6, "noise_scale": 0, "top_k": 0, "top_p": 1e-6, "min_p": 0},
        {"seed": 0, "max_think_tokens": 0, "min_think_tokens": 0, "record_top": 1},
        {"seed": MAX_SEED - 1, "max_think_tokens": 2**31 - 1, "record_top": 64},
        {"min_think_tokens": 8, "max_think_tokens": 8},
        {"cold_stop_entropy": 1000, "cold_stop_steps": 1, "answer_max_tokens": 1},
        {"end_strings": [], "end_token_ids": [[0], [1] * 16], "force_after_end": ""},
        {"force_after_end": [], "force_after_cut": [0]},
        {"mode": "hard", "noise": "none", "noise_scale": 0, "record": "top"},
        {"mode": "hard", "noise_scale": 0.0},
        {"noise": "none", "noise_scale": 0},
        {"record": "sparse", "top_k": 1},
        {"mode": "mixed", "policy": "interleave", "record": "sparse", "top_k": 3},
    ):
        CoTParams.from_dict(params)


# ---- defaults (paper section 1.1, 1.2 and 1.3) -------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "tau", "gamma", "policy"),
    [
        ("hard", 1.0, 0.0, "hard"),
        ("soft", 0.5, 0.33, "soft"),
        ("fuzzy", 1e-4, 0.33, "soft"),
        ("mixed", 0.5, 0.33, "blend"),
    ],
)
def test_each_mode_has_the_papers_defaults(mode, tau, gamma, policy):
    p = CoTParams(mode=mode, policy="blend" if mode == "mixed" else None)
    assert p.tau == tau and p.gamma == gamma and p.policy_name == policy
    assert (p.top_k, p.top_p, p.min_p) == (0, 1.0, 0.0), "the full distribution"
    assert not p.is_sparse
    assert p.end_strings == ("The final answer is:",) and p.end_token_ids == ()
    assert p.force_after_end == " \\boxed{"
    assert p.force_after_cut == " The final answer is: \\boxed{"
    assert p.min_think_tokens == 0 and p.cold_stop_entropy is None
    assert p.seed is None and p.max_think_tokens is None and p.answer_max_tokens is None
    assert p.record == "steps"


def test_the_default_mode_is_soft():
    assert CoTParams().mode == "soft"
    assert CoTParams() == CoTParams.from_dict({})


def test_the_choices_are_the_documented_ones():
    assert get_args(Mode) == ("hard", "soft", "fuzzy", "mixed")
    assert get_args(Noise) == ("gaussian", "none")
    assert get_args(Record) == ("steps", "top", "sparse", "dense")


def test_noise_can_be_turned_off_in_two_ways():
    assert CoTParams(noise="none").gamma == 0.0
    assert CoTParams(noise_scale=0).gamma == 0.0
    assert CoTParams(noise_scale=0.1).gamma == 0.1
    assert CoTParams(noise="gaussian").gamma == 0.33
    assert CoTParams(mode="hard", noise_scale=0).gamma == 0.0


def test_a_given_temperature_and_support_override_the_mode():
    assert CoTParams(mode="fuzzy", temperature=0.2).tau == 0.2
    assert CoTParams(mode="hard", temperature=0.7).tau == 0.7
    assert CoTParams(top_k=5).is_sparse


def test_parameters_cannot_be_changed_afterwards():
    p = CoTParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.mode = "hard"  # type: ignore[misc]
    assert dataclasses.replace(p, temperature=1.0).tau == 1.0
    with pytest.raises(CoTParamsError):
        dataclasses.replace(p, temperature=-1.0)


def test_the_callers_dictionary_is_not_shared():
    numbers = {"weight": 0.25}
    p = CoTParams(mode="mixed", policy="blend", policy_params=numbers)
    numbers["weight"] = 7.0
    assert p.policy_params == {"weight": 0.25}


# ---- round trip ------------------------------------------------------------------------------


@st.composite
def valid(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid object, as a client would send it: a random part of the fields."""
    mode = draw(st.sampled_from(get_args(Mode)))
    ids = st.lists(st.integers(0, 1000), max_size=16)
    budget = draw(st.integers(0, 4096))
    fields: dict[str, Any] = {
        "temperature": draw(st.one_of(st.none(), st.floats(1e-4, 100))),
        "top_p": draw(st.floats(0.01, 1)),
        "min_p": draw(st.floats(0, 0.99)),
        "seed": draw(st.one_of(st.none(), st.integers(0, MAX_SEED - 1))),
        "max_think_tokens": budget,
        "min_think_tokens": draw(st.integers(0, budget)),
        "end_strings": draw(st.lists(st.text(min_size=1, max_size=5), max_size=3)),
        "end_token_ids": draw(st.lists(ids.filter(bool), max_size=3)),
        "force_after_end": draw(st.one_of(st.text(max_size=5), ids)),
        "force_after_cut": draw(st.one_of(st.text(max_size=5), ids)),
        "cold_stop_entropy": draw(st.one_of(st.none(), st.floats(0.01, 1000))),
        "cold_stop_steps": draw(st.integers(1, 1000)),
        "record_top": draw(st.integers(1, 64)),
        "answer_max_tokens": draw(st.one_of(st.none(), st.integers(1, 1000))),
        "top_k": draw(st.integers(1, 1024)),
    }
    if mode == "mixed":
        fields["policy"] = draw(st.sampled_from(["blend", "interleave"]))
        name = {"blend": "weight", "interleave": "p"}[fields["policy"]]
        fields["policy_params"] = draw(st.sampled_from([{}, {name: 0.25}, {name: 1}]))
    if mode != "hard":
        fields["noise"] = draw(st.sampled_from([None, "gaussian", "none"]))
        fields["noise_scale"] = 0 if fields["noise"] == "none" else draw(st.floats(0, 100))
        fields["record"] = draw(st.sampled_from(get_args(Record)))
    kept = draw(st.sets(st.sampled_from(sorted(fields))))
    if mode == "mixed":
        kept |= {"policy", "policy_params"}
    if fields.get("record") == "sparse":
        kept |= {"top_k"}
    if "noise" in kept or "noise_scale" in kept:
        kept |= {"noise", "noise_scale"} & set(fields)
    if "min_think_tokens" in kept:
        kept |= {"max_think_tokens"}
    return {"mode": mode} | {name: fields[name] for name in kept}


@fast
@given(raw=valid())
def test_parameters_survive_the_way_through_json(raw):
    params = CoTParams.from_dict(raw)
    wire = json.loads(json.dumps(params.to_dict()))
    assert CoTParams.from_dict(wire) == params
    assert set(wire) == {f.name for f in dataclasses.fields(CoTParams)}
    for name, value in raw.items():
        got = getattr(params, name)
        if isinstance(value, list):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        assert got == value, name


@fast
@given(name=st.text(min_size=1, max_size=12), value=st.integers())
def test_an_unknown_field_is_always_refused(name, value):
    if name in {f.name for f in dataclasses.fields(CoTParams)}:
        return
    with pytest.raises(CoTParamsError, match="unknown field") as caught:
        CoTParams.from_dict({name: value})
    assert caught.value.field == name


@given(
    name=st.sampled_from([f.name for f in dataclasses.fields(CoTParams)]),
    value=st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary()
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=2)
        ),
        max_leaves=4,
    ),
)
@settings(max_examples=200, deadline=None)
def test_any_value_is_either_taken_or_refused_by_name(name, value):
    """Whatever a client sends, it never causes another exception."""
    try:
        params = CoTParams.from_dict({name: value})
    except CoTParamsError as error:
        assert error.field
    else:
        assert CoTParams.from_dict(params.to_dict()) == params
