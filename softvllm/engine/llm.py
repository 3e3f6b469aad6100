"""Offline use: `LLM(...).generate(prompts, soft_params(...))`."""

from __future__ import annotations

import dataclasses
import os
from importlib.metadata import entry_points
from typing import Any

import vllm
from vllm import SamplingParams

from softvllm.core.params import CoTParams
from softvllm.engine import compat
from softvllm.engine.frontend import trace_memory
from softvllm.engine.keys import USER_KEY, WIRE_KEY, resolved_dict

_COT_FIELDS = {f.name for f in dataclasses.fields(CoTParams)}


def soft_params(
    cot: CoTParams | None = None, /, *, temperature: float = 0.0, **kwargs: Any
) -> SamplingParams:
    """Sampling parameters with a think phase.

    Fields of `CoTParams` go to the think phase, everything else to vLLM's `SamplingParams`,
    which shapes the answer. Both know temperature, top_k, top_p and min_p: alone, `temperature`
    is the answer's (0 = greedy, as in the paper) and the other three are the mixture's support;
    `cot_temperature` is the think phase's, `answer_top_k`, `answer_top_p` and `answer_min_p` are
    the answer's. `seed` seeds the whole request. n > 1 gives n chains, each with a seed of its
    own, with greedy answers at temperature 0.

    Args:
        cot: ready-made parameters; then top_k, top_p, min_p and seed are `SamplingParams`'s, and
            no other field of `CoTParams` may be given here.

    Raises:
        CoTParamsError: a CoT field is out of range or contradicts another.
        TypeError: an argument is neither a field of CoTParams nor of SamplingParams.
    """
    own = _COT_FIELDS if cot is None else _COT_FIELDS - set(SamplingParams.__struct_fields__)
    fields = {k: kwargs.pop(k) for k in list(kwargs) if k in own}
    if "cot_temperature" in kwargs:
        fields["temperature"] = kwargs.pop("cot_temperature")
    for name in ("top_k", "top_p", "min_p"):
        if f"answer_{name}" in kwargs:
            kwargs[name] = kwargs.pop(f"answer_{name}")
    if cot is not None and fields:
        raise TypeError(f"give a CoTParams or its fields, not both: {', '.join(fields)}")
    params = cot if cot is not None else CoTParams(**fields)
    if temperature == 0.0 and kwargs.get("n", 1) > 1:
        # vLLM takes n > 1 only with a temperature; the answers stay greedy all the same.
        params, temperature = dataclasses.replace(params, answer_greedy=True), 1.0
    kwargs.setdefault("max_tokens", None)
    extra = {**kwargs.pop("extra_args", {}), USER_KEY: params.to_dict()}
    return SamplingParams(temperature=temperature, extra_args=extra, **kwargs)


def engine_config(trace_memory_gib: float | None = None) -> dict[str, Any]:
    """The `additional_config` that enables softvllm in an engine."""
    options = {} if trace_memory_gib is None else {"trace_memory_gib": trace_memory_gib}
    trace_memory(options)
    return {WIRE_KEY: options}


def check_plugin() -> None:
    """Raise unless vLLM's worker processes will load our plugin."""
    compat.check_version()
    found = entry_points(group="vllm.general_plugins", name="softvllm")
    if not found:
        raise RuntimeError(
            "vLLM's processes cannot find softvllm's plugin: install the package "
            "(pip install -e . in a checkout) instead of only putting it on the path"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "softvllm" not in allowed.split(","):
        raise RuntimeError(
            f"VLLM_PLUGINS={allowed!r} keeps softvllm out; add softvllm to the list or unset it"
        )


class LLM(vllm.LLM):
    """vLLM's `LLM` with soft decoding enabled; takes the same arguments.

    Args:
        model: a Hugging Face name or a folder; None: SmolLM2-135M-Instruct, prepared into a
            cache folder on first use.
        trace_memory_gib: host memory that soft inputs of running requests may take (default 8).
    """

    def __init__(
        self, model: str | None = None, *, trace_memory_gib: float | None = None, **kwargs: Any
    ) -> None:
        check_plugin()
        compat.apply()
        from softvllm.models import resolve_model

        additional = {**(kwargs.pop("additional_config", None) or {})}
        additional.update(engine_config(trace_memory_gib))
        super().__init__(resolve_model(model), additional_config=additional, **kwargs)

    def beam_search(self, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's beam search; refuses a CoT object, since beams branch on token ids."""
        extra = getattr(params, "extra_args", None) or {}
        if USER_KEY in extra or resolved_dict(params) is not None:
            raise ValueError(
                "beam search compares token sequences and cannot follow a think phase that feeds "
                "mixtures; use generate with n > 1 instead"
            )
        return super().beam_search(prompts, params, *args, **kwargs)
