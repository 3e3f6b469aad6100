"""What a LoRA adapter changes, read from its tensor names."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


def touches_embeddings(path: str) -> bool:
    """Whether the adapter has weights for the input embedding (or a tied head).

    Args:
        path: as vLLM takes it: a folder or the name of a repository.

    Raises:
        OSError, ValueError: the adapter cannot be read.
    """
    from vllm.lora.utils import get_adapter_absolute_path

    folder = Path(get_adapter_absolute_path(path))
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise ValueError(f"{folder} holds no adapter_model.safetensors, the format softvllm reads")
    return _names_embeddings(str(file), file.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _names_embeddings(file: str, mtime: int) -> bool:
    """Cached per version of the file: an adapter may be replaced in place."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from None
    return any("embed_tokens" in name or "lm_head" in name for name in names)
