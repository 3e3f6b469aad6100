"""The door: validate a request's CoT object, refuse what cannot be right, resolve the rest.

Runs in the front-end process, inside vLLM's own input processing, so offline, async and HTTP
users pass the same checks before anything is scheduled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softvllm.core import policies
from softvllm.core.params import CoTParams, CoTParamsError
from softvllm.core.resolve import ResolvedCoT, resolve
from softvllm.engine.keys import USER_KEY, WIRE_KEY, engine_options
from softvllm.engine.lora import touches_embeddings

DEFAULT_TRACE_MEMORY_GIB = 8.0
"""Host memory the soft inputs of running requests may take in all, worst case."""


def check_engine(vllm_config: Any) -> str | None:
    """Why this engine cannot run CoT requests at all; None if it can."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        return (
            "speculative decoding drafts hard tokens, which a soft step does not feed; start the "
            "engine without a speculative config"
        )
    if parallel.pipeline_parallel_size > 1:
        return (
            "under pipeline parallelism the mixture is made on the last rank and needed on the "
            "first; use tensor parallelism instead of pipeline_parallel_size > 1"
        )
    if vllm_config.kv_transfer_config is not None:
        return (
            "KV transfer would hand soft positions' cache to an engine that only knows token ids; "
            "start the engine without kv_transfer_config"
        )
    for name, text in (
        ("decode_context_parallel_size", "decode context parallelism"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
    ):
        if getattr(parallel, name, 1) > 1:
            return f"{text} reorders input rows; start the engine with {name}=1"
    for name in ("enable_dbo", "use_ubatching", "enable_batch_sharded_sampling"):
        if getattr(parallel, name, False):
            return (
                f"{name} splits the batch behind the embedding layer; start the engine without it"
            )
    if model.runner_type != "generate" or model.is_encoder_decoder:
        return "only decoder-only generative models can think; use a stock engine for this model"
    if model.enable_prompt_embeds:
        return (
            "enable_prompt_embeds moves the embedding lookup out of the model; start the engine "
            "without it"
        )
    if model.is_multimodal_model:
        return (
            "multimodal models merge their own embeddings after the lookup; serve a text-only "
            "checkpoint"
        )
    if getattr(model, "return_sampling_mask", False):
        return "return_sampling_mask describes the stock sampler's support only; start without it"
    if getattr(vllm_config, "watermark_config", None) is not None:
        return "a watermark reads the sampler's tokens, not the shadow's; start without it"
    return None


def check_request(params: Any, resumable: bool, prompt_embeds: Any) -> tuple[str, str] | None:
    """A sampling parameter that contradicts a CoT object: (field, why and remedy)."""
    if resumable:
        return "mode", "streaming input resumes a session by token ids; send the whole prompt"
    if prompt_embeds is not None:
        return "mode", "prompt embeddings are not supported together with a CoT object; send ids"
    if getattr(params, "thinking_token_budget", None) is not None:
        return (
            "max_think_tokens",
            "thinking_token_budget is set, too; set cot.max_think_tokens only",
        )
    if getattr(params, "trace_decode_token_ids", None):
        return "mode", "trace_decode_token_ids forces tokens; drop it or the CoT object"
    if getattr(params, "repetition_detection", None) is not None:
        return (
            "mode",
            "repetition_detection would end the request on repeated shadow tokens; drop it, or "
            "use cot.cold_stop_entropy",
        )
    return None


def trace_memory(options: Any) -> float:
    """The engine's `trace_memory_gib`, validated; raises ValueError with the remedy."""
    if not isinstance(options, Mapping) or set(options) - {"trace_memory_gib"}:
        raise ValueError(
            f"additional_config[{WIRE_KEY!r}] takes an object with trace_memory_gib only, "
            f"got {options!r}"
        )
    gib = options.get("trace_memory_gib", DEFAULT_TRACE_MEMORY_GIB)
    if isinstance(gib, bool) or not isinstance(gib, (int, float)) or not 0 < gib < 1e6:
        raise ValueError(f"trace_memory_gib must be a number above 0 (GiB), got {gib!r}")
    return float(gib)


def think_limit(vllm_config: Any) -> int:
    """Think tokens one request may have, so that all slots' records fit the memory bound."""
    budget = trace_memory(engine_options(vllm_config)) * 2**30
    model = vllm_config.model_config
    row = model.get_hidden_size() * model.dtype.itemsize + 16
    return int(budget / vllm_config.scheduler_config.max_num_seqs / row)


class FrontEnd:
    """Per engine client: caches what never changes and resolves requests."""

    def __init__(self, vllm_config: Any, tokenizer: Any) -> None:
        self.vllm_config = vllm_config
        self.tokenizer = tokenizer
        self.enabled = engine_options(vllm_config) is not None
        self.refusal = check_engine(vllm_config)
        self.limit = think_limit(vllm_config) if self.enabled else 0

    def admit(self, user_params: Any, request: Any) -> None:
        """Validate and resolve in place; a request without a CoT object stays as it is.

        Args:
            user_params: the caller's `SamplingParams` (its own max_tokens, seed).
            request: the `EngineCoreRequest` whose private sampling parameters are completed.

        Raises:
            CoTParamsError: with field and remedy.
        """
        params = request.sampling_params
        extra = getattr(params, "extra_args", None)
        if not extra:
            return
        if WIRE_KEY in extra:
            raise CoTParamsError("", f"extra_args[{WIRE_KEY!r}] is internal; use {USER_KEY!r}")
        if USER_KEY not in extra:
            return
        if not self.enabled:
            raise CoTParamsError(
                "mode",
                "this engine was started without softvllm; use softvllm.LLM or start it with "
                f'additional_config={{"{WIRE_KEY}": {{}}}}',
            )
        if self.refusal is not None:
            raise CoTParamsError("mode", self.refusal)
        raw = extra[USER_KEY]
        cot = raw if isinstance(raw, CoTParams) else CoTParams.from_dict(raw)
        conflict = check_request(params, request.resumable, request.prompt_embeds)
        if conflict is not None:
            raise CoTParamsError(*conflict)
        if not policies.known_everywhere(cot.policy_name):
            raise CoTParamsError(
                "policy",
                f"{cot.policy_name!r} is registered in this process only; offer it as an entry "
                f"point of the group {policies.ENTRY_POINTS!r}, which all of vLLM's processes load",
            )
        self._check_lora(request)
        resolved = self._resolve(cot, params, user_params)
        if params.structured_outputs is not None and not resolved.after_cut:
            raise CoTParamsError(
                "force_after_cut",
                "structured output needs at least one forced token between think phase and "
                "answer, where the grammar starts; give a text",
            )
        params.extra_args = {k: v for k, v in extra.items() if k != USER_KEY}
        params.extra_args[WIRE_KEY] = resolved.to_dict()

    def _resolve(self, cot: CoTParams, params: Any, user_params: Any) -> ResolvedCoT:
        return resolve(
            cot,
            self.tokenizer,
            stop_ids=_stop_ids(params),
            vocab_size=self.vllm_config.model_config.get_vocab_size(),
            greedy_answer=params.temperature < 1e-5,
            request_seed=user_params.seed,
            max_tokens=params.max_tokens,
            think_limit=self.limit,
        )

    def _check_lora(self, request: Any) -> None:
        """Adapters that change the embedding table would change the mixture, too."""
        lora = request.lora_request
        if lora is None:
            return
        try:
            touches = touches_embeddings(lora.lora_path)
        except (OSError, ValueError) as error:
            raise CoTParamsError("mode", f"cannot check LoRA {lora.lora_name!r}: {error}") from None
        if touches:
            raise CoTParamsError(
                "mode",
                f"LoRA adapter {lora.lora_name!r} changes the token embeddings, which the mixture "
                "does not see yet; use an adapter without embed_tokens or lm_head weights",
            )


def _stop_ids(params: Any) -> set[int]:
    """Tokens on which vLLM's scheduler would end the request (none for EOS under ignore_eos)."""
    stops = set(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        stops.add(params.eos_token_id)
    return stops


def child_extra_args(extra: Mapping[str, Any], index: int) -> dict[str, Any]:
    """extra_args of sample `index` of a request with n > 1: its own seed and cache nonce."""
    from softvllm.core.noise import derive_seed

    cot = ResolvedCoT.from_dict(extra[WIRE_KEY])
    return {**extra, WIRE_KEY: cot.with_seed(derive_seed(cot.seed, index)).to_dict()}
