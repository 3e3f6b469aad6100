"""From what a request says and leaves open to `CoTParams`: recipe, config file, flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_host import CHAT, COMPLETIONS, Server, chat_body, completion_body, joined

from server.options import MODES, ServerOptions, load_config, with_flags
from server.protocol import CoTOptions, build_cot, trace_record, wants_trace
from softvllm.core.params import PAPER_AFTER_CUT, PAPER_AFTER_END, PAPER_END_STRING, CoTParams
from softvllm.core.recipe import is_reasoning_model, marker_ids, recipe_for
from softvllm.engine.errors import CoTRequestError


class Tokenizer:
    """All that the recipe asks of a tokenizer."""

    def __init__(self, *tokens: str) -> None:
        self.vocab = {token: i for i, token in enumerate(tokens)}

    def get_vocab(self) -> dict[str, int]:
        return self.vocab


PLAIN, THINKING = Tokenizer("a", "b"), Tokenizer("a", "<think>", "</think>")
NONE = ServerOptions()


def built(
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    server: ServerOptions = NONE,
    tokenizer: Any = PLAIN,
    free: bool = False,
) -> CoTParams:
    model = None if options is None else CoTOptions.model_validate(options)
    cot = build_cot(mode, model, server, tokenizer, free_answer=free)
    assert cot is not None
    return cot


# ---- the recipe ---------------------------------------------------------------------------------


def test_a_plain_model_follows_the_paper() -> None:
    assert recipe_for(PLAIN) == {
        "end_strings": [PAPER_END_STRING],
        "force_after_end": PAPER_AFTER_END,
        "force_after_cut": PAPER_AFTER_CUT,
    }
    assert not is_reasoning_model(PLAIN) and marker_ids(PLAIN) == frozenset()


def test_a_model_with_the_marker_ends_thinking_there() -> None:
    recipe = recipe_for(THINKING)
    assert recipe["end_strings"] == ["</think>"] and recipe["force_after_end"] == ""
    assert "</think>" in recipe["force_after_cut"]
    assert is_reasoning_model(THINKING) and marker_ids(THINKING) == {1, 2}
    assert recipe_for(THINKING, free_answer=True) == recipe


def test_half_a_pair_of_markers_is_enough_to_end() -> None:
    only = Tokenizer("x", "</think>")
    assert is_reasoning_model(only) and marker_ids(only) == {1}
    assert not is_reasoning_model(Tokenizer("<think>")) and not is_reasoning_model(None)


def test_text_of_ours_is_not_put_before_an_answer_that_is_parsed() -> None:
    recipe = recipe_for(PLAIN, free_answer=True)
    assert recipe["force_after_end"] == recipe["force_after_cut"] == "\n"


@pytest.mark.parametrize("tokenizer", [PLAIN, THINKING, None])
@pytest.mark.parametrize("free", [False, True])
def test_every_recipe_is_valid(tokenizer: Any, free: bool) -> None:
    recipe = recipe_for(tokenizer, free_answer=free)
    assert CoTParams.from_dict({"mode": "soft", **recipe}).end_strings


# ---- what a request becomes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "options", "default", "want"),
    [
        (None, None, None, None),
        ("hard", None, None, None),
        ("hard", None, "soft", None),
        (None, None, "hard", None),
        (None, None, "fuzzy", "fuzzy"),
        ("soft", None, None, "soft"),
        ("soft", None, "fuzzy", "soft"),
        ("hard", {}, None, "hard"),
        (None, {}, None, "soft"),
        (None, {}, "hard", "hard"),
        (None, {}, "mixed", "mixed"),
        (None, {"mode": "fuzzy"}, "mixed", "fuzzy"),
        ("mixed", {"mode": "mixed"}, None, "mixed"),
    ],
)
def test_who_decides_the_mode(
    mode: str | None, options: dict[str, Any] | None, default: str | None, want: str | None
) -> None:
    model = None if options is None else CoTOptions.model_validate(options)
    cot = build_cot(mode, model, ServerOptions(default_mode=default), PLAIN)
    assert (cot and cot.mode) == want


@pytest.mark.parametrize(("mode", "other"), [("soft", "hard"), ("hard", "mixed")])
def test_two_modes_are_refused(mode: str, other: str) -> None:
    with pytest.raises(CoTRequestError, match=f"{other}.*{mode}") as caught:
        built(mode, {"mode": other})
    assert caught.value.parameter == "cot.mode"


def test_the_request_wins_over_the_file_and_the_file_over_the_recipe() -> None:
    server = ServerOptions(cot={"force_after_end": "F", "max_think_tokens": 9, "noise_scale": 0.1})
    cot = built("soft", {"max_think_tokens": 5}, server)
    assert (cot.max_think_tokens, cot.noise_scale) == (5, 0.1)
    assert (cot.force_after_end, cot.force_after_cut) == ("F", PAPER_AFTER_CUT)
    assert built("soft", {"force_after_end": ""}, server).force_after_end == ""


@pytest.mark.parametrize("field", [{"end_token_ids": [[5]]}, {"end_strings": ["stop"]}])
def test_a_request_that_says_how_thinking_ends_means_only_that(field: dict[str, Any]) -> None:
    cot = built("soft", field)
    assert cot.end_strings == tuple(field.get("end_strings", cot.end_strings))
    if "end_token_ids" in field:
        assert THINKING and cot.end_token_ids == ((5,),)


def test_a_parsed_answer_loses_the_files_forced_text_but_not_the_requests() -> None:
    server = ServerOptions(cot={"force_after_end": "F", "force_after_cut": "F"})
    cot = built("soft", {}, server, free=True)
    assert cot.force_after_end == cot.force_after_cut == "\n"
    assert built("soft", {"force_after_cut": "{"}, server, free=True).force_after_cut == "{"


@pytest.mark.parametrize("mode", MODES)
def test_defaults_for_one_mode_do_not_break_the_others(mode: str) -> None:
    server = ServerOptions(
        cot={
            "noise": "gaussian",
            "noise_scale": 0.2,
            "policy": "interleave",
            "policy_params": {"p": 0.3},
            "record": "dense",
        }
    )
    cot = built(mode, {}, server)
    assert cot.mode == mode
    assert cot.policy == ("interleave" if mode == "mixed" else None)
    assert cot.record == ("steps" if mode == "hard" else "dense")


def test_a_policy_of_the_request_drops_the_files_parameters() -> None:
    server = ServerOptions(cot={"policy": "interleave", "policy_params": {"p": 0.3}})
    cot = built("mixed", {"policy": "blend"}, server)
    assert (cot.policy, dict(cot.policy_params)) == ("blend", {})
    assert built("mixed", {}).policy == "blend"


@pytest.mark.parametrize(
    ("mode", "top_k", "want"), [("hard", 0, "steps"), ("soft", 0, "dense"), ("fuzzy", 4, "sparse")]
)
def test_a_trace_records_what_rebuilds_the_inputs(mode: str, top_k: int, want: str) -> None:
    assert trace_record(mode, top_k) == want
    options = {"record": "trace", **({"top_k": top_k} if top_k else {})}
    assert built(mode, options).record == want
    assert wants_trace(CoTOptions.model_validate(options))
    assert not wants_trace(None) and not wants_trace(CoTOptions.model_validate({"record": "top"}))


fields = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(1e-6, 100),
        "top_k": st.integers(0, 1024),
        "top_p": st.floats(1e-6, 1),
        "seed": st.integers(0, 2**53 - 1),
        "max_think_tokens": st.integers(8, 2**31 - 1),
        "min_think_tokens": st.integers(0, 8),
        "end_strings": st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
        "force_after_cut": st.one_of(
            st.text(max_size=9).filter(lambda s: s.isascii()), st.lists(st.integers(0, 99))
        ),
        "record_top": st.integers(1, 64),
        "answer_greedy": st.booleans(),
    },
)


@settings(deadline=None)
@given(mode=st.sampled_from(MODES), given_fields=fields)
def test_what_a_request_gives_arrives_unchanged(mode: str, given_fields: dict[str, Any]) -> None:
    raw = json.loads(json.dumps(given_fields))
    got = built(mode, raw).to_dict()
    assert {name: got[name] for name in raw} == raw and got["mode"] == mode


# ---- the server's own options -------------------------------------------------------------------


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cot.toml"
    path.write_text(text)
    return path


def test_a_file_and_flags_make_the_options(tmp_path: Path) -> None:
    path = config(tmp_path, 'default_mode = "soft"\n[cot]\nmax_think_tokens = 99\n')
    options = load_config(path)
    assert options == ServerOptions(default_mode="soft", cot={"max_think_tokens": 99})
    flagged = with_flags(options, default_mode="fuzzy", enable_rl=True)
    assert (flagged.default_mode, flagged.enable_rl, flagged.cot) == ("fuzzy", True, options.cot)
    assert with_flags(options, default_mode=None, enable_rl=False).default_mode == "soft"


def test_options_survive_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServerOptions(default_mode="mixed", cot={"end_strings": ["Ende: \u00fc"]})
    for name, value in options.to_env().items():
        monkeypatch.setenv(name, value)
    assert ServerOptions.from_env() == options
    monkeypatch.delenv(next(iter(options.to_env())))
    assert ServerOptions.from_env() == ServerOptions()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("default_mode = 'liquid'", "hard, soft, fuzzy, mixed"),
        ("default_mode = 5", "default mode"),
        ("mode = 'soft'", "mode"),
        ("cot = 5", "table"),
        ("[cot]\nmode = 'soft'", "default_mode"),
        ("[cot]\nseed = 5", "requests choose"),
        ("[cot]\ntemprature = 1", "temprature"),
        ("[cot]\ntemperature = 0", "temperature"),
        ("[cot]\ntemperature = nan", "temperature"),
        ("[cot]\nend_strings = 'x'", "end_strings"),
        ("[cot]\npolicy = 'nope'", "nope"),
        ("[cot]\nrecord = 'sparse'", "top_k"),
        ("[cot]\nmax_think_tokens = 1979-05-27", "max_think_tokens"),
        ("[cot", "TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        load_config(config(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.toml.*No such file"):
        load_config(tmp_path / "nowhere.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"not TOML"):
        load_config(binary)


# ---- requests that cannot bear the server's default ---------------------------------------------

CANNOT_THINK: list[dict[str, Any]] = [
    {"max_tokens": 1},
    {"max_tokens": 2},
    {"max_tokens": 4, "n": 2, "temperature": 1.0},
    {"repetition_penalty": 1e7},
    {"use_beam_search": True, "n": 2, "max_tokens": 3},
]


@pytest.mark.engine
@pytest.mark.parametrize("fields", CANNOT_THINK, ids=lambda fields: next(iter(fields)))
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_request_that_cannot_bear_the_default_is_decoded_as_by_stock(
    thinking_server: Server, path: str, fields: dict[str, Any]
) -> None:
    body = (chat_body if path == CHAT else completion_body)(seed=3, **fields)
    choices = thinking_server.ok(path, body)["choices"]
    assert len(choices) == fields.get("n", 1)
    assert not any("cot" in choice for choice in choices)
    stock = thinking_server.ok(path, {**body, "cot_mode": "hard"})["choices"]
    assert choices == stock


@pytest.mark.engine
def test_a_streamed_request_falls_back_too(thinking_server: Server) -> None:
    for path, body in ((CHAT, chat_body(max_tokens=2)), (COMPLETIONS, completion_body())):
        body = {**body, "max_tokens": 2}
        field = "content" if path == CHAT else "text"
        chunks = thinking_server.stream(path, body)
        assert not any("cot" in choice for chunk in chunks for choice in chunk["choices"])
        stock = thinking_server.stream(path, {**body, "cot_mode": "hard"})
        assert joined(chunks, field) == joined(stock, field) != ""
    assert not any(thinking_server.settle().values())


@pytest.mark.engine
@pytest.mark.parametrize("given_fields", [{"cot_mode": "soft"}, {"cot": {}}])
def test_a_request_that_asked_itself_is_still_refused(
    thinking_server: Server, given_fields: dict[str, Any]
) -> None:
    for path, body in ((CHAT, chat_body()), (COMPLETIONS, completion_body())):
        answer = thinking_server.post(path, {**body, **given_fields, "max_tokens": 2})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "cot.max_think_tokens"


@pytest.mark.engine
def test_a_mistake_is_no_reason_to_fall_back(thinking_server: Server) -> None:
    assert thinking_server.post(CHAT, chat_body(max_tokens=-1)).status_code == 400
    assert thinking_server.post(CHAT, chat_body(temperature=-1)).status_code == 400


@pytest.mark.engine
def test_fallbacks_and_modes_are_counted(thinking_server: Server) -> None:
    def counted(name: str) -> float:
        lines = thinking_server.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = [
        "softvllm_default_fallbacks_total",
        'softvllm_requests_total{mode="stock"}',
        'softvllm_requests_total{mode="fuzzy"}',
        "softvllm_refused_total",
    ]
    before = [counted(name) for name in names]
    thinking_server.chat(max_tokens=1)
    thinking_server.chat(max_tokens=20)
    thinking_server.complete(cot_mode="hard")
    after = [counted(name) for name in names]
    assert [now - then for now, then in zip(after, before)] == [1, 2, 1, 0]
