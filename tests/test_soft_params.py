"""`soft_params`: which side an argument goes to."""

from __future__ import annotations

import pytest

from softvllm import CoTParams, soft_params
from softvllm.core.params import CoTParamsError


def test_fields_of_the_think_phase_and_of_the_answer_part_ways() -> None:
    params = soft_params(temperature=0.7, top_k=8, answer_top_k=5, answer_top_p=0.9, max_tokens=40)
    assert (params.top_k, params.top_p, params.max_tokens) == (5, 0.9, 40)
    assert params.extra_args["cot"]["top_k"] == 8
    assert params.extra_args["cot"]["top_p"] == 1.0


def test_temperature_is_the_answers_and_cot_temperature_the_think_phases() -> None:
    params = soft_params(temperature=0.7, cot_temperature=0.3)
    assert params.temperature == 0.7
    assert params.extra_args["cot"]["temperature"] == 0.3
    assert soft_params().temperature == 0.0


def test_ready_made_parameters_exclude_their_fields() -> None:
    cot = CoTParams(mode="fuzzy")
    assert soft_params(cot).extra_args["cot"]["mode"] == "fuzzy"
    with pytest.raises(TypeError, match="mode"):
        soft_params(cot, mode="soft")


def test_an_argument_of_neither_side_is_refused() -> None:
    with pytest.raises(TypeError, match="max_thinking"):
        soft_params(max_thinking=3)


def test_a_wrong_value_is_refused_before_any_engine_exists() -> None:
    with pytest.raises(CoTParamsError, match="top_p"):
        soft_params(top_p=1.5)


def test_a_group_of_chains_may_have_greedy_answers() -> None:
    params = soft_params(n=4)
    assert params.n == 4 and params.temperature > 0
    assert params.extra_args["cot"]["answer_greedy"] is True
    assert soft_params().extra_args["cot"]["answer_greedy"] is False
