"""Checkpoints: what they are called, how they were trained, and their way to the server."""

from __future__ import annotations

import json
import os
import shutil
import threading
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softvllm.core.checkpoint import write_marker
from softvllm.core.fingerprint import fingerprint
from softvllm.core.weight_folder import SUFFIX
from trainer.load import ADAPTER, folder_of
from trainer.rollout_client import RolloutClient, check_server
from trainer.sync.base import served_version
from trainer.sync.folder import FolderSync

SERVED = "served"


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights."""

    name: str
    """Unique in the evaluation, usable as a folder's name."""
    training: str
    """How it was trained: none, hard, soft, fuzzy or any word; rows of the tables."""
    seed: int | None
    """Training seed; checkpoints of one training and several seeds give mean and deviation."""
    folder: Path | None
    """None: whatever is in service."""
    weights: str
    """Fingerprint of the weights."""
    given: str | None = None
    """The folder as the command names it, for the record: where it really lies says nothing
    elsewhere."""

    @property
    def version(self) -> str:
        """Name of the weights in service, and in every sample's trace."""
        return f"eval-{self.name}-{self.weights}"


def parse(specs: Sequence[str], served: str | None) -> list[Checkpoint]:
    """Checkpoints of TRAINING[:SEED]=FOLDER or FOLDER; smollm2 is the default model's folder.

    Args:
        served: weight version in service; None without a server.

    Raises:
        ValueError: not a folder with safetensors weights, a name twice, `served` not first.
    """
    out: list[Checkpoint] = []
    for spec in specs:
        tag, path = _parts(spec)
        if path == SERVED:
            if out:
                raise ValueError("`served` must come first: it means the weights before any push")
            training, seed, folder, weights = tag or "none", None, None, f"served {served}"
            given = None
        else:
            folder, given = _folder(folder_of(path)), path
            training, seed = _of_run(folder) if tag is None else _tag(tag, spec)
            weights = str(fingerprint(folder))
        name = training if seed is None else f"{training}-{seed}"
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(f"checkpoint {spec!r}: {training!r} must be letters, digits, . _ or -")
        if any(other.name == name for other in out):
            raise ValueError(
                f"two checkpoints are called {name!r}; tell them apart as TRAINING:SEED=FOLDER"
            )
        out.append(Checkpoint(name, training, seed, folder, weights, given))
    return out


def restored(path: str) -> Checkpoint:
    """What `--restore` names: a folder, not an entry of any table.

    Raises:
        ValueError: not a folder with safetensors weights.
    """
    folder = _folder(folder_of(path))
    return Checkpoint("restore", "restore", None, folder, str(fingerprint(folder)), path)


def base_of(path: str | None, checkpoints: Sequence[Checkpoint]) -> str | None:
    """The untrained model: what `model.path` says, else a folder tagged `none`. No other
    checkpoint may stand in for it."""
    tagged = (str(c.folder) for c in checkpoints if c.folder and c.training == "none")
    return folder_of(path) if path else next(tagged, None)


def base_weights(base: str) -> str:
    """Fingerprint of the base model's folder, or name and commit on the hub.

    Raises:
        ValueError: there are no weights.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        found = fingerprint(folder)
        if found is None:
            raise ValueError(f"model.path = {base!r} holds no *{SUFFIX} or *.bin weights")
        return found
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        file = cached_file(base, "config.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {base!r}: {error}") from None
    return f"{base}@{extract_commit_hash(file, None)}"


def _parts(spec: str) -> tuple[str | None, str]:
    """(TRAINING[:SEED] or None, path); runs/lr=1e-5/best is a path, with a tag or without."""
    tag, equals, path = spec.partition("=")
    if not equals or Path(spec).expanduser().is_dir():
        return None, spec
    return tag, path


def _folder(path: str) -> Path:
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise ValueError(f"checkpoint {path!r} is no folder")
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"{path} is a LoRA adapter; `python -m trainer.merge {path} OUT` merges it with its "
            "base model; give OUT"
        )
    if not list(folder.glob(f"*{SUFFIX}")) or not (folder / "config.json").exists():
        raise ValueError(
            f"{path} lacks config.json or *{SUFFIX} files; save it with model.save_pretrained"
        )
    return folder


def _tag(tag: str, spec: str) -> tuple[str, int | None]:
    training, colon, seed = tag.partition(":")
    if not training or (colon and not seed.isdecimal()):
        raise ValueError(f"checkpoint {spec!r} must be TRAINING[:SEED]=FOLDER, e.g. soft:1=DIR")
    return training, int(seed) if colon else None


def _of_run(folder: Path) -> tuple[str, int | None]:
    """Mode and seed of the trainer's run that a folder lies in."""
    settings = folder.parent / "config.toml"
    if not settings.is_file():
        raise ValueError(
            f"{folder} lies in no trainer's run, so its training is unknown; say it as "
            f"TRAINING[:SEED]={folder}"
        )
    raw = tomllib.loads(settings.read_text(encoding="utf-8"))
    return str(raw.get("rollout", {}).get("mode", "soft")), int(raw.get("seed", 0))


def require_unchanged(model: Path | str, weights: str) -> None:
    """Raise ValueError if a folder, or a name on the hub, no longer holds the weights of this
    fingerprint. A live trainer's `best` is a path, not weights: hours may lie between their name
    and their use."""
    try:
        now: str | None = base_weights(str(model))
    except (OSError, ValueError):  # a file vanished, or the folder
        now = None
    if now != weights:
        raise ValueError(
            f"{model} changed since the evaluation began (weights {weights} -> {now}): evaluate "
            "a copy of it. Samples made so far are of the old weights; if those are gone, choose "
            "another --out"
        )


class CheckpointSync(FolderSync):
    """Puts checkpoint folders into service: a folder of links with a marker, nothing is copied.

    What the links lead to is compared with the checkpoint's fingerprint at every push, of a
    restarted server, too. Once loaded, weights stay what they are: a server reads them again only
    when they are pushed again.
    """

    def __init__(self, client: RolloutClient, folder: Path, timeout: float) -> None:
        super().__init__(client, folder.absolute(), checksums=False, timeout=timeout)
        self._lock = threading.Lock()
        self._pushed: Checkpoint | None = None
        self._made: set[Path] = set()

    def serve(self, checkpoint: Checkpoint, info: dict[str, Any]) -> None:
        """Put one checkpoint into service.

        Raises:
            ValueError: it does not fit the served model, or its folder has changed.
            ServerRefused, ServerGone: it is not in service.
        """
        assert checkpoint.folder is not None
        require_unchanged(checkpoint.folder, checkpoint.weights)
        require_fit(checkpoint, info)
        links = self.folder / checkpoint.version
        shutil.rmtree(links, ignore_errors=True)
        links.mkdir(parents=True)
        self._made.add(links)
        for file in checkpoint.folder.glob(f"*{SUFFIX}"):
            os.symlink(file, links / file.name)
        write_marker(links, {"weight_version": checkpoint.version})
        self._last, self._pushed = (checkpoint.version, links), checkpoint
        if served_version(self.client) != checkpoint.version:
            self._serve()

    def recover(self) -> None:
        with self._lock:  # several requests may notice at once that the server restarted
            super().recover()

    def _update(self, version: str, path: Path) -> float:
        self._require_unchanged()  # before the server reads it, and complains of something else
        return super()._update(version, path)

    def _opened(self) -> None:
        # What was replaced up to now is seen here, before a request can meet it; what is written
        # to later, the server sees in the files that it holds.
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        assert self._pushed is not None and self._pushed.folder is not None
        require_unchanged(self._pushed.folder, self._pushed.weights)

    def clean(self) -> None:
        """Remove the links that were made here, and nothing that anybody else put beside them."""
        for links in self._made:
            shutil.rmtree(links, ignore_errors=True)
        with suppress(OSError):  # somebody else's files, or none were made
            self.folder.rmdir()


def require_fit(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    """Raise ValueError if the server cannot take these weights."""
    if not info.get("enable_rl"):
        raise ValueError(
            f"the server takes no weights, so {checkpoint.name} cannot be evaluated: start it with "
            "--enable-rl, or evaluate --checkpoints none=served"
        )
    assert checkpoint.folder is not None
    require_sizes(str(checkpoint.folder), info)


def require_sizes(model: str, info: dict[str, Any]) -> None:
    """Raise ValueError if the model, a folder or a name on the hub, is not of the served shape."""
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        from transformers.utils.hub import cached_file

        found = cached_file(model, "config.json", _raise_exceptions_for_missing_entries=False)
        if found is None:
            return
        file = Path(found)
    text = json.loads(file.read_text(encoding="utf-8"))
    text = text.get("text_config", text)
    dim, vocab = text.get("hidden_size"), text.get("vocab_size")
    if dim is None or vocab is None:
        return
    trouble = check_server(info, mode=info["modes"][0], dim=dim, vocab_size=vocab)
    if trouble:
        raise ValueError(f"{model} does not fit the server: " + "; ".join(trouble))
