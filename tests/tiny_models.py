"""Tiny random Hugging Face models, written on the fly: nothing is downloaded.

They are shaped to catch mistakes rather than to be typical:

- 509 tokens, a prime: vLLM pads the embedding to a multiple of 64 rows (512), so code that
  touches the three padded rows or logits shows;
- tied and untied embeddings, per-head q/k norms (Qwen3), embeddings scaled by sqrt(hidden) and
  norm weights stored minus one (Gemma);
- weights much larger than the libraries' initialisation (std 0.02), which would give a nearly
  uniform next token: here its entropy lies between 1 and 5 nats (``test_tiny_models.py``), and
  the layers outweigh the embedding in the residual stream, so a tied model does not just repeat
  its last token;
- float32, for comparisons between engines to be tight.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 509
HIDDEN_SIZE = 64
PAD, EOS, USER, ASSISTANT = "<|pad|>", "<|eos|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, EOS, USER, ASSISTANT)  # ids 0 to 3

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|eos|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Only to have some merges to learn; it needs about 250 different pairs.
TRAINING_TEXT = """The final answer is: 42. Let us think step by step about this problem.
We are given that the sum of two numbers is 12 + 345 = 357, therefore the answer is \\boxed{357}.
First, compute the product of the remaining terms, and then divide the result by three.
Question: how many apples does Mary have when she buys seven more and gives five to her friend?
Suppose that x is a positive integer such that x^2 - 5x + 6 = 0; hence x = 2 or x = 3.
Since every triangle has angles which add up to 180 degrees, the third angle must be 60 degrees.
Wait, maybe we should check whether this equation holds before writing down the conclusion.
Alternatively, consider the probability of drawing a red ball from the box without replacement.
What is the capital of France? The capital of France is Paris, which lies on the river Seine.
"""

# The settings common to all families. head_dim 32 is the smallest that vLLM's CPU attention has
# (vllm/v1/attention/backends/cpu_attn.py, get_supported_head_sizes).
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": SPECIAL_TOKENS.index(EOS),
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
}
# Standard deviation of the logits over the vocabulary. Gaussian logits have an entropy of about
# ln(509) - std^2 / 2 = 6.2 - 3.1 nats.
LOGIT_STD = 2.5
# q and k rows larger than that too: attention looks at few positions, so a position or a cached
# key that is wrong shows. (No effect on Qwen3, which normalises q and k.)
QK_GAIN = 2.0
# How much larger than the embedding a layer's write to the residual stream is made, roughly.
# At 8 the tied models still fell into repeating one token when decoding greedily.
WRITE_GAIN = 24.0


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly ``VOCAB_SIZE`` tokens, which any text round-trips through."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"The training text gave only {tokenizer.get_vocab_size()} tokens.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=COMMON["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(path: Path, tied: bool = True, seed: int = 0) -> Path:
    """A Llama with or without tied embeddings."""
    config = LlamaConfig(**COMMON, tie_word_embeddings=tied)
    return _write(LlamaForCausalLM(config), path, seed)


def tiny_qwen3(path: Path, seed: int = 0) -> Path:
    """A Qwen3: q and k are normalised per head; untied, as its larger models are."""
    config = Qwen3Config(**COMMON, tie_word_embeddings=False)
    return _write(Qwen3ForCausalLM(config), path, seed)


def tiny_gemma(path: Path, seed: int = 0) -> Path:
    """A Gemma (1): the embedding is multiplied by sqrt(hidden size) = 8 before the first layer."""
    config = GemmaConfig(**COMMON, tie_word_embeddings=True)
    return _write(GemmaForCausalLM(config), path, seed, embedding_multiplier=HIDDEN_SIZE**0.5)


def _write(
    model: PreTrainedModel, path: Path, seed: int, embedding_multiplier: float = 1.0
) -> Path:
    _initialise(model, seed, embedding_multiplier)
    model = model.to(torch.float32).eval()
    model.generation_config.do_sample = False
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return Path(path)


@torch.no_grad()
def _initialise(model: PreTrainedModel, seed: int, embedding_multiplier: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # After the last norm the hidden state has norm sqrt(hidden), so the logits have a standard
    # deviation of sqrt(hidden) times the output rows' element.
    row_std = LOGIT_STD / HIDDEN_SIZE**0.5
    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("embed_tokens.weight"):
            # Tied: the rows are also the output's.
            parameter.copy_(noise * (row_std if tied else 1.0))
        elif name == "lm_head.weight":
            parameter.copy_(noise * row_std)
        elif parameter.dim() == 1:
            # Norm weights other than one, so that one left out is noticed. Gemma adds the one
            # itself. The last norm keeps its mean: it sets the size of the logits.
            mean = 0.0 if model.config.model_type.startswith("gemma") else 1.0
            parameter.copy_(mean + 0.1 * noise)
        else:
            # 1 / sqrt(columns) keeps the size of what goes in; the two matrices that write to the
            # residual stream are larger, relative to the embedding as the layers receive it.
            gain = QK_GAIN if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                size = row_std if tied else 1.0
                gain = WRITE_GAIN * size * embedding_multiplier
            parameter.copy_(noise * gain / parameter.shape[1] ** 0.5)
