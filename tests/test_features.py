"""The think phase beside vLLM's other features: each works, with the meaning documented."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import async_client
import numpy as np
import pytest
import torch
import v2_on_cpu
from engine_harness import Engine, EngineError, Sample
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_tokenizer
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from softvllm import soft_params
from softvllm.core import noise
from softvllm.core.embedding import embedding_rms, noise_sigma
from softvllm.core.phases import EndCause, Phase
from softvllm.core.trace import Kind, Trace, decode

pytestmark = pytest.mark.engine

PROMPT = [5, 60, 7, 80, 9, 70, 11, 65]  # plain ASCII: vLLM repeats the bytes of a broken character
CUT = (40, 41)
THINK, ANSWER = 8, 4
BASE: dict[str, Any] = {
    "mode": "soft",
    "seed": 1,
    "max_think_tokens": THINK,
    "end_strings": (),
    "force_after_end": (42,),
    "force_after_cut": CUT,
    "max_tokens": THINK + len(CUT) + ANSWER,
    "ignore_eos": True,
}
START = THINK + len(CUT)  # of the answer


def asked(**fields: Any) -> SamplingParams:
    return soft_params(**{**BASE, **fields})


def stock(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **fields})


def run(engine: Engine, *params: SamplingParams, **kwargs: Any) -> list[Sample]:
    """All requests in one batch, same prompt."""
    outputs = engine.generate([PROMPT] * len(params), list(params), **kwargs)
    return [samples[0] for samples in outputs]


def thoughts(sample: Sample) -> list[int]:
    trace = sample.trace
    return trace.token[trace.phase == Phase.THINK].tolist()


def answer(sample: Sample) -> list[int]:
    trace = sample.trace
    return trace.token[trace.phase == Phase.ANSWER].tolist()


def assert_same(a: Trace, b: Trace) -> None:
    assert a.token.tolist() == b.token.tolist()
    assert a.kind.tolist() == b.kind.tolist()
    assert np.allclose(a.entropy, b.entropy, atol=1e-4)
    assert (a.dense is None) == (b.dense is None)
    if a.dense is not None and b.dense is not None:
        assert np.allclose(a.dense, b.dense, atol=1e-4 * float(a.meta["sigma"]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("other"), seed=7)


# A random model would fill a JSON answer with blanks until its tokens run out.
GRAMMAR = {"backend": "xgrammar", "disable_any_whitespace": True}


@pytest.fixture(scope="module")
def v1(model: Path) -> Iterator[Engine]:
    with Engine(model, runner="v1", structured_outputs_config=GRAMMAR) as running:
        yield running


@pytest.fixture(scope="module")
def v2(model: Path) -> Iterator[Engine]:
    with Engine(model, runner="v2", structured_outputs_config=GRAMMAR) as running:
        yield running


@pytest.fixture(params=["v1", "v2"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


# ---- what the client gets -----------------------------------------------------------------------


def test_logprobs_are_those_of_the_tokens_shown(engine: Engine) -> None:
    # At tau 1 the recorded weights of the first token are the model's own probabilities.
    options = {"cot_temperature": 1.0, "record": "top", "record_top": 3, "logprobs": 2}
    soft, hard, plain = run(
        engine,
        asked(**options),
        asked(mode="hard", temperature=1.0, logprobs=2),
        asked(cot_temperature=1.0),
    )
    assert soft.token_ids == plain.token_ids  # asking for logprobs changes nothing
    for sample in (soft, hard):
        assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids)
        for token, step in zip(sample.token_ids, sample.logprobs):
            assert token in step
    trace = soft.trace
    assert trace.top_ids is not None and trace.top_weights is not None and soft.logprobs is not None
    for i in range(THINK):
        step = soft.logprobs[i]
        assert step[soft.token_ids[i]] == max(step.values())  # the shadow is the argmax
        for token, weight in zip(trace.top_ids[i, :2].tolist(), trace.top_weights[i, :2].tolist()):
            assert step[token] == pytest.approx(np.log(weight), abs=1e-4)
    # A forced token is reported with its own logprob, however unlikely.
    for i in range(THINK, START):
        assert trace.token[i] == CUT[i - THINK]
        assert soft.logprobs[i][CUT[i - THINK]] <= max(soft.logprobs[i].values())
    # Greedy answers are argmaxes; sampled tokens carry the log-prob they were drawn with.
    for i in range(START, len(trace)):
        assert soft.logprobs[i][soft.token_ids[i]] == max(soft.logprobs[i].values())
    assert hard.logprobs is not None
    for i in [*range(THINK), *range(START, len(hard.trace))]:
        drawn = hard.logprobs[i][hard.token_ids[i]]
        assert drawn == pytest.approx(float(hard.trace.log_prob[i]), abs=1e-4)


def test_stock_requests_beside_soft_ones_are_untouched(engine: Engine) -> None:
    (alone,) = run(engine, stock(logprobs=2))
    beside, _, _ = run(engine, stock(logprobs=2), asked(), asked(mode="mixed", policy="blend"))
    assert beside.token_ids == alone.token_ids and beside.trace_bytes is None
    assert alone.logprobs is not None and beside.logprobs is not None
    for a, b in zip(alone.logprobs, beside.logprobs):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], abs=1e-5) for k in a)


SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "unit": {"enum": ["cm", "kg"]}},
    "required": ["sure", "unit"],
}


def test_structured_output_shapes_the_answer_and_not_the_thoughts(engine: Engine) -> None:
    grammar = {"max_tokens": 60, "ignore_eos": False, "min_think_tokens": THINK}
    regex = StructuredOutputsParams(regex="[0-9]{3}-(yes|no)")
    schema = StructuredOutputsParams(json=SCHEMA)
    free = {"min_think_tokens": THINK, "ignore_eos": False}
    plain, by_regex, by_json, hard, neighbour, sampled = run(
        engine,
        asked(**free),
        asked(structured_outputs=regex, **grammar),
        asked(structured_outputs=schema, **grammar),
        asked(mode="hard", structured_outputs=schema, **grammar),
        stock(structured_outputs=regex, ignore_eos=False, max_tokens=30),
        asked(structured_outputs=regex, temperature=1.0, **grammar),
    )
    tokenizer = tiny_tokenizer()
    for sample in (by_regex, by_json, hard, sampled):
        assert len(thoughts(sample)) == THINK
        assert sample.token_ids[THINK:START] == list(CUT)
        assert sample.finish_reason == "stop"
    assert thoughts(by_regex) == thoughts(by_json) == thoughts(plain)
    for sample in (by_regex, sampled):
        text = tokenizer.decode(answer(sample), skip_special_tokens=True)
        assert re.fullmatch("[0-9]{3}-(yes|no)", text)
    for sample in (by_json, hard):
        found = json.loads(tokenizer.decode(answer(sample), skip_special_tokens=True))
        assert set(found) == {"sure", "unit"} and found["unit"] in ("cm", "kg")
    # The log-prob is that of the constrained distribution: its support is tiny.
    at = sampled.trace.phase == Phase.ANSWER
    assert (sampled.trace.log_prob[at] > np.log(1e-4)).all()
    assert sampled.trace.log_prob[at][-1] == 0.0  # after the last letter only EOS is allowed
    assert re.fullmatch("[0-9]{3}-(yes|no)", neighbour.text)


def test_structured_output_also_starts_after_an_end_sequence_or_a_stop_token(
    engine: Engine,
) -> None:
    (plain,) = run(engine, asked())
    at = 3
    regex = {"structured_outputs": StructuredOutputsParams(regex="(yes|no)"), "max_tokens": 40}
    ended, direct, stopped = run(
        engine,
        asked(end_token_ids=((plain.token_ids[at],),), **regex),
        asked(end_token_ids=((plain.token_ids[at],),), force_after_end="", **regex),
        asked(stop_token_ids=[plain.token_ids[at]], **regex),
    )
    first = plain.token_ids.index(plain.token_ids[at])
    assert [len(thoughts(s)) for s in (ended, direct, stopped)] == [first + 1, first + 1, first]
    causes = [s.trace.end_cause for s in (ended, direct, stopped)]
    assert causes == [EndCause.END_SEQUENCE, EndCause.END_SEQUENCE, EndCause.EOS]
    for sample in (ended, direct, stopped):
        text = tiny_tokenizer().decode(answer(sample), skip_special_tokens=True)
        assert text.startswith(("yes", "no"))


def test_penalties_and_biases_shape_the_answer_only(engine: Engine) -> None:
    (plain,) = run(engine, asked(max_tokens=30))
    favourite = answer(plain)[0]
    shaped = {
        "logit_bias": {favourite: -100.0},
        "bad_words": [tiny_tokenizer().decode([favourite])],
    }
    changes: list[dict[str, Any]] = [
        {"logit_bias": shaped["logit_bias"]},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 2.0},
        {"allowed_token_ids": [70, 71, 72]},
    ]
    samples = run(engine, *(asked(max_tokens=30, **change) for change in changes))
    for sample in samples:
        assert thoughts(sample) == thoughts(plain)
        assert sample.token_ids[THINK:START] == list(CUT)
        assert answer(sample) != answer(plain)
    biased, penalised, allowed = samples
    assert favourite not in answer(biased)
    assert len(set(answer(penalised))) == len(answer(penalised)) > len(set(answer(plain)))
    assert set(answer(allowed)) <= {70, 71, 72}


def test_min_tokens_counts_everything_and_delays_the_end_of_the_answer_only(
    engine: Engine,
) -> None:
    (plain,) = run(engine, asked(max_tokens=30))
    stop = answer(plain)[0]
    assert stop not in thoughts(plain)
    options = {"stop_token_ids": [stop], "max_tokens": 30}
    early, late = run(engine, asked(**options), asked(min_tokens=START + 5, **options))
    assert early.finish_reason == "stop" and early.stop_reason == stop
    assert len(early.token_ids) == START + 1
    assert thoughts(late) == thoughts(early) == thoughts(plain)
    assert len(late.token_ids) >= START + 5
    assert stop not in late.token_ids[: START + 5]


def test_a_stop_token_id_ends_the_answer(v1: Engine) -> None:
    (plain,) = run(v1, asked(max_tokens=30))
    tokens = answer(plain)
    stop = next(t for t in tokens[1:] if t not in thoughts(plain))
    (stopped,) = run(v1, asked(max_tokens=30, stop_token_ids=[stop]))
    assert stopped.finish_reason == "stop" and stopped.stop_reason == stop
    assert answer(stopped) == tokens[: tokens.index(stop) + 1]
    assert stopped.trace.end_cause == EndCause.BUDGET


def test_a_stop_string_applies_to_the_whole_text(v1: Engine) -> None:
    """vLLM's detokenizer looks for stop strings in all it shows: the shadow text, too.

    To end the think phase on a text, use end_strings; stop strings end the request.
    """
    tokenizer = tiny_tokenizer()

    def first_plain(sample: Sample, start: int) -> str:
        """The first printable token's text at or after `start` that was not shown before."""
        for i in range(start, len(sample.token_ids)):
            text = tokenizer.decode([sample.token_ids[i]])
            shown = tokenizer.decode(sample.token_ids[:i])
            if text.isascii() and text.strip() and text.isprintable() and text not in shown:
                return text
        raise AssertionError("no printable token")

    (plain,) = run(v1, asked(max_tokens=60, temperature=1.0))
    in_thought, in_answer = first_plain(plain, 0), first_plain(plain, START)
    thinking, answering = run(
        v1, *(asked(max_tokens=60, temperature=1.0, stop=[s]) for s in (in_thought, in_answer))
    )
    assert thinking.finish_reason == answering.finish_reason == "stop"
    assert thinking.stop_reason == in_thought and answering.stop_reason == in_answer
    assert len(thinking.token_ids) <= THINK
    assert thinking.trace.end_cause == EndCause.UNFINISHED
    assert len(thinking.trace) == len(thinking.token_ids)
    assert len(answering.token_ids) > START
    assert plain.text.startswith(answering.text) and in_answer not in answering.text


def test_the_answer_is_sampled_with_the_request_s_own_parameters(engine: Engine) -> None:
    narrow = asked(max_tokens=30, temperature=1.5)
    narrow.top_k = 1  # soft_params' own top_k is the mixture's
    greedy, hot, same, one = run(
        engine,
        asked(max_tokens=30, temperature=0.0),
        asked(max_tokens=30, temperature=1.5),
        asked(max_tokens=30, temperature=1.5),
        narrow,
    )
    assert hot.token_ids == same.token_ids  # counter-based: the row does not matter
    assert thoughts(hot) == thoughts(greedy)
    assert answer(hot) != answer(greedy)
    assert one.token_ids == greedy.token_ids and one.trace.meta["top_k"] == 0
    at = greedy.trace.phase == Phase.ANSWER
    assert (greedy.trace.log_prob[at] == 0.0).all() and (hot.trace.log_prob[at] < 0.0).any()


# ---- coming and going ---------------------------------------------------------------------------


def test_aborted_requests_leave_nothing_behind(engine: Engine) -> None:
    long = {"max_think_tokens": 200, "max_tokens": 250, "record": "dense"}
    params = [asked(seed=i, **long) for i in range(5)] + [stock(max_tokens=250)]
    before, after = engine.call("engine_probe:abort_midway", params, 6)
    assert before["scheduled"] == 6 and before["worker_requests"] == 5
    assert before["held_bytes"] >= 5 * 5 * 64 * 4 and before["soft_rows"] == 5
    assert before["free_slots"] == before["slots"] - 5
    assert after["scheduled"] == after["front"] == after["worker_requests"] == 0
    assert after["held_bytes"] == after["soft_rows"] == 0
    assert after["free_slots"] == after["slots"]
    sample, again = run(engine, asked()), run(engine, asked())
    assert_same(sample[0].trace, again[0].trace)


def test_many_short_requests_leave_nothing_behind(v1: Engine) -> None:
    modes: list[dict[str, Any]] = [
        {"mode": "soft", "record": "dense"},
        {"mode": "hard"},
        {"mode": "fuzzy", "top_k": 4, "record": "sparse"},
        {"mode": "mixed", "policy": "interleave", "record": "top"},
        {"mode": "soft", "max_think_tokens": 0},
    ]
    params = [
        asked(seed=i, **{"max_think_tokens": 3, "max_tokens": 7, **modes[i % 5]})
        for i in range(200)
    ]
    outputs = v1.generate([[5, 6, 7 + i % 50] for i in range(200)], params)
    for (sample,) in outputs:
        assert len(sample.trace) == len(sample.token_ids) == 7
    state = v1.call("engine_probe:settled_state")
    assert state["scheduled"] == state["front"] == state["worker_requests"] == 0
    assert state["held_bytes"] == state["soft_rows"] == 0
    assert state["free_slots"] == state["slots"]


# ---- weights ------------------------------------------------------------------------------------


def table_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


def test_reloaded_weights_bring_their_own_sigma(
    engine: Engine, model: Path, other_weights: Path
) -> None:
    sigma, other = (
        noise_sigma(0.33, embedding_rms(table_of(path))) for path in (model, other_weights)
    )
    assert sigma != other
    (before,) = run(engine, asked(record="dense"))
    assert before.trace.meta["sigma"] == sigma
    long = {"max_think_tokens": 12, "max_tokens": 16, "record": "dense"}
    halfway = decode(
        engine.call("engine_probe:reload_midway", asked(**long), 5, str(other_weights))
    )
    # A request that sees both says so, step by step.
    assert halfway.meta["sigma"] == sigma
    assert halfway.meta["sigmas"] == [[sigma, 0], [other, 5]]
    (changed,) = run(engine, asked(record="dense"))
    assert changed.trace.meta["sigma"] == other
    assert changed.trace.meta["rms"] == pytest.approx(embedding_rms(table_of(other_weights)))
    # What is fed really has it: the noise of position 0 over the mixture of an equal request.
    (quiet,) = run(engine, asked(noise="none", record="dense"))
    z = noise.gaussian(torch.tensor([1]), torch.tensor([0]), 64)[0]
    added = changed.trace.dense_tensor()[0] - quiet.trace.dense_tensor()[0]
    assert (added - other * z).abs().max() < 1e-4 * other
    engine.call("engine_probe:reload_weights", str(model))
    (after,) = run(engine, asked(record="dense"))
    assert_same(before.trace, after.trace)


def test_sleep_and_wake_are_survived(v1: Engine) -> None:
    """vLLM ignores them on a CPU; nothing of ours may depend on that."""
    (before,) = run(v1, asked(record="dense"))
    v1.call("engine_probe:sleep_and_wake")
    (after,) = run(v1, asked(record="dense"))
    assert_same(before.trace, after.trace)


def test_a_broken_model_is_flagged(v1: Engine) -> None:
    (before,) = run(v1, asked(record="dense"))
    assert v1.call("engine_probe:has_nan", PROMPT, asked()) is False
    v1.call("engine_probe:set_norm", float("nan"))
    try:
        assert v1.call("engine_probe:has_nan", PROMPT, asked()) is True
        (broken,) = run(v1, asked(mode="mixed", policy="blend", record="dense", temperature=1.0))
        assert np.isnan(broken.trace.entropy[:THINK]).all()
        assert all(0 <= t < 509 for t in broken.token_ids)
    finally:
        v1.call("engine_probe:set_norm", None)
    (after,) = run(v1, asked(record="dense"))
    assert_same(before.trace, after.trace)


# ---- LoRA ---------------------------------------------------------------------------------------


def write_adapter(path: Path, model: Path, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """A random rank-4 adapter on q_proj and v_proj in PEFT's format."""
    path.mkdir()
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    tensors = dict(extra or {})
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            rows, columns = weight.shape
            base = f"base_model.model.{name.removesuffix('.weight')}"
            a = torch.randn(4, columns, generator=generator) / columns**0.5
            tensors[f"{base}.lora_A.weight"] = a
            tensors[f"{base}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_lora_requests_think_softly_beside_others(tmp_path: Path, model: Path, v1: Engine) -> None:
    adapter = write_adapter(tmp_path / "adapter", model)
    touching = write_adapter(
        tmp_path / "touching",
        model,
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 509),
            "base_model.model.model.embed_tokens.lora_embedding_B": torch.zeros(64, 4),
        },
    )
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    lora = LoRARequest("tuned", 1, str(adapter))
    soft = asked(record="dense")
    # Two places: vLLM's CPU kernels give rows without an adapter the last place's (index -1).
    with Engine(model, enable_lora=True, max_lora_rank=8, max_loras=2) as engine:
        prompts = [PROMPT, PROMPT, PROMPT, PROMPT]
        params = [soft, soft, stock(), stock()]
        loras = [lora, None, None, lora]
        tuned, base, plain, tuned_plain = (
            s[0] for s in engine.generate(prompts, params, lora_request=loras)
        )
        (alone,) = (s[0] for s in engine.generate([PROMPT], [soft], lora_request=[lora]))
        for path, why in (
            (touching, "an adapter without embed_tokens"),
            (unknown, "holds no adapter_model.safetensors"),
        ):
            bad = LoRARequest(path.name, 2, str(path))
            with pytest.raises(EngineError, match=rf"cot\.mode.*{why}"):
                engine.generate([PROMPT], [soft], lora_request=[bad])
    assert_same(tuned.trace, alone.trace)
    assert thoughts(tuned) != thoughts(base)
    assert tuned_plain.token_ids != plain.token_ids
    # Without its adapter the engine is the plain one.
    (expected,) = run(v1, soft)
    assert_same(base.trace, expected.trace)
    assert (tuned.trace.kind[:THINK] == Kind.SOFT).all()


# ---- a server's engine --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the clients of an `AsyncLLM` received, its engine core in another process."""
    target = tmp_path_factory.mktemp("async") / "results"
    env = v2_on_cpu.v1_env() | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, async_client.__file__, str(model), str(target)],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return pickle.loads(target.read_bytes())


@pytest.mark.parametrize("name", async_client.STREAMS)
def test_streamed_steps_add_up_to_the_trace(served: dict[str, Any], v1: Engine, name: str) -> None:
    seen = served["streams"][name]
    chunks, whole = [decode(c) for c in seen["chunks"]], decode(seen["whole"])
    assert [t for c in chunks for t in c.token.tolist()] == seen["token_ids"]
    assert np.concatenate([c.steps for c in chunks]).tobytes() == whole.steps.tobytes()
    for array in ("top_ids", "top_weights", "sparse_ids", "sparse_weights", "dense"):
        expected = getattr(whole, array)
        parts = [getattr(c, array) for c in chunks if getattr(c, array) is not None]
        assert (expected is not None) == bool(parts)
        if expected is not None:
            assert np.concatenate(parts).tobytes() == np.ascontiguousarray(expected).tobytes()
    sizes = [len(c) for c in chunks]
    if name == "in threes":
        assert max(sizes) == 3
    elif name == "slow client":
        assert max(sizes) > 1
    # Another process, other neighbours: the same trace.
    params = soft_params(**{**async_client.REQUEST, **async_client.STREAMS[name]})
    (local,) = run(v1, params)
    assert_same(whole, local.trace)
    assert seen["text"] == local.text and seen["finish_reason"] == local.finish_reason


def test_a_cumulative_stream_hands_out_all_steps_so_far(served: dict[str, Any]) -> None:
    lengths = served["cumulative"]
    assert lengths == sorted(lengths) and lengths[-1] == async_client.REQUEST["max_tokens"]


def test_n_samples_of_a_served_request_are_the_offline_ones(
    served: dict[str, Any], v1: Engine
) -> None:
    first, again = ([decode(t) for t in group] for group in served["samples"])
    seed = async_client.REQUEST["seed"]
    assert [t.meta["seed"] for t in first] == [noise.derive_seed(seed, i) for i in range(4)]
    assert len({tuple(t.token.tolist()) for t in first}) == 4
    params = soft_params(**async_client.REQUEST, n=4, temperature=1.0, record="dense")
    (local,) = v1.generate([PROMPT], [params])
    for a, b, sample in zip(first, again, local):
        assert_same(a, b)
        assert_same(a, sample.trace)


def test_an_aborted_stream_does_not_disturb_the_next_request(served: dict[str, Any]) -> None:
    assert 10 <= served["aborted_after"] < 300
    after = decode(served["after_abort"])
    assert_same(after, decode(served["streams"]["soft"]["whole"]))


def test_a_served_refusal_keeps_its_text(served: dict[str, Any]) -> None:
    """`AsyncLLM` wraps what is no client error of its own and loses the message."""
    assert served["refusal"].startswith("CoTRequestError: cot.max_think_tokens: 12 think")


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_model_decodes_like_an_eager_one(model: Path, v1: Engine) -> None:
    """Compiled kernels round differently, and a soft step feeds what it got: the difference
    grows tenfold per step in this tiny model, so only the first steps are compared closely."""
    short = {"max_think_tokens": 4, "max_tokens": 8}
    requests = [
        asked(record="dense", **short),
        asked(mode="hard", **short),
        asked(mode="fuzzy", top_k=4, record="dense", **short),
        asked(mode="mixed", policy="blend", record="dense", **short),
    ]
    eager = run(v1, *requests, stock())
    env = {"VLLM_DISABLE_COMPILE_CACHE": "1"}
    with Engine(model, enforce_eager=False, env=env) as engine:
        assert engine.call("engine_probe:compilation_mode") != "NONE"
        compiled = run(engine, *requests, stock())
        again = run(engine, *requests, stock())
    for a, b, c in zip(eager, compiled, again):
        assert a.token_ids == b.token_ids == c.token_ids
        if a.trace_bytes is None:
            continue
        assert_same(b.trace, c.trace)
        assert a.trace.kind.tolist() == b.trace.kind.tolist()
        if a.trace.dense is not None and b.trace.dense is not None:
            gap = np.abs(a.trace.dense - b.trace.dense).max() / a.trace.meta["sigma"]
            assert gap < 1e-3
