"""`GET /v1/cot/info`: what this server can do, for clients, pages and trainers."""

from __future__ import annotations

from typing import Any

import vllm
from fastapi import Request

import softvllm
from server.context import ServerContext
from server.metrics import METRICS
from server.options import MODES
from softvllm.core import policies
from softvllm.core.params import (
    DEFAULT_MAX_THINK,
    DEFAULT_NOISE_SCALE,
    DEFAULT_TEMPERATURE,
    MAX_RECORD_TOP,
    MAX_SEED,
    MAX_TOP_K,
)
from softvllm.core.recipe import is_reasoning_model, recipe_for
from softvllm.engine.frontend import check_engine, think_limit


async def cot_info(raw_request: Request) -> dict[str, Any]:
    """Versions, modes, defaults, limits and the state of the think-phase layer."""
    context: ServerContext = raw_request.app.state.softvllm
    config = context.vllm_config
    worker = (await context.engine.collective_rpc("softvllm_info"))[0]
    held = await held_bytes(context)
    refusal = check_engine(config)
    return {
        "softvllm": softvllm.__version__,
        "vllm": vllm.__version__,
        "model": context.model_name,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "modes": [] if refusal else list(MODES),
        "refusal": refusal,
        "default_mode": context.options.default_mode,
        "reasoning_model": is_reasoning_model(context.tokenizer),
        "recipe": {**recipe_for(context.tokenizer), **context.options.cot},
        "defaults": {
            mode: {
                "temperature": DEFAULT_TEMPERATURE[mode],
                "noise_scale": 0.0 if mode == "hard" else DEFAULT_NOISE_SCALE,
                "max_think_tokens": DEFAULT_MAX_THINK,
                **({"policy": "blend"} if mode == "mixed" else {}),
            }
            for mode in MODES
        },
        "policies": {
            name: {
                key: {"low": low, "high": high, "default": default}
                for key, (low, high, default) in policies.get(name).params.items()
            }
            for name in policies.names()
        },
        "limits": {
            "max_think_tokens": min(think_limit(config), context.max_model_len),
            "max_model_len": context.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "top_k": MAX_TOP_K,
            "record_top": MAX_RECORD_TOP,
            "seed": MAX_SEED - 1,
        },
        "embedding": worker,
        "enable_rl": context.options.enable_rl,
        "weights_at_start": context.weights_at_start,
        "weight_version": await context.engine.get_weight_version(),
        "held": held,
    }


async def held_bytes(context: ServerContext) -> dict[str, int]:
    """Traces in memory, right now; also refreshes the gauge on `/metrics`."""
    states = list(context.engine.output_processor.request_states.values())
    streams = [s for state in states if (s := getattr(state, "softvllm_stream", None))]
    front = sum(stream.builder.nbytes for stream in streams)
    engine = int(await context.engine.engine_core.call_utility_async("softvllm_held_bytes"))
    METRICS.held.labels("front").set(front)
    METRICS.held.labels("engine").set(engine)
    return {
        "requests": len(states),
        "cot_requests": len(streams),
        "trace_bytes_front": front,
        "trace_bytes_engine": engine,
    }
