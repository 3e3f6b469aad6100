"""The seams that `softvllm/engine/compat.py` wraps exist in the pinned vLLM, as assumed.

A new vLLM release fails here first, by name.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest

from softvllm.engine import compat

SEAMS = {
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        "self, request_id, prompt, params, supported_tasks, arrival_time, lora_request, "
        "tokenization_kwargs, trace_headers, priority, data_parallel_rank, resumable, "
        "session_id, kv_hints"
    ),
    "vllm.v1.engine.parallel_sampling:ParentRequest._get_child_sampling_params": "self, index",
    "vllm.v1.engine.core:EngineCore.__init__": (
        "self, vllm_config, executor_class, log_stats, executor_fail_callback, include_finished_set"
    ),
    "vllm.v1.engine.core:EngineCore.collective_rpc": "self, method, timeout, args, kwargs",
    "vllm.v1.engine.core:EngineCore._reset_caches": (
        "self, reset_running_requests, reset_connector"
    ),
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._prepare_weights": (
        "self, model_name_or_path, subfolder, revision, fall_back_to_pt, allow_patterns_overrides"
    ),
    "vllm.model_executor.model_loader.reload.layerwise:get_layerwise_info": "layer",
    "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls": "self",
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": (
        "request, start_token_idx, end_token_idx, start_mm_idx"
    ),
    "vllm.v1.structured_output:StructuredOutputManager._get_constraint_bounds": (
        "self, request, spec_tokens, spec_tokens_committed"
    ),
    "vllm.v1.worker.gpu_worker:Worker.load_model": "self, load_dummy_weights",
    "vllm.v1.worker.gpu_worker:Worker.reload_weights": "self, args, kwargs",
    "vllm.v1.worker.gpu_worker:Worker.finish_weight_update": "self",
    "vllm.v1.worker.gpu_worker:Worker.wake_up": "self, tags",
    "vllm.v1.engine.output_processor:RequestState.from_new_request": (
        "tokenizer, request, prompt, parent_req, request_index, queue, log_stats, stream_interval"
    ),
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": (
        "self, engine_core_outputs, engine_core_timestamp, iteration_stats, weight_version"
    ),
    "vllm.v1.engine.output_processor:RequestState._new_completion_output": (
        "self, token_ids, finish_reason, stop_reason"
    ),
    # Overridden by our scheduler and runner classes.
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": "self, request",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": "self, throttle_prefills",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "self, scheduler_output, model_runner_output"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states": "self, scheduler_output",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": (
        "self, scheduler_output, num_scheduled_tokens"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": "self, grammar_output",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.finish_requests": "self, scheduler_output",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests": "self, scheduler_output",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs": (
        "self, scheduler_output, batch_req_state, batch_desc, num_active_loras"
    ),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": "self, grammar_output",
    "vllm.v1.sample.sampler:Sampler.forward": None,
    "vllm.v1.sample.sampler:Sampler.sample": None,
    "vllm.v1.worker.gpu.sample.sampler:Sampler.sample": None,
}


def resolve(path: str) -> Any:
    module, _, names = path.partition(":")
    found: Any = import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SEAMS)
def test_the_seam_exists_with_the_expected_signature(path: str) -> None:
    expected = SEAMS[path]
    # functools.wraps keeps the original's signature where the seam is wrapped already.
    names = ", ".join(inspect.signature(resolve(path)).parameters)
    if expected is not None:
        assert names == expected


def test_the_installed_vllm_is_supported_and_applying_twice_wraps_once() -> None:
    compat.check_version()
    compat.apply()
    wrapped = [resolve(p) for p in SEAMS if hasattr(resolve(p), "__wrapped__")]
    compat.apply()
    assert [resolve(p) for p in SEAMS if hasattr(resolve(p), "__wrapped__")] == wrapped
    assert resolve("vllm.config.scheduler:SchedulerConfig.get_scheduler_cls").__wrapped__
