"""Checkpoints that are whole or absent, and the model to keep.

A checkpoint `checkpoints/step_000100` holds the trainable weights with the optimiser's moments
(`state.pt`), and `state.json`: the step, the data cursor (problems *trained* on, not generated),
the random state, the best validation. It is written beside and renamed, so a process killed at any
moment leaves only whole ones.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.sync.base import named_weights

_NAME = re.compile(r"step_(\d{6,})")
STATE, NUMBERS = "state.json", "state.pt"


@dataclass
class State:
    """Where a run stands, in plain data."""

    run_id: str
    """Part of every weight version's name, so that two runs' weights are never mistaken."""
    step: int = 0
    """Optimiser steps done."""
    cursor: int = 0
    """Problems trained on: position in the endless training sequence."""
    best: float = -1.0
    """Best greedy accuracy so far; -1: none."""
    best_step: int = -1

    @property
    def version(self) -> str:
        """Name of the weights after `step` steps."""
        return f"{self.run_id}-{self.step:06d}"


def save(
    folder: Path, state: State, optimiser: Any, keep: int, extra: Any = None, *, leads: bool = True
) -> None:
    """Write a checkpoint and remove all but the newest `keep`.

    Args:
        extra: whatever else must come back, in `torch.save`'s reach.
        leads: False on the ranks that only hand over their shards.
    """
    weights = optimiser.state_dict()
    if not leads:
        return
    target = folder / f"step_{state.step:06d}"
    work = folder / f".{target.name}.{secrets.token_hex(4)}"
    work.mkdir(parents=True)
    numbers = {
        "optimiser": weights,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "extra": extra,
    }
    torch.save(numbers, work / NUMBERS)
    _sync(work / NUMBERS)
    (work / STATE).write_text(json.dumps(asdict(state), indent=1))
    _sync(work / STATE)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(work, target)
    _sync(folder)
    for step, path in whole(folder)[:-keep]:
        if step != state.step:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)  # of processes killed while writing


def whole(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, oldest first."""
    found = []
    for path in folder.glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / STATE).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def load(path: Path, optimiser: Any) -> tuple[State, Any]:
    """Put a checkpoint back: weights, moments, random state. Returns state and `extra`.

    Raises:
        ValueError: the checkpoint is of another model or cannot be read.
    """
    try:
        state = State(**json.loads((path / STATE).read_text()))
        numbers = torch.load(path / NUMBERS, map_location="cpu", weights_only=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"cannot read checkpoint {path}: {error}") from None
    optimiser.load_state_dict(numbers["optimiser"])
    torch.set_rng_state(numbers["random"])
    if numbers["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(numbers["random_cuda"])
    return state, numbers["extra"]


def save_model(
    folder: Path, model: Any, tokenizer: Any, dtype: torch.dtype, *, leads: bool = True
) -> None:
    """The model in Hugging Face format, as stock vLLM serves it; whole or absent.

    Args:
        dtype: of the weights on disk.
        leads: False on the ranks that only hand over their shards.
    """
    weights = {}
    for name, tensor in named_weights(model, dtype)():
        if leads:
            weights[name] = tensor.cpu()
    if not leads:
        return
    for path in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(path, ignore_errors=True)  # of processes killed while writing
    work = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    # The trainer's attention is known to this process only.
    kernel, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
    try:
        model.save_pretrained(work, state_dict=weights)
        _name_dtype(work / "config.json", dtype)
        tokenizer.save_pretrained(work)
        old = folder.parent / f".{folder.name}.old"
        if folder.exists():
            os.rename(folder, old)
        os.rename(work, folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        model.config._attn_implementation = kernel


def put_back(run: Path) -> None:
    """Give a model its name again that a process killed between `save_model`'s renames took."""
    for old in run.glob(".*.old"):
        folder = run / old.name.removeprefix(".").removesuffix(".old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, folder)


def _name_dtype(path: Path, dtype: torch.dtype) -> None:
    """The type on disk, where shards are kept in another one."""
    settings = json.loads(path.read_text())
    settings["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
