"""The paper's set-up, to compare with: one transformers loop that generates and then updates.

Straightforward and not careless: a key-value cache, all samples of a step in one batch, the update
by teacher forcing with padded sequences and the whole [T, V] in float32, AdamW on the weights as
they are. Nothing is shared with the trainer but the definition of sigma and the loss.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from softvllm.core.embedding import embedding_rms, noise_sigma


@dataclass(frozen=True)
class Asked:
    """What one step generates."""

    mode: str
    """soft or hard."""
    think: int
    answer: int
    forced: list[int]
    """Token ids between think phase and answer."""
    tau: float
    noise_scale: float = 0.33


class PlainLoop:
    """Model and optimiser."""

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device, lr: float) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
        self.device = device
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=lr)

    def step(
        self, prompts: list[list[int]], samples: int, asked: Asked, rows: int
    ) -> dict[str, float]:
        """One step; seconds by phase and generated tokens.

        Args:
            rows: tokens that go through the model together in the update.
        """
        start = time.perf_counter()
        sigma = noise_sigma(asked.noise_scale, embedding_rms(self._table.detach()))
        made = self._generate([ids for ids in prompts for _ in range(samples)], asked, sigma)
        middle = time.perf_counter()
        self._update(*made, asked, sigma, rows)
        end = time.perf_counter()
        tokens = len(prompts) * samples * (asked.think + len(asked.forced) + asked.answer)
        return {
            "rollout": middle - start,
            "train": end - middle,
            "step": end - start,
            "tokens": tokens,
        }

    @property
    def _table(self) -> torch.Tensor:
        table: torch.Tensor = self.model.get_input_embeddings().weight
        return table

    @torch.no_grad()
    def _generate(
        self, prompts: list[list[int]], asked: Asked, sigma: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Left-padded mask [N, T] and inputs [N, T, d]; what was decided, [N, steps]."""
        n, width = len(prompts), max(map(len, prompts))
        ids = torch.zeros(n, width, dtype=torch.int64, device=self.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        table = self._table
        fed = table[ids]
        inputs, tokens = [fed], []
        cache: Any = None
        for t in range(asked.think + len(asked.forced) + asked.answer):
            out = self.model(
                inputs_embeds=fed,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            after = t - asked.think
            if after < 0 and asked.mode == "soft":
                p = (logits / asked.tau).softmax(-1)
                token = p.argmax(-1)
                mean = (p.to(table.dtype) @ table).float()
                fed = (mean + sigma * torch.randn_like(mean)).to(table.dtype)[:, None]
            else:
                if 0 <= after < len(asked.forced):
                    token = torch.full((n,), asked.forced[after], device=self.device)
                else:
                    token = torch.multinomial(logits.softmax(-1), 1)[:, 0]
                fed = table[token][:, None]
            inputs.append(fed)
            tokens.append(token)
            mask = torch.cat((mask, mask.new_ones(n, 1)), dim=1)
        # Of the last token only its probability is needed.
        return mask[:, :-1], torch.cat(inputs[:-1], 1), torch.stack(tokens, 1)

    def _update(
        self,
        mask: torch.Tensor,
        inputs: torch.Tensor,
        tokens: torch.Tensor,
        asked: Asked,
        sigma: float,
        rows: int,
    ) -> None:
        """RLOO's loss with advantages of +1 and -1, summed over steps and dimensions."""
        n, length = mask.shape
        steps = tokens.shape[1]
        first = length - steps  # this row decides the first step
        soft = inputs[:, first + 1 : first + 1 + asked.think]
        gain = torch.ones(n, device=self.device)
        gain[1::2] = -1.0
        own = asked.think + len(asked.forced)
        for part in torch.arange(n).split(max(1, rows // length)):
            hidden = self.model.get_decoder()(
                inputs_embeds=inputs[part],
                attention_mask=mask[part],
                position_ids=(mask[part].cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state[:, first:]
            logits = self.model.get_output_embeddings()(hidden).float()
            log_p = logits[:, own:].log_softmax(-1)
            score = log_p.gather(2, tokens[part][:, own:, None]).sum((1, 2))
            think = logits[:, : asked.think]
            if asked.mode == "soft":
                mean = (think / asked.tau).softmax(-1) @ self._table.float()
                error = soft[part].float() - mean
                score = score - error.square().sum((1, 2)) / (2 * sigma**2)
            else:
                chosen = tokens[part][:, : asked.think, None]
                score = score + think.log_softmax(-1).gather(2, chosen).sum((1, 2))
            (-(gain[part] * score).sum() / n).backward()
        self.adamw.step()
        self.adamw.zero_grad()
