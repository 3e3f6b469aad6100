"""What cannot be right is refused: with the field, the remedy, and before anything is scheduled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_harness import Engine, EngineError
from tiny_models import tiny_llama
from torch import nn
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from softvllm import CoTParams, CoTParamsError, soft_params
from softvllm.core.resolve import resolve
from softvllm.engine import compat, plugin
from softvllm.engine.embedding import SoftTable, find_embedding
from softvllm.engine.frontend import FrontEnd, check_engine, check_request
from softvllm.engine.llm import LLM, check_plugin

EOS = 1
VOCAB = 509

# ---- engines that cannot run CoT requests at all ------------------------------------------------


def fake_config(**changes: Any) -> SimpleNamespace:
    """The parts of a `VllmConfig` that the checks read; `changes` are dotted with two
    underscores, e.g. parallel_config__pipeline_parallel_size=2."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate",
            is_encoder_decoder=False,
            enable_prompt_embeds=False,
            is_multimodal_model=False,
            dtype=torch.float32,
            get_hidden_size=lambda: 64,
            get_vocab_size=lambda: VOCAB,
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            use_ubatching=False,
            enable_batch_sharded_sampling=False,
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        speculative_config=None,
        kv_transfer_config=None,
        watermark_config=None,
        additional_config={"softvllm": {}},
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        assert hasattr(owner, name), f"no such setting: {path}"
        setattr(owner, name, value)
    return config


ENGINE_REFUSALS = {
    "speculative decoding": ({"speculative_config": object()}, "without a speculative config"),
    "pipeline parallelism": (
        {"parallel_config__pipeline_parallel_size": 2},
        "use tensor parallelism instead",
    ),
    "KV transfer": ({"kv_transfer_config": object()}, "without kv_transfer_config"),
    "decode context parallelism": (
        {"parallel_config__decode_context_parallel_size": 2},
        "decode_context_parallel_size=1",
    ),
    "prefill context parallelism": (
        {"parallel_config__prefill_context_parallel_size": 2},
        "prefill_context_parallel_size=1",
    ),
    "dual batch overlap": ({"parallel_config__enable_dbo": True}, "enable_dbo splits"),
    "micro-batches": ({"parallel_config__use_ubatching": True}, "use_ubatching splits"),
    "sharded sampling": (
        {"parallel_config__enable_batch_sharded_sampling": True},
        "enable_batch_sharded_sampling splits",
    ),
    "a pooling model": ({"model_config__runner_type": "pooling"}, "use a stock engine"),
    "an encoder-decoder": ({"model_config__is_encoder_decoder": True}, "use a stock engine"),
    "prompt embeddings": ({"model_config__enable_prompt_embeds": True}, "start the engine without"),
    "a multimodal model": ({"model_config__is_multimodal_model": True}, "text-only checkpoint"),
    "a watermark": ({"watermark_config": object()}, "start without it"),
}


@pytest.mark.parametrize("name", ENGINE_REFUSALS)
def test_an_engine_with_a_contradicting_feature_refuses_every_cot_request(name: str) -> None:
    changes, remedy = ENGINE_REFUSALS[name]
    reason = check_engine(fake_config(**changes))
    assert reason is not None and remedy in reason
    # ... which reaches the user as an error of the request, while others are served.
    front = FrontEnd(fake_config(**changes), tokenizer=None)
    with pytest.raises(CoTParamsError, match=r"cot\.mode") as caught:
        front.admit(SamplingParams(), fake_request(soft_params(mode="soft")))
    assert remedy in str(caught.value)
    front.admit(SamplingParams(), fake_request(SamplingParams()))


def test_a_plain_engine_is_not_refused() -> None:
    assert check_engine(fake_config()) is None


# ---- requests -----------------------------------------------------------------------------------


def fake_request(params: SamplingParams, **changes: Any) -> SimpleNamespace:
    fields = {"resumable": False, "prompt_embeds": None, "lora_request": None, **changes}
    return SimpleNamespace(sampling_params=params, **fields)


REQUEST_REFUSALS: dict[str, tuple[SamplingParams, dict[str, Any], str, str]] = {
    "streaming input": (SamplingParams(), {"resumable": True}, "mode", "send the whole prompt"),
    "prompt embeddings": (
        SamplingParams(),
        {"prompt_embeds": torch.zeros(2, 4)},
        "mode",
        "send ids",
    ),
    "vLLM's thinking budget": (
        SamplingParams(thinking_token_budget=4),
        {},
        "max_think_tokens",
        "set cot.max_think_tokens only",
    ),
    "trace replay": (
        SamplingParams(trace_decode_token_ids=[5], max_tokens=1),
        {},
        "mode",
        "drop it or the CoT object",
    ),
    "repetition detection": (
        SamplingParams(
            repetition_detection=RepetitionDetectionParams(max_pattern_size=2, min_count=2)
        ),
        {},
        "mode",
        "cold_stop_entropy",
    ),
}


@pytest.mark.parametrize("name", REQUEST_REFUSALS)
def test_a_request_with_a_contradicting_parameter_is_refused(name: str) -> None:
    params, changes, field, remedy = REQUEST_REFUSALS[name]
    options = {"resumable": False, "prompt_embeds": None, **changes}
    conflict = check_request(params, **options)
    assert conflict is not None and conflict[0] == field and remedy in conflict[1]
    assert check_request(SamplingParams(), resumable=False, prompt_embeds=None) is None


def test_a_text_without_a_tokenizer_is_refused() -> None:
    common: dict[str, Any] = {"stop_ids": [EOS], "vocab_size": VOCAB, "greedy_answer": True}
    with pytest.raises(CoTParamsError, match=r"end_strings.*give token ids"):
        resolve(CoTParams(), None, **common)
    with pytest.raises(CoTParamsError, match=r"force_after_end.*give token ids"):
        resolve(CoTParams(end_strings=()), None, **common)
    ids = CoTParams(end_strings=(), force_after_end=(5,), force_after_cut=(6,))
    assert resolve(ids, None, **common).after_cut == [6]


def test_more_stop_tokens_than_a_slot_holds_are_refused() -> None:
    params = CoTParams(end_strings=(), force_after_end="", force_after_cut="")
    with pytest.raises(CoTParamsError, match="at most 32 EOS and stop token ids"):
        resolve(params, None, stop_ids=range(33), vocab_size=VOCAB, greedy_answer=True)


# ---- the real door ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    """Its trace memory holds 103 think tokens per request: 4.2e-4 GiB / 16 / (64 * 4 + 16)."""
    with Engine(
        model,
        trace_memory_gib=4.2e-4,
        # Without it vLLM itself refuses a thinking_token_budget, before we see it.
        reasoning_config={"reasoning_start_str": " the", "reasoning_end_str": " of"},
    ) as running:
        yield running


BASE: dict[str, Any] = {
    "seed": 1,
    "max_think_tokens": 4,
    "end_strings": (),
    "force_after_end": (42,),
    "force_after_cut": (40,),
    "max_tokens": 8,
}


def asked(**fields: Any) -> SamplingParams:
    return soft_params(**{**BASE, **fields})


def raw(cot: Any, **fields: Any) -> SamplingParams:
    """A CoT object as plain data, as a client that skips `soft_params` sends it."""
    return SamplingParams(extra_args={"cot": cot}, **{"max_tokens": 8, **fields})


REFUSED: dict[str, tuple[SamplingParams, str, str]] = {
    "an unknown field": (raw({"mod": "soft"}), "cot.mod", "known fields: answer_"),
    "a CoT object that is no object": (raw("soft"), "cot: ", "must be an object of fields"),
    "a value out of range": (raw({"top_p": 2.0}), "cot.top_p", "in [1e-06, 1], got 2.0"),
    "a mode that does not exist": (raw({"mode": "wet"}), "cot.mode", "hard, soft, fuzzy, mixed"),
    "a contradiction": (raw({"policy": "blend"}), "cot.policy", "only mode mixed takes a policy"),
    "a sparse record without top_k": (raw({"record": "sparse"}), "cot.record", "set top_k"),
    "a record that was given up": (raw({"record": "none"}), "cot.record", "steps, top"),
    "forged internal data": (
        SamplingParams(max_tokens=8, extra_args={"softvllm": {"policy": "soft"}}),
        "extra_args['softvllm']",
        "internal; use 'cot'",
    ),
    "a thinking_token_budget": (
        asked(thinking_token_budget=3),
        "cot.max_think_tokens",
        "set cot.max_think_tokens only",
    ),
    "repetition detection": (
        asked(repetition_detection=RepetitionDetectionParams(max_pattern_size=2, min_count=2)),
        "cot.mode",
        "repetition_detection would end the request",
    ),
    "structured output without a forced text": (
        asked(force_after_cut="", structured_outputs=StructuredOutputsParams(regex="[ab]")),
        "cot.force_after_cut",
        "give a text",
    ),
    "a budget beyond max_tokens": (
        asked(max_think_tokens=7),
        "cot.max_think_tokens",
        "raise max_tokens or lower the budget",
    ),
    "no room to think": (
        asked(max_think_tokens=None, max_tokens=2),
        "cot.max_think_tokens",
        "raise max_tokens or set max_think_tokens",
    ),
    "a budget beyond the trace memory": (
        asked(max_think_tokens=104, max_tokens=200),
        "cot.max_think_tokens",
        "104 exceeds 103, what this engine can record per request; lower the budget, or start "
        "with a larger trace_memory_gib or fewer max_num_seqs",
    ),
    "a forced text with EOS": (
        asked(force_after_cut=(40, EOS)),
        "cot.force_after_cut",
        "token 1, which ends the request",
    ),
    "a forced text with a stop token": (
        asked(force_after_end=(40, 77), stop_token_ids=[77]),
        "cot.force_after_end",
        "token 77, which ends the request",
    ),
    "a forced token outside the vocabulary": (
        asked(force_after_end=(VOCAB,)),  # a padded row exists there
        "cot.force_after_end",
        f"id {VOCAB} is outside the vocabulary of {VOCAB}",
    ),
    "an end token outside the vocabulary": (
        asked(end_token_ids=((5, VOCAB + 1),)),
        "cot.end_token_ids",
        "outside the vocabulary",
    ),
    "a forced text that is too long": (
        asked(force_after_cut=(5,) * 65, max_tokens=100),
        "cot.force_after_cut",
        "has 65 tokens, at most 64 fit",
    ),
    "an end string that is too long": (
        asked(end_strings=("0123456789" * 2,)),
        "cot.end_strings",
        "longer than 16 tokens",
    ),
}


@pytest.mark.engine
@pytest.mark.parametrize("name", REFUSED)
def test_the_engine_refuses_before_anything_is_scheduled(engine: Engine, name: str) -> None:
    params, field, message = REFUSED[name]
    with pytest.raises(EngineError) as caught:
        # One that would be served comes first: it must not be left behind.
        engine.generate([[5, 6, 7], [5, 6, 8]], [asked(), params])
    error = str(caught.value).strip().splitlines()[-1]
    assert error.startswith("softvllm.engine.errors.CoTRequestError: ")
    assert field in error and message in error
    state = engine.call("engine_probe:state")
    assert state["scheduled"] == state["front"] == state["held_bytes"] == 0
    assert state["free_slots"] == state["slots"]


@pytest.mark.engine
def test_a_derived_budget_stays_within_the_trace_memory(engine: Engine) -> None:
    sample = engine.one([5, 6, 7], asked(max_think_tokens=None, max_tokens=400, ignore_eos=True))
    assert int((sample.trace.phase == 1).sum()) == 103


@pytest.mark.engine
def test_beam_search_refuses_a_cot_object(engine: Engine) -> None:
    with pytest.raises(EngineError, match="use generate with n > 1 instead"):
        engine.call("engine_probe:beam_search", asked())


@pytest.mark.engine
def test_a_stock_engine_refuses_a_cot_object_and_serves_others(model: Path) -> None:
    with Engine(model, stock=True) as stock:
        with pytest.raises(
            EngineError, match=r"cot\.mode: this engine was started without softvllm"
        ):
            stock.one([5, 6, 7], asked())
        with pytest.raises(EngineError, match="additional_config"):
            stock.one([5, 6, 7], raw({"mode": "hard"}))
        sample = stock.one([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=4))
        assert len(sample.token_ids) == 4 and sample.trace_bytes is None


# ---- the installation ---------------------------------------------------------------------------


def test_a_plugin_list_without_softvllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    with pytest.raises(RuntimeError, match="add softvllm to the list or unset it"):
        LLM("/nowhere")
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,softvllm")
    check_plugin()


def test_a_missing_entry_point_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softvllm.engine.llm.entry_points", lambda **_: ())
    with pytest.raises(RuntimeError, match="install the package"):
        LLM("/nowhere")


def test_an_unsupported_vllm_is_refused_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.33.1+cpu")
    with pytest.raises(compat.UnsupportedVllmError) as caught:
        LLM("/nowhere")
    assert "0.32.0" in str(caught.value) and "found 0.33.1" in str(caught.value)
    assert 'pip install "softvllm[cuda]"' in str(caught.value)
    # A stock vLLM that merely shares the environment keeps working: no seam is touched.
    monkeypatch.setattr(compat, "_applied", False)
    monkeypatch.setattr(compat, "_wrap", lambda *_: pytest.fail("a seam was wrapped"))
    plugin.register()
    assert "softvllm is inactive" in caplog.text


# ---- embedding layers the mixture cannot be made from -------------------------------------------


def fake_layer(weight: Any) -> Any:
    shard = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=4)
    return SimpleNamespace(weight=weight, shard_indices=shard)


def test_a_quantised_or_odd_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float embedding table.*not quantised"):
        SoftTable(fake_layer(torch.zeros(4, 8, dtype=torch.int8)), 4)
    with pytest.raises(ValueError, match=r"no \[V, d\] weight"):
        SoftTable(fake_layer(torch.zeros(4 * 8)), 4)
    with pytest.raises(ValueError, match=r"no \[V, d\] weight"):
        SoftTable(fake_layer(None), 4)
    assert SoftTable(fake_layer(torch.ones(4, 8)), 4).rms() == 1.0


def test_a_model_without_exactly_one_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exactly one VocabParallelEmbedding.*found: none"):
        find_embedding(nn.Linear(2, 2))
