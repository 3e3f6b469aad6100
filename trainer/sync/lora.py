"""LoRA adapters: a new name for every version, the old one unloaded once nobody asks for it.

A reload under the same name would go on with keys and values cached for the old adapter. The
server needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. Samples carry no adapter
version; that rollouts ask for the new name is the check.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from trainer.rollout_client import RolloutClient, ServerRefused


class LoraSync:
    """Adapter folders to `/v1/load_lora_adapter`."""

    checks_versions = False

    def __init__(self, client: RolloutClient, folder: Path, *, timeout: float) -> None:
        self.client, self.folder, self.timeout = client, folder, timeout
        self.served_model: str | None = None
        self._path: Path | None = None

    def push(self, version: str, model: Any) -> dict[str, float]:
        start = time.monotonic()
        path = self.folder.absolute() / version
        shutil.rmtree(path, ignore_errors=True)
        model.save_pretrained(path)
        written = time.monotonic()
        before, before_path = self.served_model, self._path
        self._load(version, path)
        self.served_model, self._path = version, path
        if before is not None and before != version:
            self.client.call(
                "POST",
                "/v1/unload_lora_adapter",
                json={"lora_name": before},
                timeout=self.timeout,
                plain=True,
            )
            if before_path is not None:
                shutil.rmtree(before_path, ignore_errors=True)
        end = time.monotonic()
        return {"write": written - start, "paused": 0.0, "total": end - start}

    def recover(self) -> None:
        if self.served_model is not None and self._path is not None:
            if self.served_model in self._names():
                return
            self.client.say(f"the server lost adapter {self.served_model!r}; sending it again")
            self._load(self.served_model, self._path)

    def _names(self) -> set[str]:
        listing = self.client.call("GET", "/v1/models", retry=True)
        return {str(entry["id"]) for entry in listing["data"]}

    def _load(self, name: str, path: Path) -> None:
        try:
            self.client.call(
                "POST",
                "/v1/load_lora_adapter",
                json={"lora_name": name, "lora_path": str(path)},
                timeout=self.timeout,
                plain=True,
            )
        except ServerRefused as error:
            raise ServerRefused(
                f"{error}. Adapters need a server started with --enable-lora, a --max-lora-rank "
                "that fits, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
            ) from None
        if name not in self._names():
            raise ServerRefused(f"the server took adapter {name!r} but does not list it")
