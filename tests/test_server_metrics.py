"""What clients write must not become part of the server: labels live as long as the process."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from server.context import counted
from server.metrics import FIELDS, METRICS
from server.protocol import CoTField, CoTOptions, shown
from server.rollout_request import RolloutRequest
from softvllm.engine.errors import CoTRequestError, FieldRefusal


def refusals() -> dict[str, float]:
    """`softvllm_refused_total` by field."""
    return {
        sample.labels["field"]: sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "softvllm_refused_total"
    }


def added(before: dict[str, float]) -> dict[str, float]:
    now = refusals()
    return {name: now[name] - before.get(name, 0) for name in now if now[name] != before.get(name)}


@pytest.mark.parametrize(
    ("field", "label"),
    [
        ("cot.top_k", "cot.top_k"),
        ("cot_mode", "cot_mode"),
        ("sampling.temperature", "sampling.temperature"),
        ("prompts.17.prompt_token_ids", "prompts.prompt_token_ids"),
        ("prompts.17.prompt_token_ids.5", "prompts.prompt_token_ids"),
        ("body", "body"),
        ("max_tokens", "max_tokens"),
        ("logit_bias[5]", "logit_bias"),
        ("cot.my_own", "other"),
        ("my_own", "other"),
        ("\ud800", "other"),
        ("", "other"),
        (None, "other"),
    ],
)
def test_a_refusal_is_counted_under_a_name_of_ours(field: str | None, label: str) -> None:
    before = refusals()
    METRICS.refuse(field)
    assert added(before) == {label: 1}


@given(st.text(), st.text())
def test_no_text_of_a_client_becomes_a_label(first: str, second: str) -> None:
    before = refusals()
    METRICS.refuse(f"{first}.{second}")
    for label in added(before):
        assert label == "other" or FIELDS.issuperset(label.split("."))


def test_a_refusal_inside_a_rollout_is_counted_once() -> None:
    for cot, label in (({"top_k": "3"}, "cot.top_k"), ({"unknown": 1}, "cot")):
        before = refusals()
        with pytest.raises(FieldRefusal), counted():
            RolloutRequest.model_validate({"prompts": [{"prompt": "a"}], "cot": cot})
        assert added(before) == {label: 1}
    before = refusals()
    with pytest.raises(CoTRequestError), counted():
        raise CoTRequestError.of("top_k", "too large")
    assert added(before) == {"cot.top_k": 1}


@given(st.text(st.characters() | st.sampled_from("\ud800\udfff")))
def test_what_is_shown_can_be_sent_and_is_short(text: str) -> None:
    sent = shown(text).encode()
    assert len(sent) <= 600
    if len(text) <= 100 and set(text) <= set(string.printable):
        assert sent.decode() == text


def test_the_fields_of_cot_may_be_labels() -> None:
    assert FIELDS.issuperset(CoTOptions.model_fields) and CoTField is not None
