"""The two thin adapters between vLLM's model runners and `SoftCore`.

Both do the same four things: tell the core which requests came, went or resumed; say where
each request's input rows lie; install our sampler; send the step's record along with the
runner's output. They differ in where vLLM keeps those facts.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from softvllm.core.resolve import ResolvedCoT
from softvllm.engine import cpu_kernels, sampler
from softvllm.engine.core import SoftCore
from softvllm.engine.embedding import SoftTable, find_embedding, find_wrapper, install
from softvllm.engine.frontend import trace_memory
from softvllm.engine.keys import engine_options, resolved_dict
from softvllm.engine.records import StepRecord
from softvllm.engine.scheduler import RECORD_ATTR, REPLAY_ATTR

if TYPE_CHECKING:
    from collections.abc import Sequence

_next_key = 0


def attach(runner: Any, is_v2: bool) -> SoftCore:
    """Give a loaded model runner soft decoding; returns its core."""
    global _next_key
    _next_key += 1
    layer = find_embedding(runner.model)
    config = runner.vllm_config
    trace_memory(engine_options(config))  # a wrong option fails the start, not the first request
    core = SoftCore(
        table=SoftTable(layer, config.model_config.get_vocab_size()),
        max_num_reqs=config.scheduler_config.max_num_seqs,
        max_num_tokens=config.scheduler_config.max_num_batched_tokens,
        vocab_size=config.model_config.get_vocab_size(),
        device=runner.device,
        key=_next_key,
    )
    core.table.rms()
    _watch_weights(runner.model, core)
    install(find_wrapper(runner.model, layer), _next_key)
    if core.ops.exact_host:
        cpu_kernels.warm_up(core.table.dtype)
    runner.softvllm_core = core
    mixin = SoftRunnerV2 if is_v2 else SoftRunnerV1
    runner.__class__ = type(f"Soft{type(runner).__name__}", (mixin, type(runner)), {})
    (sampler.install_v2 if is_v2 else sampler.install_v1)(runner.sampler, core)
    return core


def _watch_weights(model: Any, core: SoftCore) -> None:
    """Weights may also arrive through the model itself (vLLM's in-place `load_weights`)."""
    load = model.load_weights

    @functools.wraps(load)
    def load_weights(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        core.refresh_weights()
        return result

    model.load_weights = load_weights


def _drop(core: SoftCore, scheduler_output: Any) -> None:
    for req_id in scheduler_output.finished_req_ids:
        core.remove(req_id)
    for req_id in scheduler_output.preempted_req_ids or ():
        core.remove(req_id)


def _add_new(core: SoftCore, scheduler_output: Any) -> None:
    replays = getattr(scheduler_output, REPLAY_ATTR, {})
    for new in scheduler_output.scheduled_new_reqs:
        raw = resolved_dict(new.sampling_params)
        if raw is None:
            continue
        assert new.prompt_token_ids is not None
        core.add(
            new.req_id,
            ResolvedCoT.from_dict(raw),
            len(new.prompt_token_ids),
            replays.get(new.req_id),
        )


class _Pending:
    """A runner output that is still on its way, plus our record (async scheduling)."""

    def __init__(self, inner: Any, record: StepRecord, copy_stream: Any, device_type: str) -> None:
        self.inner, self.record = inner, record
        self.event = None
        if device_type == "cuda":
            import torch

            main = torch.cuda.current_stream()
            with torch.cuda.stream(copy_stream):
                copy_stream.wait_stream(main)
                record.copy_to_host()
                self.event = torch.cuda.Event(blocking=True)
                self.event.record(copy_stream)

    def get_output(self) -> Any:
        output = self.inner.get_output()
        if self.event is not None:
            self.event.synchronize()
        setattr(output, RECORD_ATTR, self.record.to_host())
        return output


def _with_record(runner: Any, output: Any, copy_stream: Any) -> Any:
    """Attach the step's record, if there is one, to the runner's (maybe pending) output."""
    record = runner.sampler.softvllm_record
    runner.sampler.softvllm_record = None
    if record is None:
        return output
    from vllm.v1.outputs import AsyncModelRunnerOutput

    if isinstance(output, AsyncModelRunnerOutput):
        pending = type("SoftAsyncOutput", (_Pending, AsyncModelRunnerOutput), {})
        return pending(output, record, copy_stream, runner.device.type)
    record.copy_to_host()
    if runner.device.type == "cuda":
        import torch

        torch.cuda.current_stream().synchronize()
    setattr(output, RECORD_ATTR, record.to_host())
    return output


class SoftRunnerV1:
    """Mixin over `vllm.v1.worker.gpu_model_runner.GPUModelRunner` (and its CPU subclass)."""

    softvllm_core: SoftCore
    input_batch: Any
    requests: Any

    def _update_states(self, scheduler_output: Any) -> Any:
        core = self.softvllm_core
        _drop(core, scheduler_output)
        result = super()._update_states(scheduler_output)  # type: ignore[misc]
        _add_new(core, scheduler_output)
        replays = getattr(scheduler_output, REPLAY_ATTR, {})
        for req_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            state = self.requests[req_id]
            raw = resolved_dict(state.sampling_params)
            if raw is not None:
                core.add(
                    req_id,
                    ResolvedCoT.from_dict(raw),
                    state.num_prompt_tokens,
                    replays.get(req_id),
                )
        return result

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        # The batch's order is final here: vLLM reorders it before this call.
        batch = self.input_batch
        scheduled = np.asarray(num_scheduled_tokens)
        _place_rows(
            self.softvllm_core,
            batch.req_ids,
            batch.num_computed_tokens_cpu[: batch.num_reqs],
            scheduled,
        )
        return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]

    def shutdown(self) -> None:
        self.softvllm_core.close()
        super().shutdown()  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        stream = None
        if self.softvllm_core.device.type == "cuda":
            stream = self._get_or_create_async_output_copy_stream()  # type: ignore[attr-defined]
        return _with_record(self, output, stream)


class SoftRunnerV2:
    """Mixin over `vllm.v1.worker.gpu.model_runner.GPUModelRunner`."""

    softvllm_core: SoftCore
    output_copy_stream: Any

    def finish_requests(self, scheduler_output: Any) -> None:
        _drop(self.softvllm_core, scheduler_output)
        super().finish_requests(scheduler_output)  # type: ignore[misc]

    def add_requests(self, scheduler_output: Any) -> None:
        super().add_requests(scheduler_output)  # type: ignore[misc]
        _add_new(self.softvllm_core, scheduler_output)

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        batch = super().prepare_inputs(*args, **kwargs)  # type: ignore[misc]
        _place_rows(
            self.softvllm_core,
            batch.req_ids,
            batch.num_computed_tokens_np,
            batch.num_scheduled_tokens,
        )
        return batch

    def shutdown(self) -> None:
        self.softvllm_core.close()
        super().shutdown()  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        return _with_record(self, output, self.output_copy_stream)


def _place_rows(
    core: SoftCore, req_ids: Sequence[str], computed: np.ndarray, scheduled: np.ndarray
) -> None:
    start = np.zeros(len(scheduled), dtype=np.int64)
    np.cumsum(scheduled[:-1], out=start[1:])
    core.prepare_inputs(req_ids, computed, scheduled, start)
