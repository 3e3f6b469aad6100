"""Weights to the server: one protocol (`base`), four ways.

`folder`: a safetensors folder that both sides can read; `lora`: adapters; `nccl`: vLLM's broadcast;
`base.NoSync`: the server keeps what it has. Contract of the server's side: docs/weights.md.
"""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.config import SyncConfig
from trainer.rollout_client import RolloutClient
from trainer.sync.base import NoSync, WeightSync


def build(
    config: SyncConfig, client: RolloutClient, run: Path, rounded: torch.dtype | None = None
) -> WeightSync:
    """The configured way.

    Args:
        rounded: the type that the trainer computes in, if it keeps weights in another.

    Raises:
        ValueError: it cannot work here; the message names the remedy.
    """
    folder = Path(config.folder).expanduser() if config.folder else run / "weights"
    if config.method == "safetensors":
        from trainer.sync.folder import FolderSync

        return FolderSync(
            client,
            folder,
            checksums=config.checksums,
            timeout=config.timeout,
            rounded=rounded,
        )
    if config.method == "lora":
        from trainer.sync.lora import LoraSync

        return LoraSync(client, folder, timeout=config.timeout)
    if config.method == "nccl":
        from trainer.sync.nccl import NcclSync

        return NcclSync(client, config)
    return NoSync()
