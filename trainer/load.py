"""The model that is trained, with LoRA or without."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch

from softvllm.models import DEFAULT_MODEL, resolve_model
from trainer.config import Config, ModelConfig

ADAPTER = "adapter_config.json"
"""What a LoRA adapter's folder holds and a model's does not."""


def with_folder(config: Config) -> Config:
    """The settings with the default model's folder in place of its name.

    Raises:
        ValueError: it cannot be downloaded or converted.
    """
    model = config.model
    if model.path != DEFAULT_MODEL:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(model, path=folder_of(model.path)))


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
