"""The embedding table as the think phase sees it: its RMS, sigma, and its multiplier.

Everything here and in traces is in *table units*: rows of the embedding table before any
multiplier the model applies afterwards (Gemma's sqrt(d), Granite's). The multiplier is part
of the model and is applied once, by the model, to hard and soft inputs alike; sigma is a
share of the table's RMS, so the ratio noise / embedding is the same before and after it.
"""

from __future__ import annotations

import torch

_CHUNK = 16384


def sum_of_squares(table: torch.Tensor) -> torch.Tensor:
    """float64 scalar; chunked, so that no float64 copy of the table is made."""
    total = torch.zeros((), dtype=torch.float64, device=table.device)
    for start in range(0, table.shape[0], _CHUNK):
        total += table[start : start + _CHUNK].to(torch.float32).pow(2).sum(dtype=torch.float64)
    return total


def embedding_rms(table: torch.Tensor) -> float:
    """RMS of the table's entries: sqrt(mean E^2), rows = real vocabulary only.

    This reads the paper's "root-mean-square norm of the token embeddings" as the RMS of the
    entries, the only reading under which noise is "comparable but a bit smaller" than an
    embedding (section 1.1).
    """
    return float((sum_of_squares(table) / table.numel()).sqrt())


def noise_sigma(gamma: float, rms: float) -> float:
    """sigma, the standard deviation per coordinate in table units, rounded to float32.

    Engine, oracle and trainer call this one function, so all use the same value.
    """
    return float(torch.tensor(gamma, dtype=torch.float32) * torch.tensor(rms, dtype=torch.float32))


def noisy_input(
    mean: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """h~ = h + sigma z, rounded once to the model's dtype (eq. 6).

    Args:
        mean: h, float32 [B, d].
        sigma: float32 [B]; rows with 0 get no noise.
        noise: z, float32 [B, d].
        dtype: dtype the model is fed in.
    """
    return (mean + sigma[:, None] * noise).to(dtype)


def module_scale(embedding: torch.nn.Module) -> float:
    """Factor a Hugging Face input-embedding module applies to its own rows (Gemma: sqrt(d)).

    `inputs_embeds` for such a model must carry the factor already: table units x this scale.
    Models that multiply outside the module (Granite) give 1.0 here.
    """
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return 1.0
    return float(scale)
