"""What most soft-thinking code does today: a batched transformers loop."""

from __future__ import annotations

import time

import torch

from softvllm.core import noise
from softvllm.core.embedding import embedding_rms, noise_sigma, noisy_input


@torch.inference_mode()
def loop_seconds(model_path: str, prompt: str, batch: int, tokens: int) -> float:
    """Seconds to decode `tokens` soft tokens for `batch` equal prompts (tau 0.5, gamma 0.33)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    table = model.get_input_embeddings().weight
    sigma = torch.full((batch,), noise_sigma(0.33, embedding_rms(table)))
    seeds = torch.arange(batch)
    ids = torch.tensor([tokenizer.encode(prompt)] * batch)

    def decode(steps: int) -> None:
        out = model(input_ids=ids, use_cache=True)
        cache = out.past_key_values
        for t in range(steps):
            probs = torch.softmax(out.logits[:, -1].float() / 0.5, dim=-1)
            mean = (probs.to(table.dtype) @ table).float()
            z = noise.gaussian(seeds, torch.full((batch,), t), table.shape[1])
            fed = noisy_input(mean, sigma, z, table.dtype)
            out = model(inputs_embeds=fed[:, None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values

    decode(4)
    start = time.perf_counter()
    decode(tokens)
    return time.perf_counter() - start
