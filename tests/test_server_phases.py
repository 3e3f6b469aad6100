"""Splitting visible text by phase, and the `cot` block: no server, made-up samples."""

from __future__ import annotations

import asyncio
import base64
import json
from array import array
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server import plugin
from server.chat import SoftChatRequest
from server.completions import SoftCompletionRequest
from server.phases import PhaseSplitter, answer_start
from server.report import NanLogitsError, final_block, has_nan, think_steps
from softvllm.core.phases import Phase
from softvllm.core.trace import STEP, Kind, Trace, TraceBuilder, decode, encode
from softvllm.engine.outputs import CoTStream

MARKER = 7
"""A token shown on neither side."""


@dataclass
class Token:
    """One position of a sample: what the detokenizer made of it, possibly nothing yet."""

    id: int
    phase: Phase
    text: str


texts = st.text(alphabet="ab\n\u00e9\U0001f600\ufffd", max_size=3)
tokens = st.builds(lambda id, text: (id, text), st.integers(0, 9), st.one_of(st.just(""), texts))


@st.composite
def samples(draw: st.DrawFn) -> list[Token]:
    """Thoughts, forced tokens and an answer; each may be empty, each token may be silent."""
    out = []
    for phase in (Phase.THINK, Phase.FORCED, Phase.ANSWER):
        out += [Token(id, phase, text) for id, text in draw(st.lists(tokens, max_size=6))]
    return out


def knows(stream: CoTStream, sample: list[Token], count: int) -> None:
    """Let the stream have received the first `count` tokens."""
    for t in range(len(stream.offsets), count):
        step = np.zeros(1, STEP)
        step["phase"], step["token"] = sample[t].phase, sample[t].id
        stream.builder.append(step.tobytes(), b"", b"", b"")
        stream.offsets.append(sum(len(token.text) for token in sample[:t]))


def empty_stream() -> CoTStream:
    return CoTStream(cot=None, builder=TraceBuilder(), offsets=array("i"))  # type: ignore[arg-type]


def hidden(token: Token) -> bool:
    return token.id == MARKER and token.phase != Phase.ANSWER


def late(sample: list[Token], text: str) -> str:
    """What of the answer side's text are the remains of an unfinished thought."""
    thoughts = [token for token in sample if token.phase == Phase.THINK]
    silent = bool(thoughts) and len(thoughts) < len(sample) and not thoughts[-1].text
    return text[: len(text) - len(text.lstrip("\ufffd"))] if silent else ""


def expected(sample: list[Token], length: int) -> tuple[str, str]:
    """(reasoning, content) of the first `length` characters."""
    sides, left = ["", ""], length
    for token in sample:
        shown, left = token.text[:left], max(0, left - len(token.text))
        if not hidden(token):
            sides[token.phase != Phase.THINK] += shown
    remains = late(sample, sides[1])
    return sides[0] + remains, sides[1].removeprefix(remains)


@settings(deadline=None)
@given(data=st.data(), sample=samples())
def test_any_chopping_gives_the_same_split(data: st.DataObject, sample: list[Token]) -> None:
    """Text may come later than its tokens (stop strings, unfinished characters), never sooner."""
    whole = "".join(token.text for token in sample)
    stream, splitter = empty_stream(), PhaseSplitter({MARKER})
    reasoning, content, ids, shown = "", "", [], 0
    while len(stream.offsets) < len(sample):
        count = data.draw(st.integers(len(stream.offsets) + 1, len(sample)))
        knows(stream, sample, count)
        available = sum(len(token.text) for token in sample[:count])
        upto = data.draw(st.integers(shown, available))
        split = splitter.feed(stream, whole[shown:upto])
        reasoning, content, shown = reasoning + split.reasoning, content + split.content, upto
        ids += split.content_ids or []
    # The rest at the end, or, where a stop string was found, a part of it.
    upto = data.draw(st.integers(shown, len(whole)))
    split = splitter.feed(stream, whole[shown:upto])
    assert (reasoning + split.reasoning, content + split.content) == expected(sample, upto)
    assert split.content_ids == [] or not sample or not ids
    answer_side = [t.id for t in sample if t.phase != Phase.THINK and not hidden(t)]
    assert ids + (split.content_ids or []) == answer_side


@settings(deadline=None)
@given(sample=samples())
def test_the_answer_starts_after_the_thoughts(sample: list[Token]) -> None:
    stream = empty_stream()
    knows(stream, sample, len(sample))
    whole = "".join(token.text for token in sample)
    thought = "".join(token.text for token in sample if token.phase == Phase.THINK)
    thought += late(sample, whole.removeprefix(thought))
    assert answer_start(stream, whole) == len(thought)
    assert answer_start(stream, whole[:1]) == min(1, len(thought))


def test_a_character_finished_by_the_answer_belongs_to_the_answer() -> None:
    sample = [
        Token(1, Phase.THINK, "so "),
        Token(2, Phase.THINK, ""),  # first byte of the character
        Token(3, Phase.FORCED, "\u00e9"),
        Token(4, Phase.ANSWER, "!"),
    ]
    stream, splitter = empty_stream(), PhaseSplitter(())
    pieces = []
    for t, token in enumerate(sample):
        knows(stream, sample, t + 1)
        pieces.append(splitter.feed(stream, token.text))
    assert [p.reasoning for p in pieces] == ["so ", "", "", ""]
    assert [p.content for p in pieces] == ["", "", "\u00e9", "!"]


def test_a_character_the_thoughts_left_unfinished_stays_with_them() -> None:
    sample = [
        Token(1, Phase.THINK, "so "),
        Token(2, Phase.THINK, ""),  # first byte of a character that never comes
        Token(3, Phase.FORCED, "\ufffd\n"),
        Token(4, Phase.ANSWER, "{}"),
    ]
    stream, splitter = empty_stream(), PhaseSplitter(())
    knows(stream, sample, len(sample))
    split = splitter.feed(stream, "so \ufffd\n{}")
    assert (split.reasoning, split.content) == ("so \ufffd", "\n{}")
    assert answer_start(stream, "so \ufffd\n{}") == 4


def test_markers_are_hidden_before_the_answer_only() -> None:
    sample = [
        Token(MARKER, Phase.THINK, "<think>"),
        Token(1, Phase.THINK, "a"),
        Token(2, Phase.FORCED, "\n"),
        Token(MARKER, Phase.FORCED, "</think>"),
        Token(3, Phase.ANSWER, "b"),
        Token(MARKER, Phase.ANSWER, "</think>"),
    ]
    stream = empty_stream()
    knows(stream, sample, len(sample))
    split = PhaseSplitter({MARKER}).feed(stream, "".join(t.text for t in sample))
    assert (split.reasoning, split.content) == ("a", "\nb</think>")
    assert split.content_ids == [2, 3, MARKER]


# ---- the cot block ------------------------------------------------------------------------------


def trace(entropies: list[float], answer: int = 2, width: int = 3) -> Trace:
    """A sample of soft think steps with top tokens, then an answer."""
    steps = np.zeros(len(entropies) + answer, STEP)
    count = len(entropies)
    steps["phase"] = [Phase.THINK] * count + [Phase.ANSWER] * answer
    steps["kind"] = [Kind.SOFT] * count + [Kind.SAMPLED] * answer
    steps["cause"] = [0] * count + [2] * answer
    steps["token"] = range(count + answer)
    steps["entropy"][:count] = entropies
    meta: dict[str, Any] = {"mode": "soft", "policy": "soft", "tau": 0.5, "sigma": 0.1, "seed": 3}
    meta["weight_versions"] = [["default", 0, count + answer]]
    return Trace(
        meta=meta,
        steps=steps,
        top_ids=np.tile(np.arange(width, dtype="<i4"), (count, 1)),
        top_weights=np.tile(np.array([0.7, 0.3, 0.0], "<f4")[:width], (count, 1)),
    )


def output(whole: Trace) -> Any:
    """What `final_block` reads of a `CoTOutput`."""
    return SimpleNamespace(trace=whole, steps=whole)


def word(token: int) -> str:
    return f"<{token}>"


def test_the_block_is_plain_json_and_carries_what_was_asked() -> None:
    whole = trace([1.0, 0.5])
    plain = final_block(output(whole), trace=False, top=False, decode=word)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["think_tokens"] == 2 and plain["answer_tokens"] == 2
    assert plain["mean_entropy"] == 0.75 and plain["end_cause"] == "budget"
    assert not {"steps", "trace"} & set(plain)
    full = final_block(output(whole), trace=True, top=True, decode=word)
    back = decode(base64.b64decode(full.pop("trace")))
    assert encode(back) == encode(whole) and len(full.pop("steps")) == 2
    assert full == plain


def test_steps_show_tokens_and_weights_above_zero() -> None:
    (first, second) = think_steps(trace([1.0, 0.25]), word)
    assert first == {
        "token": "<0>",
        "id": 0,
        "soft": True,
        "entropy": 1.0,
        "top": [["<0>", 0, 0.7], ["<1>", 1, 0.3]],
    }
    assert second["id"] == 1 and second["entropy"] == 0.25


def test_answer_tokens_are_no_think_steps() -> None:
    assert think_steps(trace([], answer=1), word) == []
    assert len(think_steps(trace([1.0], answer=3), word)) == 1


@pytest.mark.parametrize("at", [0, 2])
def test_nan_is_an_error_and_never_a_number(at: int) -> None:
    entropies = [1.0, 0.5, 0.25]
    entropies[at] = float("nan")
    whole = trace(entropies)
    with pytest.raises(NanLogitsError, match="NaN"):
        final_block(output(whole), trace=False, top=False, decode=word)
    with pytest.raises(NanLogitsError, match="checkpoint"):
        think_steps(whole, word)


@pytest.mark.parametrize("at", [1, 2])
def test_nan_in_the_answer_is_an_error_too(at: int) -> None:
    """Entropy is 0 there; what shows is the log-prob of the token that was drawn."""
    whole = trace([1.0], answer=2)
    assert not has_nan(whole)
    whole.log_prob[at] = float("nan")
    assert has_nan(whole)
    with pytest.raises(NanLogitsError, match="NaN"):
        final_block(output(whole), trace=False, top=False, decode=word)


@pytest.mark.parametrize("route", ["chat", "completion"])
def test_nan_is_answered_and_not_raised(monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    """An exception that reaches uvicorn costs the client its connection."""

    async def broken(*_: Any) -> None:
        raise NanLogitsError

    async def admitted(*_: Any) -> None:
        pass

    monkeypatch.setattr(plugin, "_admit", admitted)
    monkeypatch.setattr(plugin.stock_chat, "create_chat_completion", broken)
    monkeypatch.setattr(plugin.stock_completion, "create_completion", broken)
    raw: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(softvllm=None)))
    if route == "chat":
        chat = SoftChatRequest(messages=[{"role": "user", "content": "Hi"}])
        answer = asyncio.run(plugin.create_chat_completion(chat, raw))
    else:
        completion = SoftCompletionRequest(prompt="Hi")
        answer = asyncio.run(plugin.create_completion(completion, raw))
    assert answer.status_code == 500
    assert "NaN" in json.loads(answer.body)["error"]["message"]
