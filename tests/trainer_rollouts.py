"""Rollouts for the trainer's tests, made by the oracle, and the loss written out naively."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from softvllm import CoTParams, reconstruct
from softvllm.core.embedding import module_scale
from softvllm.core.oracle import Oracle
from softvllm.core.phases import Phase
from softvllm.core.trace import Kind, Trace, step_sigma
from trainer.episodes import Asked, Episode
from trainer.forward import Densities
from trainer.packing import Batch, HardTerms, SoftTerms
from trainer.reading import episode_of_trace

EOS = 1
FORCED = (17, 23)
D, SIGMA = 3, 0.3  # of `bare_batch`
ASKED = Asked(temperature=1.0, stop_ids=(EOS,))
MODES: dict[str, dict[str, Any]] = {
    "soft": {"mode": "soft"},
    "fuzzy": {"mode": "fuzzy"},
    "hard": {"mode": "hard"},
    "blend": {"mode": "mixed", "policy": "blend", "policy_params": {"weight": 0.6}},
    "interleave": {"mode": "mixed", "policy": "interleave", "policy_params": {"p": 0.5}},
}


def single_thread() -> Iterator[None]:
    """For a fixture: tiny products only get slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(4, 509, length).tolist()


def roll(
    oracle: Oracle, length: int = 7, seed: int = 0, think: int = 8, tokens: int = 14, **cot: Any
) -> tuple[np.ndarray, Trace]:
    """A prompt and the trace of a think phase, two forced tokens and a sampled answer."""
    ids = prompt(length, seed)
    bare = {"force_after_cut": FORCED, "force_after_end": (), "end_strings": (), "seed": seed}
    params = CoTParams(**{**bare, "max_think_tokens": think, **cot})
    result = oracle.decode(
        ids, params, max_tokens=tokens, temperature=ASKED.temperature, stop_token_ids=(EOS,)
    )
    return np.array(ids, dtype=np.int32), result.trace


def episodes_of(oracle: Oracle, modes: tuple[str, ...], **kwargs: Any) -> list[Episode]:
    """One episode per mode, with prompts and answers of different lengths."""
    out = []
    for i, mode in enumerate(modes):
        ids, trace = roll(oracle, length=4 + 3 * i, seed=i, tokens=12 + i, **MODES[mode], **kwargs)
        out.append(episode_of_trace(ids, trace, ASKED))
    return out


def naive_log_density(
    model: Any, prompt_ids: np.ndarray, trace: Trace, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft and hard part of log pi of one chain: paper eq. 8 position by position, whole logits,
    the model's own forward pass. Full support, sampled answers at temperature 1."""
    module = model.get_input_embeddings()
    table = module.weight
    fed = reconstruct(trace, table.detach().to(getattr(torch, trace.meta["dtype"]))).to(dtype)
    rows = []
    for t in range(len(trace)):
        soft = trace.kind[t] in (Kind.SOFT, Kind.SOFT_SAMPLED)
        rows.append(fed[t] if soft else table[int(trace.token[t])])
    embeds = torch.cat((table[torch.from_numpy(prompt_ids.astype(np.int64))], torch.stack(rows)))
    logits = model(inputs_embeds=(embeds * module_scale(module))[None]).logits[0]
    sigma = step_sigma(trace).to(dtype)
    soft_sum = hard_sum = logits.new_zeros(())
    for t in range(len(trace)):
        at, kind, token = logits[len(prompt_ids) - 1 + t], trace.kind[t], int(trace.token[t])
        tau = trace.meta["tau"] if trace.phase[t] == Phase.THINK else 1.0
        log_p = torch.log_softmax(at / tau, dim=-1)
        mean = log_p.exp() @ table
        if kind == Kind.SOFT_SAMPLED:
            w = trace.meta["policy_values"][0]
            mean = w * mean + (1 - w) * table[token]
        if kind in (Kind.SOFT, Kind.SOFT_SAMPLED):
            soft_sum = soft_sum - (fed[t] - mean).square().sum() / (2 * sigma[t] ** 2)
        if kind in (Kind.SAMPLED, Kind.SOFT_SAMPLED):
            hard_sum = hard_sum + log_p[token]
    return soft_sum, hard_sum


def bare_batch(soft: torch.Tensor | None, tokens: torch.Tensor | None, samples: int) -> Batch:
    """A batch of `samples` samples without a model behind it: rows [n, d] of h~, n a multiple of
    `samples`, and one token per sample."""
    none = torch.zeros(0, dtype=torch.int64)
    value = torch.zeros(0, D) if soft is None else soft
    ids = none if tokens is None else tokens
    per = len(value) // samples
    sequence = torch.arange(samples).repeat_interleave(per)
    return Batch(
        token_ids=none,
        soft_rows=none,
        soft_values=torch.zeros(0, D),
        position_ids=none,
        cu_seqlens=torch.zeros(samples + 1, dtype=torch.int32),
        lengths=(0,) * samples,
        soft=SoftTerms(
            row=none,
            sequence=sequence,
            position=none,
            seed=none,
            value=value,
            token=none,
            tau=torch.ones(len(value)),
            sigma=torch.full((len(value),), SIGMA),
            mix=torch.ones(len(value)),
            ids=None,
            support=None,
        ),
        hard=HardTerms(
            row=none,
            sequence=torch.arange(len(ids)),
            position=none,
            ids=ids[:, None],
            tau=torch.ones(len(ids)),
            think=torch.zeros(len(ids), dtype=torch.bool),
            rollout_log_prob=torch.full((len(ids),), torch.nan),
            support=None,
        ),
        num_decisions=torch.full((samples,), per + int(tokens is not None)),
    )


def densities(batch: Batch, mean: torch.Tensor, hard: torch.Tensor | None = None) -> Densities:
    error = batch.soft.value.to(mean) - mean
    soft = -error.square().sum(-1) / (2 * batch.soft.sigma.to(mean) ** 2)
    return Densities(soft, mean, mean.new_zeros(0) if hard is None else hard, None)
