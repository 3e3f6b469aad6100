"""What is asked of the server before, between and after samples: model, weights, room."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from softvllm.core.params import CoTParams
from softvllm.core.recipe import FORCED
from trainer.eval.checkpoints import Checkpoint
from trainer.eval.plan import Cell
from trainer.files import write_whole
from trainer.rollout_client import RolloutClient, ServerGone

SERVED_FILE = "served.json"
SERVER_FILE = "server.json"
RECORDED = (
    *("model", "dtype", "softvllm", "vllm", "modes", "refusal", "recipe", "limits", "embedding"),
    *("enable_rl", "weights_at_start", "weight_version"),
)
"""What an evaluation asks of a server's facts."""
FIRST_VERSION = "default"
"""Weight version of a server that nobody has pushed weights to."""


class ServerNeeded(Exception):
    """Recorded facts do not do: there are samples to make, or weights to put into service."""


def reach(client: RolloutClient, out: Path, wait: bool) -> tuple[dict[str, Any], bool]:
    """The server's facts, and whether they are its own: where it does not answer, those that this
    evaluation recorded stand in, which is all that a report of finished samples needs.

    Args:
        wait: insist on the server, for as long as the client is patient.

    Raises:
        ServerGone: it does not answer, and nothing is recorded.
    """
    path = out / SERVER_FILE
    if wait or not path.exists():
        return client.info(), True
    try:
        return dict(client.call("GET", "/v1/cot/info")), True
    except ServerGone:
        return json.loads(path.read_text()), False


def record(info: dict[str, Any], out: Path) -> None:
    """Keep a server's facts for `reach`."""
    facts, path = {name: info.get(name) for name in RECORDED}, out / SERVER_FILE
    if not path.exists() or json.loads(path.read_text()) != facts:
        write_whole(path, json.dumps(facts) + "\n")


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
    before: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    # Pushes change the version in service, not what the server was started with.
    if before and _differ(before, now, ("model", "weights_at_start")):
        raise _other_model(before, now)
    meant = before or now
    version = meant["weight_version"]
    if points[0].training == "none" and version not in (None, FIRST_VERSION):
        raise ValueError(
            f"`served` means weights {version!r}, which were pushed to the server, so "
            "`none=served` would call trained weights untrained: give the untrained model's "
            "folder, --checkpoints none=FOLDER, name the training, e.g. soft=served, or start "
            "the server again and take another --out"
        )
    return meant


def _served_now(info: dict[str, Any]) -> dict[str, Any]:
    return {name: info.get(name) for name in ("model", "weight_version", "weights_at_start")}


def _differ(one: dict[str, Any], other: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether two servers' facts contradict each other; what one leaves out does not."""
    both = [name for name in names if None not in (one.get(name), other.get(name))]
    return any(one[name] != other[name] for name in both)


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
        if _differ(before, now, tuple(now)):
            raise _other_model(before, now)
    else:
        write_whole(path, json.dumps(now) + "\n")
    version = now["weight_version"]
    return None if version is None else str(version)


def require_room(
    cells: Sequence[Cell], info: dict[str, Any], tokens: Callable[[str], Sequence[int]]
) -> None:
    """Raise ValueError if the server cannot hold a cell's longest prompt, budgets and forced text.

    Args:
        tokens: ids of a text, without special tokens.
    """
    limits = info.get("limits") or {}
    most, length = limits.get("max_think_tokens"), limits.get("max_model_len")
    for cell in cells:
        task = cell.task
        think, prompt = task.max_think_tokens, max(map(len, task.prompts))
        if most is not None and think > most:
            raise ValueError(
                f"task {task.name}: the server thinks {most} tokens at most, {think} are asked: "
                "lower max_think_tokens or serve with a larger --max-model-len"
            )
        forced = _forced_tokens(cell, info, tokens)
        needed = prompt + think + forced + task.answer_max_tokens
        if length is not None and needed > length:
            raise ValueError(
                f"task {task.name}, setting {cell.setting.name}: a prompt of {prompt} tokens, "
                f"{think} of thought, {forced} forced and {task.answer_max_tokens} of answer are "
                f"{needed}, the server holds {length}: raise its --max-model-len, or lower "
                "max_think_tokens or prompt.max_tokens"
            )


def _forced_tokens(cell: Cell, info: dict[str, Any], tokens: Callable[[str], Sequence[int]]) -> int:
    """Length of the longer text that the server writes between thought and answer."""
    unsaid = {field.name: field.default for field in fields(CoTParams)}
    said = {**unsaid, **(info.get("recipe") or {}), **cell.setting.cot}
    texts = [said[name] for name in FORCED]
    return max(len(tokens(text) if isinstance(text, str) else text) for text in texts)


def require_same_server(client: RolloutClient, info: dict[str, Any]) -> None:
    """A server that restarted under a running evaluation must be the same."""

    def facts(of: dict[str, Any]) -> dict[str, Any]:
        started = {name: of.get(name) for name in ("model", "weights_at_start", "recipe")}
        return {**started, **server_facts(of)}

    try:
        now = facts(dict(client.call("GET", "/v1/cot/info")))
    except ServerGone:
        return  # not back yet; the next attempt asks again
    if now != facts(info):
        raise ValueError(
            f"the server restarted as {now}, this evaluation began with {facts(info)}: start it "
            "as before and repeat the command, or choose another --out"
        )
