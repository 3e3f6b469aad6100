"""Weights through a folder of safetensors files that trainer and server can both read."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from softvllm.core.checkpoint import write_weights
from trainer.rollout_client import RolloutClient, ServerGone, ServerRefused
from trainer.sync.base import confirm, named_weights, patiently, served_version, wake


class FolderSync:
    """Writes and checks a folder per version while the server still works, then has it loaded.

    The server pauses for the load and goes on by itself, so a trainer that is killed at any point
    leaves a server that serves. The last folder is kept: a server that restarts gets it again.
    """

    checks_versions = True
    served_model: str | None = None

    def __init__(
        self,
        client: RolloutClient,
        folder: Path,
        *,
        checksums: bool,
        timeout: float,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.client, self.folder, self.rounded = client, folder, rounded
        self.checksums, self.timeout = checksums, timeout
        self.dtype: torch.dtype | None = None
        self._last: tuple[str, Path] | None = None

    def push(self, version: str, model: Any) -> dict[str, float]:
        start = time.monotonic()
        if self.dtype is None:
            name = (self.client.info().get("embedding") or {}).get("dtype")
            self.dtype = getattr(torch, name) if name else None
        path = self.folder / version
        shutil.rmtree(path, ignore_errors=True)  # of a run that was killed here
        path = write_weights(
            path,
            named_weights(model, self.dtype, self.rounded)(),
            {"weight_version": version},
            checksums=self.checksums,
        )
        before, self._last = self._last, (version, path)
        written = time.monotonic()
        stood = self._serve()
        if before is not None and before[1] != path:
            shutil.rmtree(before[1], ignore_errors=True)
        end = time.monotonic()
        return {"write": written - start, "paused": stood, "total": end - start}

    def recover(self) -> None:
        client = self.client
        wake(client, self.timeout)
        if self._last is not None and served_version(client) != self._last[0]:
            client.say(f"the server lost weights {self._last[0]!r}; sending them again")
            self._serve()

    def _serve(self) -> float:
        """Have the last folder loaded; returns the seconds the server stood still."""
        assert self._last is not None
        version, path = self._last

        def attempt() -> float:
            # A pause that is not the update's own would outlast it.
            wake(self.client, self.timeout)
            stood = self._update(version, path)
            confirm(self.client, version)
            return stood

        # Every step may be repeated: an update that was begun is given up first.
        return patiently(self.client, f"weights {version!r}", attempt)

    def _update(self, version: str, path: Path) -> float:
        """One attempt; returns the seconds that the last call took."""
        call, timeout = self.client.call, self.timeout
        call("POST", "/abort_weight_update", timeout=timeout)
        call("POST", "/start_weight_update", timeout=timeout)
        try:
            call(
                "POST",
                "/update_weights",
                json={"update_info": {"path": str(path)}},
                timeout=timeout,
            )
            self._opened()
            start = time.monotonic()
            # `keep` holds running requests; they go on with the new weights (the traces say where).
            call(
                "POST",
                "/finish_weight_update",
                json={"weight_version": version, "pause": "keep"},
                timeout=timeout,
            )
            return time.monotonic() - start
        except (ServerRefused, ValueError):
            self._give_up()
            raise

    def _opened(self) -> None:
        """The server holds the folder's files open and has loaded nothing yet: the last moment to
        raise ValueError if they are not what the version's name says."""

    def _give_up(self) -> None:
        try:
            self.client.call("POST", "/abort_weight_update", timeout=self.timeout)
        except (ServerGone, ServerRefused):
            pass  # the refusal that led here says more
