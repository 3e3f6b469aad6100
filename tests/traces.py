"""Comparing traces of the same request, and looking into the engine that made them.

The first half runs in the test: `assert_same_trace(got, want)`. The functions below the line
take the `LLM` and run inside the engine process, through ``engine.call("traces:watch")``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tiny_models
from engine_harness import Sample

from softvllm.core.phases import Phase
from softvllm.core.trace import Trace

SOFT_BOUND = 1e-3
"""Largest |h~ - h~'| / sigma of traces that count as equal (float32)."""
NUMBER_BOUND = 1e-3
"""Largest difference of log-probs (nats) and entropies of such traces."""


def sigma_of(trace: Trace) -> float:
    """The unit deviations are measured in: sigma, or what the paper's would be without noise."""
    return float(trace.meta["sigma"]) or 0.33 * float(trace.meta["rms"])


def first_difference(got: Trace, want: Trace) -> str | None:
    """Where two traces part in length, kind, phase or token; None if nowhere."""
    for name in ("kind", "phase", "token"):
        a, b = getattr(got, name), getattr(want, name)
        if len(a) != len(b):
            return f"{len(a)} positions instead of {len(b)}"
        at = np.flatnonzero(a != b)
        if len(at):
            i = int(at[0])
            return f"{name} at position {i} of {len(b)} is {int(a[i])} instead of {int(b[i])}"
    return None


def soft_deviation(got: Trace, want: Trace) -> float:
    """max |h~ - h~'| / sigma over all recorded soft inputs of traces of equal kinds."""
    if want.dense is None:
        return 0.0
    difference = got.dense_tensor().double() - want.dense_tensor().double()
    return float(difference.abs().max()) / sigma_of(want)


def number_deviation(got: Trace, want: Trace) -> float:
    """Largest difference of log-probs and entropies."""
    return max(
        float(np.abs(got.log_prob - want.log_prob).max()),
        float(np.abs(got.entropy - want.entropy).max()),
    )


def same_trace(got: Trace, want: Trace) -> bool:
    """Whether the traces agree within the bounds; the negative controls expect False."""
    return (
        first_difference(got, want) is None
        and soft_deviation(got, want) < SOFT_BOUND
        and number_deviation(got, want) < NUMBER_BOUND
    )


def assert_same_trace(got: Sample, want: Sample, name: str) -> float:
    """Assert that two runs of one request agree; returns their deviation in sigmas."""
    a, b = got.trace, want.trace
    assert got.token_ids == a.token.tolist(), f"{name}: the trace and the output disagree"
    difference = first_difference(a, b)
    assert difference is None, f"{name}: {difference}"
    assert a.meta["seed"] == b.meta["seed"], name
    assert abs(a.meta["sigma"] - b.meta["sigma"]) <= 1e-6 * abs(b.meta["sigma"]), name
    deviation = soft_deviation(a, b)
    assert deviation < SOFT_BOUND, f"{name}: soft inputs are {deviation:.1e} sigma apart"
    numbers = number_deviation(a, b)
    assert numbers < NUMBER_BOUND, f"{name}: log-probs or entropies are {numbers:.1e} apart"
    return deviation


def calm_llama(path: Path) -> Path:
    """A tiny Llama whose soft chains can be compared over twenty steps.

    The random models of `tiny_models` are chaotic under soft decoding: a difference in the last
    bit of one input grows fivefold with each pure soft step, as nothing was trained to make
    similar inputs mean similar things. Weaker layers and flatter logits slow that down, and
    `jitter_mixtures` tells which chains are safe.
    """
    with patch.multiple(tiny_models, WRITE_GAIN=8.0, QK_GAIN=1.0, LOGIT_STD=2.0):
        return tiny_models.tiny_llama(path, tied=False)


# ---- inside the engine process ------------------------------------------------------------


@dataclasses.dataclass
class Seen:
    """What the scheduler did since the last look."""

    preempted: Counter[str]  # phase the request was in (Phase name) -> preemptions
    dropped: int  # in-flight outputs that will be thrown away (drop-stale)
    hits: list[tuple[int, int, int]]  # (cached tokens found, prompt tokens, generated tokens)


def _scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def watch(llm: Any) -> None:
    """Count preemptions by phase and note every look into the prefix cache."""
    from softvllm.engine.scheduler import ledger_of

    scheduler = _scheduler(llm)
    seen = llm.seen = Seen(Counter(), 0, [])
    preempt, lookup = scheduler._preempt_request, scheduler.kv_cache_manager.get_computed_blocks

    def watched_preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        ledger = ledger_of(request)
        phase = "HARD" if ledger is None else ledger.next_phase().name
        if phase == Phase.THINK.name and not len(ledger.builder):
            phase = "PROMPT"
        llm.seen.preempted[phase] += 1
        preempt(request, *args, **kwargs)
        llm.seen.dropped += bool(request.drop_stale_output and request.num_stale_output_tokens)

    def watched_lookup(request: Any) -> Any:
        found = lookup(request)
        llm.seen.hits.append((found[1], request.num_prompt_tokens, request.num_output_tokens))
        return found

    scheduler._preempt_request = watched_preempt
    scheduler.kv_cache_manager.get_computed_blocks = watched_lookup
    assert seen is llm.seen


def look(llm: Any) -> Seen:
    """What was seen since the last look."""
    seen, llm.seen = llm.seen, Seen(Counter(), 0, [])
    return seen


def clear_cache(llm: Any) -> None:
    """Forget the prefix cache of an idle engine."""
    assert llm.reset_prefix_cache()


def reset_before_steps(llm: Any, steps: tuple[int, ...]) -> None:
    """In the next batch, preempt all running requests and drop the cache before these steps."""
    engine = llm.llm_engine
    step, wanted, count = type(engine).step, set(steps), 0

    def counted() -> Any:
        nonlocal count
        count += 1
        if count in wanted:
            assert llm.reset_prefix_cache(reset_running_requests=True)
        return step(engine)

    engine.step = counted


def stop_resets(llm: Any) -> None:
    """Undo `reset_before_steps`."""
    del llm.llm_engine.step


def replay_shadow_tokens(llm: Any, wrong: bool) -> None:
    """A mistake to be caught: resumed requests are fed their shadow tokens, as stock would."""
    from softvllm.core.trace import Kind
    from softvllm.engine.ledger import Ledger

    if not hasattr(Ledger, "right_replay"):
        Ledger.right_replay = Ledger.replay

    def wrong_replay(self: Any) -> Any:
        replay = self.right_replay()
        steps = replay.steps.copy()
        steps["kind"] = Kind.SAMPLED
        return dataclasses.replace(replay, steps=steps)

    Ledger.replay = wrong_replay if wrong else Ledger.right_replay


def share_soft_blocks(llm: Any, wrong: bool) -> None:
    """A mistake to be caught: blocks of soft positions are keyed by their shadow tokens."""
    from vllm.v1.core import kv_cache_utils

    if not hasattr(kv_cache_utils, "keyed"):
        kv_cache_utils.keyed = kv_cache_utils.generate_block_hash_extra_keys
    keyed = kv_cache_utils.keyed
    kv_cache_utils.generate_block_hash_extra_keys = keyed.__wrapped__ if wrong else keyed


def jitter_mixtures(llm: Any, relative: float) -> None:
    """Multiply every mixture by 1 + relative * N(0, 1); 0 undoes it."""
    import torch

    from softvllm.engine.embedding import SoftTable

    if not hasattr(SoftTable, "exact_reduce"):
        SoftTable.exact_reduce = SoftTable.reduce

    def jittered(self: Any, partial: torch.Tensor) -> torch.Tensor:
        mean = self.exact_reduce(partial)
        return mean * (1.0 + relative * torch.randn_like(mean))

    SoftTable.reduce = jittered if relative else SoftTable.exact_reduce


def cots_of_plain_calls(llm: Any) -> list[Any]:
    """`cot` of what `generate` and `chat` give without any extra_args, and with others'."""
    from vllm import SamplingParams

    short = SamplingParams(max_tokens=2)
    foreign = SamplingParams(max_tokens=2, extra_args={"someone": "else"})
    message = [{"role": "user", "content": "2 + 3?"}]
    outputs = [
        *llm.generate(["2 + 3 ="], use_tqdm=False),
        *llm.generate(["2 + 3 ="], short, use_tqdm=False),
        *llm.generate(["2 + 3 ="], foreign, use_tqdm=False),
        *llm.chat(message, short, use_tqdm=False),
    ]
    return [output.outputs[0].cot for output in outputs]
