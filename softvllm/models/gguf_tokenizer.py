"""The SmolLM byte-level BPE tokenizer of a GGUF file, as Hugging Face tokenizer files.

GGUF stores tokens and merges, but of the pre-tokenizer only a name (``smollm``). transformers'
GGUF route falls back to plain byte-level splitting, which splits the white space before a digit
wrongly: the negative log-likelihood of one maths text rose from 192.2 to 199.9 nats by that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# ggml's token type of control tokens (gguf.TokenType.CONTROL).
CONTROL = 3


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer with SmolLM2's pre-tokenizer: each digit alone, then byte-level splitting."""
    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"This GGUF file has the tokenizer {kind}; only SmolLM's is converted.")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind_of_token in zip(tokens, types, strict=True)
            if kind_of_token == CONTROL
        ]
    )
    return tokenizer


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template)."""
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    config = {
        # Not GPT2Tokenizer, the class of the official files: transformers 5 rebuilds that one
        # from its vocabulary and merges, without the digit splitting.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
