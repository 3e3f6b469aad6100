"""All samples of an evaluation: files, checkpoints into service, requests, progress."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from softvllm.core.rollout import MAX_PROMPTS
from trainer import config_file
from trainer.eval import checkpoints as ckpt
from trainer.eval.checkpoints import Checkpoint, CheckpointSync
from trainer.eval.config import EvalConfig
from trainer.eval.generate import Generator, Job
from trainer.eval.plan import Cell, parts
from trainer.eval.service import as_served, require_same_server, server_facts
from trainer.eval.store import Key, Row, Store
from trainer.eval.verdicts import Verifiers
from trainer.rollout_client import RolloutClient
from trainer.sync.base import served_version

LINKS = ".eval-weights"
"""Folder in `out` where the server finds the weights: not a name that a trainer's run uses."""
Stores = dict[tuple[str, int], Store[Row]]
"""By checkpoint's name and cell's number."""


def open_stores(
    config: EvalConfig,
    points: Sequence[Checkpoint],
    cells: Sequence[Cell],
    info: dict[str, Any],
    out: Path,
) -> Stores:
    """A file for every (checkpoint, cell); refuses files that something else made."""
    stores = {}
    for point in points:
        for number, cell in enumerate(cells):
            header = {
                "format": 2,
                "server": server_facts(info),
                "weights": ckpt.SERVED if point.folder is None else point.weights,
                "setting": {
                    "mode": cell.setting.mode,
                    "cot": dict(cell.setting.cot),
                    "sampling": dict(cell.setting.sampling),
                },
                "recipe": info.get("recipe"),
                "max_think_tokens": cell.task.max_think_tokens,
                "answer_max_tokens": cell.task.answer_max_tokens,
                "stop": cell.task.stop,
                "data": cell.task.source,
                "reward": cell.task.reward,
                "prompt": config_file.to_mapping(config.prompt),
                "seed": config.seed,
            }
            folder = out / "samples" / point.name / cell.task.name
            store = Store(folder / f"{cell.setting.name}.jsonl", header, Row)
            stores[point.name, number] = store
    return stores


def missing(
    points: Sequence[Checkpoint], cells: Sequence[Cell], stores: Stores
) -> dict[tuple[str, int], list[Key]]:
    """Samples that the files lack, by checkpoint's name and cell's number."""
    return {
        (point.name, number): stores[point.name, number].missing(cell.all_keys())
        for point in points
        for number, cell in enumerate(cells)
    }


def fill(
    config: EvalConfig,
    client: RolloutClient,
    info: dict[str, Any],
    points: Sequence[Checkpoint],
    cells: Sequence[Cell],
    stores: Stores,
    verifiers: Verifiers,
    token: Callable[[int], str],
    out: Path,
    failed: int,
) -> None:
    """All missing samples, checkpoint by checkpoint.

    Args:
        failed: samples in the files that lack a result or a verdict; they count as in the run
            that made them.
    """
    lacking = missing(points, cells, stores)
    total = sum(map(len, lacking.values()))
    everything = sum(len(cell.all_keys()) for cell in cells) * len(points)
    sync = CheckpointSync(client, out / LINKS, config.timeout)
    if not total:
        if config.restore:
            _leave(config, client, info, points, sync)
        return
    for point in points:
        if point.folder and any(lacking[point.name, n] for n in range(len(cells))):
            ckpt.require_fit(point, info)  # before hours of work for the others
    slots = int((info.get("limits") or {}).get("max_num_seqs") or 32)
    size = min(MAX_PROMPTS, max(64, 8 * slots))
    counts = {"samples": 0, "tokens": 0, "correct": 0, "failed": 0}
    lock = threading.Lock()
    session = Session(out, info, total)
    session.begin()
    with (
        session.ending(counts),
        tqdm(
            total=everything,
            initial=everything - total,
            smoothing=0.05,
            unit="sample",
            mininterval=0.2 if sys.stderr.isatty() else 20.0,
        ) as bar,
    ):

        def on_row(row: Row) -> None:
            with lock:
                counts["samples"] += 1
                counts["tokens"] += row.think_tokens + row.answer_tokens
                counts["correct"] += row.correct
                counts["failed"] += row.failed
                share = counts["correct"] / counts["samples"]
                bar.set_postfix_str(f"correct {share:.1%}", refresh=False)
                bar.update()

        for point in points:
            todo = [n for n in range(len(cells)) if lacking[point.name, n]]
            if not todo:
                continue
            bar.set_description(point.name)
            version: str | None = point.version
            if point.folder is None:
                version = as_served(out, info)
            else:
                sync.serve(point, info)
            jobs = [
                Job(part, stores[point.name, n], version)
                for n in todo
                for part in parts(cells[n], lacking[point.name, n], size)
            ]

            def recover(pushed: bool = point.folder is not None) -> None:
                if pushed:
                    sync.recover()
                require_same_server(client, info)

            try:
                Generator(client, verifiers, recover, token, on_row, slots).run(jobs)
            except BaseException:
                if point.folder is not None:
                    tqdm.write(f"the server may still serve the weights of {point.name}")
                raise
            for n in todo:
                stores[point.name, n].close()
            there = everything - total + counts["samples"]
            require_sound(config, failed + counts["failed"], there)
    _leave(config, client, info, points, sync)


def require_sound(config: EvalConfig, failed: int, total: int) -> None:
    """Raise ValueError if too many samples have no result or no verdict."""
    if failed > config.max_failure_rate * total:
        raise ValueError(
            f"{failed} of {total} samples failed (limit max_failure_rate = "
            f"{config.max_failure_rate:.1%}); the files under samples/ say why in `error` and "
            "`judge`. What could not be judged is judged again by the same command "
            "(--judge-timeout gives it longer); for the others mend the cause and delete those "
            "lines; or raise --max-failure-rate"
        )


class Session:
    """Speed and server of this run in `sessions.jsonl`, apart from the results, which must not
    depend on them: a line at its start, which outlives a kill, and one at its end."""

    def __init__(self, out: Path, info: dict[str, Any], missing: int) -> None:
        self.path, self.missing = out / "sessions.jsonl", missing
        self.server = {"model": info.get("model"), **server_facts(info)}
        self._started = time.monotonic()

    def begin(self) -> None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self._write({"event": "begin", "at": when, "missing": self.missing})

    @contextmanager
    def ending(self, counts: dict[str, int]) -> Iterator[None]:
        """Write the last line, however the body ends."""
        outcome = "done"
        try:
            yield
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            seconds = round(time.monotonic() - self._started, 1)
            self._write({"event": "end", "outcome": outcome, **counts, "seconds": seconds})

    def _write(self, facts: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**facts, "server": self.server}) + "\n")


def _leave(
    config: EvalConfig,
    client: RolloutClient,
    info: dict[str, Any],
    points: Sequence[Checkpoint],
    sync: CheckpointSync,
) -> None:
    """Put the last weights into service, and say which they are."""
    if config.restore:
        sync.serve(ckpt.restored(config.restore), info)
    elif all(point.folder is None for point in points):
        return
    sync.clean()
    version = served_version(client)
    tqdm.write(
        f"the server now serves weights {version!r}"
        + (f" ({config.restore})" if config.restore else "; --restore FOLDER would put others back")
    )
