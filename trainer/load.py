"""The model that is trained, with LoRA or without."""

from __future__ import annotations

from typing import Any

import torch

from trainer.config import ModelConfig


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
