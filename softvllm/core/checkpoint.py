"""A folder of safetensors files with a marker, the way weights travel from trainer to server.

The marker `STABLE` is written last and says what belongs to the folder:

    {"format": 1, "files": {"model.safetensors": {"size": 1234, "sha256": "..."}}, "metadata": {}}

`sha256` is optional. A folder without marker, or one that does not hold exactly what its marker
says, is half written or half copied and refused whole. Contract for trainers: docs/weights.md.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from softvllm.core.weight_folder import (
    FORMAT,
    MARKER,
    SUFFIX,
    WeightFolder,
    WeightFolderError,
    check_weights,
    open_file,
    read_header,
    sha256,
)

__all__ = ["WeightFolder", "WeightFolderError", "check_weights", "write_marker", "write_weights"]


def write_weights(
    folder: str | Path,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, Any] | None = None,
    *,
    checksums: bool = False,
    shard_bytes: int = 2 << 30,
) -> Path:
    """Write a folder that a reader sees either complete or not at all.

    Files and marker go to a hidden folder beside it, each is flushed to disk, and one rename
    gives the folder its name. The files also form an ordinary sharded checkpoint (add
    `config.json` to load it elsewhere).

    Args:
        folder: must not exist or be empty; a new one for each version.
        tensors: Hugging Face checkpoint names and full (unsharded) tensors of any device; an
            iterator is consumed one tensor at a time.
        metadata: JSON facts for the marker; `weight_version` names the version served.
        checksums: also record each file's SHA-256, which the server then verifies (it costs one
            more pass over the bytes on both sides).
        shard_bytes: most bytes of tensors in one file.

    Returns:
        The folder's absolute path.

    Raises:
        WeightFolderError: the folder is in use, a name comes twice, or there are no tensors.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightFolderError(f"{target} exists already; write every version to a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.{secrets.token_hex(6)}"
    work.mkdir()
    try:
        _write_shards(work, tensors, shard_bytes)
        write_marker(work, metadata, checksums=checksums)
        os.rename(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _sync(target.parent)
    return target


def write_marker(
    folder: str | Path, metadata: Mapping[str, Any] | None = None, *, checksums: bool = False
) -> None:
    """Declare the safetensors files in a folder complete (after `model.save_pretrained`).

    Raises:
        WeightFolderError: there are none, or one of them is broken.
    """
    folder = Path(folder)
    listed: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with open_file(path) as file:
            read_header(file, path.name)
            listed[path.name] = {"size": os.fstat(file.fileno()).st_size}
            if checksums:
                listed[path.name]["sha256"] = sha256(file)
        _sync(path)
    if not listed:
        raise WeightFolderError(f"{folder} holds no *{SUFFIX} file to declare complete")
    marker = {"format": FORMAT, "files": listed, "metadata": dict(metadata or {})}
    draft = folder / f".{MARKER}.{secrets.token_hex(6)}"
    draft.write_text(json.dumps(marker, indent=1))
    _sync(draft)
    os.rename(draft, folder / MARKER)
    _sync(folder)


def _write_shards(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    shard_bytes: int,
) -> None:
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    shards: list[list[str]] = []
    names: set[str] = set()
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        # transformers refuses files that do not say which framework wrote them.
        save_file(held, folder / f"{len(shards)}{SUFFIX}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in pairs:
        if name in names:
            raise WeightFolderError(f"tensor {name} comes twice; give each name once")
        names.add(name)
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = _owned(tensor, held)
        size += tensor.nbytes
        total += tensor.nbytes
    if held:
        flush()
    if not shards:
        raise WeightFolderError("there are no tensors to write")
    if len(shards) == 1:
        os.rename(folder / f"0{SUFFIX}", folder / f"model{SUFFIX}")
        return
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}{SUFFIX}"
        os.rename(folder / f"{i}{SUFFIX}", folder / file)
        where.update(dict.fromkeys(shard, file))
    index = folder / f"model{SUFFIX}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    _sync(index)


def _owned(tensor: torch.Tensor, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """On the CPU and in memory of its own: safetensors refuses views and tied tensors."""
    local = tensor.detach().to("cpu").contiguous()
    shared = any(local.data_ptr() == other.data_ptr() for other in held.values())
    if shared or local.untyped_storage().nbytes() != local.nbytes:
        return local.clone()
    return local


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
