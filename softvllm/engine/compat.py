"""Every place where softvllm reaches into vLLM, guarded by version.

vLLM stays as installed; these wrappers go around a handful of its methods in each process.
All are no-ops for engines that did not enable softvllm and for requests without a CoT object.
`tests/test_compat.py` holds each seam against the pinned release, so that a new vLLM fails
there first.
"""

from __future__ import annotations

import functools
from typing import Any

from softvllm.engine.keys import WIRE_KEY, engine_options, resolved_dict

SUPPORTED_VLLM = ("0.32.0",)
_applied = False


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is not one this softvllm was tested with."""


def installed_version() -> str:
    """Release of the installed vLLM, without local suffixes such as +cpu."""
    import vllm

    return vllm.__version__.split("+")[0]


def check_version() -> None:
    """Raise `UnsupportedVllmError` with the remedy on any other vLLM."""
    version = installed_version()
    if version not in SUPPORTED_VLLM:
        raise UnsupportedVllmError(
            f"softvllm works with vLLM {', '.join(SUPPORTED_VLLM)}, found {version}. Install the "
            f'supported one: pip install "softvllm[cuda]" (GPU) or "softvllm[cpu]" (CPU).'
        )


def apply() -> None:
    """Wrap the seams, once per process."""
    global _applied
    if _applied:
        return
    check_version()
    _patch_input_processor()
    _patch_parallel_sampling()
    _patch_scheduler()
    _patch_prefix_cache()
    _patch_structured_output()
    _patch_engine_core()
    _patch_worker()
    _patch_weight_updates()
    _patch_output_processor()
    _applied = True


def _wrap(owner: Any, name: str, make: Any) -> None:
    """Replace owner.name by make(original), keeping name and signature."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def _patch_input_processor() -> None:
    """Front end: validate and resolve the CoT object of each request."""
    from vllm.v1.engine.input_processor import InputProcessor

    from softvllm.core.params import CoTParamsError
    from softvllm.engine.errors import CoTRequestError
    from softvllm.engine.frontend import FrontEnd

    def process_inputs(original: Any) -> Any:
        def wrapped(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any):
            request = original(self, request_id, prompt, params, *args, **kw)
            if getattr(params, "extra_args", None):
                front = getattr(self, "softvllm_front", None)
                if front is None:
                    front = self.softvllm_front = FrontEnd(self.vllm_config, self.tokenizer)
                try:
                    front.admit(params, request)
                except CoTParamsError as error:
                    raise CoTRequestError(error) from None
            return request

        return wrapped

    _wrap(InputProcessor, "process_inputs", process_inputs)


def _patch_parallel_sampling() -> None:
    """n > 1: each sample gets its own derived seed and cache nonce."""
    from copy import copy

    from vllm.v1.engine.parallel_sampling import ParentRequest

    from softvllm.engine.frontend import child_extra_args

    def child_params(original: Any) -> Any:
        def wrapped(self: Any, index: int) -> Any:
            params = original(self, index)
            if resolved_dict(params) is None:
                return params
            child = copy(params)
            child.extra_args = child_extra_args(self.sampling_params.extra_args, index)
            return child

        return wrapped

    _wrap(ParentRequest, "_get_child_sampling_params", child_params)


def _patch_scheduler() -> None:
    """Engine core: our mixin over whichever scheduler vLLM picks.

    The scheduler's config does not know of softvllm, so it hands out a factory that looks at
    the engine's config. (`EngineCore.__init__` would be too late a seam: in a process of its own
    that very call loads the plugin.)
    """
    from vllm.config.scheduler import SchedulerConfig

    from softvllm.engine.scheduler import with_soft

    def get_scheduler_cls(original: Any) -> Any:
        def wrapped(self: Any) -> Any:
            chosen = original(self)

            def build(*, vllm_config: Any, **kw: Any) -> Any:
                soft = engine_options(vllm_config) is not None
                return (with_soft(chosen) if soft else chosen)(vllm_config=vllm_config, **kw)

            return build

        return wrapped

    _wrap(SchedulerConfig, "get_scheduler_cls", get_scheduler_cls)


def _patch_prefix_cache() -> None:
    """Blocks that hold soft positions are keyed by the sample's nonce.

    The prompt's blocks stay shared; a block with any generated position of a request that may
    feed mixtures matches only this request itself (after a preemption).
    """
    from vllm.v1.core import block_pool, kv_cache_utils

    def extra_keys(original: Any) -> Any:
        def wrapped(request: Any, start: int, end: int, start_mm_idx: int) -> Any:
            keys, mm_idx = original(request, start, end, start_mm_idx)
            raw = resolved_dict(request.sampling_params)
            if raw is None or raw["policy"] == "hard" or end <= request.num_prompt_tokens:
                return keys, mm_idx
            return (*(keys or ()), (WIRE_KEY, str(raw["nonce"]))), mm_idx

        return wrapped

    _wrap(kv_cache_utils, "generate_block_hash_extra_keys", extra_keys)
    # Imported by name there, for the KV events that cache-aware routers read.
    block_pool.generate_block_hash_extra_keys = kv_cache_utils.generate_block_hash_extra_keys


def _patch_structured_output() -> None:
    """The grammar constrains the answer phase only."""
    from vllm.v1.structured_output import ConstraintBounds, StructuredOutputManager

    from softvllm.engine.scheduler import is_constrained

    def bounds(original: Any) -> Any:
        def wrapped(
            self: Any, request: Any, spec_tokens: Any, spec_tokens_committed: bool = False
        ) -> Any:
            constrained = is_constrained(request, spec_tokens_committed)
            if constrained is None:
                return original(self, request, spec_tokens, spec_tokens_committed)
            start = 0 if constrained else len(spec_tokens) + 1
            return ConstraintBounds(start, start)

        return wrapped

    _wrap(StructuredOutputManager, "_get_constraint_bounds", bounds)


def _patch_engine_core() -> None:
    """Engine core: a utility call that tells how much memory the ledgers hold."""
    from vllm.v1.engine.core import EngineCore

    def held_bytes(self: Any) -> int:
        held = getattr(self.scheduler, "softvllm_held_bytes", None)
        return 0 if held is None else held()

    EngineCore.softvllm_held_bytes = held_bytes


def _patch_worker() -> None:
    """Workers: attach to the loaded runner, refresh sigma whenever weights change."""
    from vllm.v1.worker.gpu_worker import Worker

    from softvllm.engine.weights import weights_changed

    def load_model(original: Any) -> Any:
        def wrapped(self: Any, *args: Any, **kw: Any) -> Any:
            result = original(self, *args, **kw)
            if engine_options(self.vllm_config) is not None:
                from softvllm.engine.frontend import check_engine
                from softvllm.engine.runners import attach

                if check_engine(self.vllm_config) is None:
                    attach(self.model_runner, bool(self.use_v2_model_runner))
            return result

        return wrapped

    def refreshing(original: Any) -> Any:
        def wrapped(self: Any, *args: Any, **kw: Any) -> Any:
            result = original(self, *args, **kw)
            weights_changed(self.model_runner)
            return result

        return wrapped

    def info(self: Any) -> dict[str, Any]:
        core = getattr(self.model_runner, "softvllm_core", None)
        return {} if core is None else core.info()

    _wrap(Worker, "load_model", load_model)
    Worker.softvllm_info = info  # for `collective_rpc`
    for name in ("reload_weights", "finish_weight_update", "wake_up"):
        _wrap(Worker, name, refreshing)


def _patch_weight_updates() -> None:
    """Register our weight-transfer back-end; engine core: guard the order of its steps."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.v1.engine.core import EngineCore

    from softvllm.engine.update import BACKEND, session_of

    WeightTransferEngineFactory.register_engine(BACKEND, "softvllm.engine.weights", "FolderEngine")

    def collective_rpc(original: Any) -> Any:
        def wrapped(self: Any, method: Any, timeout=None, args: Any = (), kwargs: Any = None):
            send = functools.partial(original, self, method, timeout, args, kwargs)
            session = session_of(self)
            return send() if session is None else session.call(method, send, kwargs)

        return wrapped

    _wrap(EngineCore, "collective_rpc", collective_rpc)


def _patch_output_processor() -> None:
    """Front end: collect each step's record and hand it out as `CompletionOutput.cot`."""
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    from softvllm.core.resolve import ResolvedCoT
    from softvllm.engine.outputs import CoTOutput, CoTStream

    CompletionOutput.cot = None

    def from_new_request(original: Any) -> Any:
        def wrapped(cls: Any, *args: Any, **kw: Any) -> Any:
            state = original(*args, **kw)
            request = kw["request"]
            raw = resolved_dict(request.sampling_params)
            state.softvllm_stream = None if raw is None else CoTStream(ResolvedCoT.from_dict(raw))
            return state

        return classmethod(wrapped)

    RequestState.from_new_request = from_new_request(RequestState.from_new_request)

    def process_outputs(original: Any) -> Any:
        def wrapped(self: Any, engine_core_outputs: Any, *args: Any, **kw: Any) -> Any:
            for out in engine_core_outputs:
                carried = out.kv_transfer_params
                if carried and WIRE_KEY in carried:
                    out.kv_transfer_params = None
                    state = self.request_states.get(out.request_id)
                    if state is not None and state.softvllm_stream is not None:
                        text = getattr(state.detokenizer, "output_text", "")
                        state.softvllm_stream.receive(carried[WIRE_KEY], len(text))
            return original(self, engine_core_outputs, *args, **kw)

        return wrapped

    _wrap(OutputProcessor, "process_outputs", process_outputs)

    def new_completion(original: Any) -> Any:
        def wrapped(self: Any, token_ids: Any, *args: Any, **kw: Any) -> Any:
            output = original(self, token_ids, *args, **kw)
            stream = self.softvllm_stream
            if stream is not None:
                total = len(stream.builder)
                output.cot = CoTOutput(stream, total - len(output.token_ids), output)
            return output

        return wrapped

    _wrap(RequestState, "_new_completion_output", new_completion)
