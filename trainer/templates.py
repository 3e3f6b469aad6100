"""Questions to prompt token ids: the paper's raw prompt, the model's chat template, or your own.

The trainer tokenises once and sends ids; what comes back is checked against them.
"""

from __future__ import annotations

from typing import Any

from trainer.config import PromptConfig

PAPER = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first shows the complete reasoning process step by step, then provides the "
    "final answer in \\boxed{}. The assistant must always follow the format: 'User: [question] "
    "Assistant: [detailed reasoning] The final answer is: \\boxed{[answer]}.' User: {question} "
    "Assistant:"
)
"""Paper, appendix B: zero-shot, raw text, the same for all models."""


def text_of(config: PromptConfig, tokenizer: Any, question: str) -> str:
    """The prompt as text (special tokens included for `chat`)."""
    if config.template == "paper":
        return PAPER.replace("{question}", question)
    if config.template == "raw":
        return config.text.replace("{question}", question)
    messages = [{"role": "user", "content": config.text.replace("{question}", question)}]
    if config.system is not None:
        messages.insert(0, {"role": "system", "content": config.system})
    prompt = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **config.template_arguments
    )
    return str(prompt) + config.begin


def ids_of(config: PromptConfig, tokenizer: Any, question: str) -> list[int]:
    """Token ids of the prompt.

    Raises:
        ValueError: the tokenizer has no chat template, or the prompt is too long.
    """
    if config.template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "prompt.template = chat, but the tokenizer has no chat template; use paper or raw"
        )
    text = text_of(config, tokenizer, question)
    # A chat template writes its own special tokens; raw text gets what the tokenizer adds (BOS).
    ids = tokenizer(text, add_special_tokens=config.template != "chat")["input_ids"]
    if len(ids) > config.max_tokens:
        raise ValueError(
            f"a prompt of {len(ids)} tokens (limit prompt.max_tokens = {config.max_tokens}): "
            f"{question[:80]!r}..."
        )
    return [int(i) for i in ids]
