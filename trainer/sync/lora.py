"""LoRA adapters: a new name for every version, the old one unloaded once nobody asks for it.

A reload under the same name from the same folder would go on with keys and values cached for the
old adapter. The server needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. Samples carry
no adapter version; that rollouts ask for the new name is the check.
"""

from __future__ import annotations

import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from trainer.rollout_client import RolloutClient, ServerGone, ServerRefused
from trainer.sync.base import patiently, wake

NEEDS = (
    "adapters need a server started with --enable-lora, a --max-lora-rank that fits, and "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
)


class LoraSync:
    """Adapter folders to `/v1/load_lora_adapter`.

    The folder of the adapter in service is kept: a server that restarts gets it again.
    """

    checks_versions = False

    def __init__(self, client: RolloutClient, folder: Path, *, timeout: float) -> None:
        self.client, self.folder, self.timeout = client, folder, timeout
        self.served_model: str | None = None
        self._path: Path | None = None

    def push(self, version: str, model: Any) -> dict[str, float]:
        start = time.monotonic()
        # A run that is resumed comes to a name again, with weights of its own: vLLM's prefix cache
        # tells them apart by their folders.
        path = self.folder.absolute() / f"{version}.{secrets.token_hex(4)}"
        model.save_pretrained(path)
        written = time.monotonic()
        self._serve(version, path)
        self.served_model, self._path = version, path
        for other in self.folder.glob(f"{_run_of(version)}*"):  # also of a run that was killed
            if other.name != path.name:
                shutil.rmtree(other, ignore_errors=True)
        end = time.monotonic()
        return {"write": written - start, "paused": 0.0, "total": end - start}

    def recover(self) -> None:
        wake(self.client, self.timeout)
        if self.served_model is not None and self._path is not None:
            if self.served_model in self._names():
                return
            self.client.say(f"the server lost adapter {self.served_model!r}; sending it again")
            self._serve(self.served_model, self._path)

    def _serve(self, name: str, path: Path) -> None:
        """Have an adapter loaded, and no other of this run."""

        def attempt() -> None:
            wake(self.client, self.timeout)
            self._replace(name, path)

        try:  # every step may be repeated, as each begins with what the server lists
            patiently(self.client, f"adapter {name!r}", attempt)
        except ServerGone as trouble:
            raise ServerGone(f"{trouble}; {NEEDS}") from None

    def _replace(self, name: str, path: Path) -> None:
        """One attempt. The adapter in service goes last, so that a refusal leaves it there."""
        mine = {other for other in self._names() if other.startswith(_run_of(name))}
        last = {other for other in mine if other == self.served_model != name}
        # Left by a run that was killed, or by an attempt whose answer was lost.
        for other in sorted(mine - last):
            self._unload(other)
        self._load(name, path)
        for other in last:
            self._unload(other)

    def _names(self) -> set[str]:
        listing = self.client.call("GET", "/v1/models", retry=True)
        return {str(entry["id"]) for entry in listing["data"]}

    def _unload(self, name: str) -> None:
        try:
            self.client.call(
                "POST",
                "/v1/unload_lora_adapter",
                json={"lora_name": name},
                timeout=self.timeout,
                plain=True,
            )
        except ServerRefused:
            if name in self._names():
                raise
            # It is gone already: the server restarted.

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
            raise ServerRefused(f"{error}; {NEEDS}") from None
        if name not in self._names():
            raise ServerRefused(f"the server took adapter {name!r} but does not list it")


def _run_of(version: str) -> str:
    """What all adapters of a run begin with."""
    return version.rpartition("-")[0] + "-"
