"""The model that is trained, with LoRA or without."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, TypeVar

import torch

from softvllm.models import DEFAULT_MODEL, resolve_model
from trainer.config import ModelConfig

Settings = TypeVar("Settings")
"""Settings of a run or of an evaluation: a dataclass with `model.path`."""


def with_folder(config: Settings) -> Settings:
    """The settings with the default model's folder in place of its name.

    Raises:
        ValueError: it cannot be downloaded or converted.
    """
    model: Any = config.model  # type: ignore[attr-defined]
    if model.path != DEFAULT_MODEL:
        return config
    path = folder_of(model.path)
    return dataclasses.replace(config, model=dataclasses.replace(model, path=path))  # type: ignore[type-var]


def folder_of(path: str) -> str:
    """The default model's folder for its name, anything else as it is.

    Raises:
        ValueError: it cannot be downloaded or converted.
    """
    if path != DEFAULT_MODEL:
        return path
    try:
        return resolve_model(DEFAULT_MODEL, progress=lambda line: print(line, file=sys.stderr))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"model.path = {DEFAULT_MODEL!r}: {error}") from None


def load_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(what holds the trained weights, the transformers model); they differ with LoRA only."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(config.path, dtype=dtype)
    except OSError as error:
        raise ValueError(f"cannot load model.path = {config.path!r}: {error}") from None
    model = model.to(device)
    if not config.lora_rank:
        return model, model
    try:
        import peft
    except ImportError:
        raise ValueError("model.lora_rank needs the package peft: pip install peft") from None
    settings = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear"
    )
    adapted = peft.get_peft_model(model, settings)
    return adapted, adapted.get_base_model()
