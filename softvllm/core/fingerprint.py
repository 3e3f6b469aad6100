"""Short names of weights: whether two folders hold the same, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from softvllm.core.weight_folder import SUFFIX

_BLOCKS, _BLOCK = 64, 1 << 16


def fingerprint(folder: Path) -> str | None:
    """Twelve hex digits from the sizes and evenly spread blocks of a folder's weight files
    (safetensors, else .bin); None if it has none."""
    files = sorted(folder.glob(f"*{SUFFIX}")) or sorted(folder.glob("*.bin"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as handle:
            for i in range(_BLOCKS):
                handle.seek(max(0, size - _BLOCK) * i // (_BLOCKS - 1))
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()[:12]


def weights_named(model: str, commit: str | None) -> str | None:
    """A folder's fingerprint, or `name@commit` of a hub's model; None where neither is known."""
    folder = Path(model)
    if folder.is_dir():
        return fingerprint(folder)
    return None if commit is None else f"{model}@{commit}"
