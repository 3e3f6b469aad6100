"""softvllm: soft, fuzzy and mixed chain-of-thought decoding on unmodified vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softvllm.core.params import CoTParams, CoTParamsError
from softvllm.core.trace import Trace, reconstruct

if TYPE_CHECKING:
    from softvllm.engine.llm import LLM, soft_params

__version__ = "0.1.0"
__all__ = ["LLM", "CoTParams", "CoTParamsError", "Trace", "reconstruct", "soft_params"]


def __getattr__(name: str) -> Any:
    """The engine is imported on first use: the trainer never needs vllm."""
    if name in ("LLM", "soft_params"):
        from softvllm.engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'softvllm' has no attribute {name!r}")
