"""What a LoRA adapter on disk changes, read from its tensor names."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=256)
def touches_embeddings(path: str) -> bool:
    """Whether the adapter has weights for the input embedding (or a tied head).

    Unknown formats count as touching: refusing is safe, a silently wrong mixture is not.
    """
    file = Path(path) / "adapter_model.safetensors"
    if not file.exists():
        return True
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        names = list(handle.keys())
    return any("embed_tokens" in name or "lm_head" in name for name in names)
