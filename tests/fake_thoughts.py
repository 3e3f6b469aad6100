"""What `fake_server` answers: samples made from their seed alone, with a trace that fits,
and the frame of OpenAI's format around them."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np

from softvllm.core.params import CoTParams
from softvllm.core.phases import EndCause, Phase
from softvllm.core.rollout import Sample
from softvllm.core.trace import STEP, Kind, Trace, encode

MODEL = "fake-model"
WORDS = [" seven", " and", " five", " make", " twelve", " so", " we", " add"]
FORCED = " \\boxed{"
DIM = 4
INFO: dict[str, Any] = {
    "softvllm": "0.1.0",
    "vllm": "0.32.0",
    "model": MODEL,
    "dtype": "float32",
    "modes": ["hard", "soft", "fuzzy", "mixed"],
    "refusal": None,
    "default_mode": None,
    "reasoning_model": False,
    "recipe": {"end_strings": ["The final answer is:"]},
    "defaults": {"soft": {"temperature": 0.5}},
    "policies": {"blend": {"weight": {"low": 0, "high": 1, "default": 0.5}}},
    "limits": {
        "max_think_tokens": 1000,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "top_k": 1024,
        "record_top": 64,
        "seed": 2**53 - 1,
    },
    "embedding": {"rms": 0.125, "sigma": 0.0413},
    "enable_rl": False,
    "weight_version": "default",
    "held": {"requests": 0},
    "added_later": "clients ignore fields they do not know",
}
"""The answer of `GET /v1/cot/info`."""


class Thought:
    """One sample: what was thought and answered, from its seed."""

    def __init__(self, cot: CoTParams | None, seed: int, drift: int) -> None:
        self.cot = cot
        self.seed = seed
        rng = random.Random(seed + drift)
        budget = 0 if cot is None else (4 if cot.max_think_tokens is None else cot.max_think_tokens)
        self.ids = [rng.randrange(len(WORDS)) for _ in range(budget)]
        self.tokens = [WORDS[i] for i in self.ids]
        self.words = [WORDS[rng.randrange(len(WORDS))] for _ in range(64)]

    @property
    def text(self) -> str | None:
        return None if self.cot is None else "".join(self.tokens)

    @property
    def answer(self) -> str:
        return (FORCED if self.cot is not None else "") + "".join(self.words) + "}"

    def steps(self) -> list[dict[str, Any]]:
        assert self.cot is not None
        soft, width = self.cot.mode != "hard", min(self.cot.record_top, len(WORDS))
        tops = [[(i + j) % len(WORDS) for j in range(width)] for i in self.ids]
        return [
            {
                "token": WORDS[i],
                "id": i,
                "soft": soft,
                "entropy": 0.5,
                "top": [[WORDS[j], j, round(0.5 ** (k + 1), 6)] for k, j in enumerate(top)],
            }
            for i, top in zip(self.ids, tops)
        ]

    def trace(self) -> Trace:
        assert self.cot is not None
        soft = self.cot.mode != "hard"
        steps = np.zeros(len(self.ids) + 1 + len(self.words) + 1, STEP)
        steps["phase"] = Phase.ANSWER
        steps["cause"] = EndCause.BUDGET
        think = len(self.ids)
        steps["phase"][:think], steps["phase"][think] = Phase.THINK, Phase.FORCED
        steps["kind"][:think] = Kind.SOFT if soft else Kind.SAMPLED
        steps["kind"][think] = Kind.FORCED
        steps["cause"][: max(think - 1, 0)] = EndCause.UNFINISHED
        steps["token"][:think] = self.ids
        steps["entropy"][:think] = 0.5
        facts = {
            "mode": self.cot.mode,
            "policy": self.cot.policy_name,
            "tau": self.cot.tau,
            "gamma": self.cot.gamma,
            "rms": 0.125,
            "sigma": self.cot.gamma * 0.125,
            "seed": self.seed,
            "dim": DIM,
            "dtype": "float32",
            "vocab_size": len(WORDS),
            "weight_versions": [["default", 0, len(steps)]],
        }
        dense = np.full((think, DIM), float(self.seed % 97), np.float32) if soft else None
        return Trace(meta=facts, steps=steps, dense=dense)

    def block(self) -> dict[str, Any] | None:
        if self.cot is None:
            return None
        trace = self.trace()
        block = {**trace.summary(), "policy": self.cot.policy_name}
        if self.cot.record == "top":
            block["steps"] = self.steps()
        if self.cot.record in ("sparse", "dense"):
            block["trace"] = base64.b64encode(encode(trace)).decode()
        return block


def read_params(body: dict[str, Any], mode: str) -> CoTParams:
    """The parameters of a request; raises `CoTParamsError` as the server does."""
    given = {"mode": mode, **(body.get("cot") or {})}
    if given.get("record") == "trace":
        given["record"] = "steps" if given["mode"] == "hard" else "dense"
    if given["mode"] == "mixed":
        given.setdefault("policy", "blend")
    return CoTParams.from_dict(given)


def rollout_sample(i: int, k: int, prompt: dict[str, Any], thought: Thought) -> Sample:
    """Sample k of prompt i as a frame."""
    ids = prompt.get("prompt_token_ids") or [1, 2, 3]
    text = thought.text or ""
    return Sample(
        prompt=i,
        sample=k,
        prompt_ids=np.array(ids, "<i4").tobytes(),
        trace_bytes=encode(thought.trace()),
        text=text + thought.answer,
        answer_start=len(text),
        finish_reason="stop",
    )


def head(kind: str) -> dict[str, Any]:
    """What every response and chunk begins with."""
    return {"id": "x-1", "object": kind, "created": 0, "model": MODEL}


def choice(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The choices of one chunk."""
    fields = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    return {"choices": [fields | more]}


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    first = {} if "error" in content else head("chat.completion.chunk")
    return f"data: {json.dumps(first | content)}\n\n"


def usage(thoughts: list[Thought]) -> dict[str, Any]:
    """Token counts; the prompt has three."""
    think = sum(len(t.ids) for t in thoughts)
    out = think + sum(len(t.words) + 2 for t in thoughts)
    return {
        "prompt_tokens": 3,
        "completion_tokens": out,
        "total_tokens": out + 3,
        "completion_tokens_details": {"reasoning_tokens": think},
    }
