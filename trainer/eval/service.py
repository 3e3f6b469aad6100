"""What is asked of the server before, between and after samples: model, weights, room."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.eval import checkpoints as ckpt
from trainer.eval.checkpoints import Checkpoint
from trainer.eval.plan import Cell
from trainer.files import write_whole
from trainer.rollout_client import RolloutClient, ServerGone

SERVED_FILE = "served.json"
FIRST_VERSION = "default"
"""Weight version of a server that nobody has pushed weights to."""


def server_facts(info: dict[str, Any]) -> dict[str, Any]:
    """What rounds numbers differently elsewhere: samples of two such servers are not mixed."""
    return {name: info.get(name) for name in ("dtype", "softvllm", "vllm")}


def served_facts(
    points: Sequence[Checkpoint], info: dict[str, Any], out: Path
) -> dict[str, Any] | None:
    """What `served` means in this evaluation; None where it has no such checkpoint.

    Raises:
        ValueError: the server was started with another model than when this evaluation began, or
            weights that somebody pushed would count as untrained.
    """
    if not points or points[0].folder is not None:
        return None
    now, path = _served_now(info), out / SERVED_FILE
    if path.exists():
        before: dict[str, Any] = json.loads(path.read_text())
        # Pushes change the version in service, not what the server was started with.
        if any(before.get(name) != now.get(name) for name in ("model", "folder")):
            raise _other_model(before, now)
        return before
    version = now["weight_version"]
    if points[0].training == "none" and version not in (None, FIRST_VERSION):
        raise ValueError(
            f"the server serves weights {version!r}, which were pushed to it, so `none=served` "
            "would call trained weights untrained: give the untrained model's folder, "
            "--checkpoints none=FOLDER, start the server again, or name the training, "
            "e.g. soft=served"
        )
    return now


def _served_now(info: dict[str, Any]) -> dict[str, Any]:
    model = str(info.get("model"))
    found = {"model": info.get("model"), "weight_version": info.get("weight_version")}
    if Path(model).is_absolute() and Path(model).is_dir():
        found["folder"] = ckpt.fingerprint(Path(model))  # same place, perhaps other weights
    return found


def _other_model(before: dict[str, Any], now: dict[str, Any]) -> ValueError:
    return ValueError(
        f"`served` meant {before} when this evaluation began, the server now has {now}: "
        "start the server again with the first model, or give its folder in place of "
        "`served` and another --out"
    )


def as_served(out: Path, info: dict[str, Any]) -> str | None:
    """The version in service, which must be the one that `served` meant when this began."""
    now, path = _served_now(info), out / SERVED_FILE
    if path.exists():
        before = json.loads(path.read_text())
        if before != now:
            raise _other_model(before, now)
    else:
        write_whole(path, json.dumps(now) + "\n")
    version = now["weight_version"]
    return None if version is None else str(version)


def require_room(cells: Sequence[Cell], info: dict[str, Any]) -> None:
    """Raise ValueError if the server cannot hold a task's longest prompt and its budgets."""
    limits = info.get("limits") or {}
    most, length = limits.get("max_think_tokens"), limits.get("max_model_len")
    for task in {cell.task.name: cell.task for cell in cells}.values():
        think, prompt = task.max_think_tokens, max(map(len, task.prompts))
        if most is not None and think > most:
            raise ValueError(
                f"task {task.name}: the server thinks {most} tokens at most, {think} are asked: "
                "lower max_think_tokens or serve with a larger --max-model-len"
            )
        needed = prompt + think + task.answer_max_tokens
        if length is not None and needed > length:
            raise ValueError(
                f"task {task.name}: a prompt of {prompt} tokens, {think} of thought and "
                f"{task.answer_max_tokens} of answer are {needed}, the server holds {length}: "
                "raise its --max-model-len, or lower max_think_tokens or prompt.max_tokens"
            )


def require_same_server(client: RolloutClient, info: dict[str, Any]) -> None:
    """A server that restarted under a running evaluation must be the same."""

    def facts(of: dict[str, Any]) -> dict[str, Any]:
        return {"model": of.get("model"), **server_facts(of), "recipe": of.get("recipe")}

    try:
        now = facts(dict(client.call("GET", "/v1/cot/info")))
    except ServerGone:
        return  # not back yet; the next attempt asks again
    if now != facts(info):
        raise ValueError(
            f"the server restarted as {now}, this evaluation began with {facts(info)}: start it "
            "as before and repeat the command, or choose another --out"
        )
