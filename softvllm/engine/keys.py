"""Names under which our data rides on vLLM's own objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

USER_KEY = "cot"
"""`SamplingParams.extra_args[USER_KEY]`: what the user asked, fields of `CoTParams`."""
WIRE_KEY = "softvllm"
"""`extra_args[WIRE_KEY]`: the resolved request (`ResolvedCoT.to_dict()`), set by the front end;
`EngineCoreOutput.kv_transfer_params[WIRE_KEY]`: a step's record on its way back (KV transfer is
refused for CoT requests, so the field is free); `additional_config[WIRE_KEY]`: engine options."""


def resolved_dict(sampling_params: Any) -> Mapping[str, Any] | None:
    """The resolved CoT request of a request's sampling parameters, if it has one."""
    extra = getattr(sampling_params, "extra_args", None)
    return extra.get(WIRE_KEY) if extra else None


def engine_options(vllm_config: Any) -> Mapping[str, Any] | None:
    """softvllm's options of this engine; None where softvllm is not enabled."""
    config = vllm_config.additional_config
    return config.get(WIRE_KEY) if isinstance(config, Mapping) else None
