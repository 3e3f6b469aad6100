"""Generating the next batch while this one trains, and keeping it over a restart.

Samples that wait are trained on after the next update. Their densities at the weights that
sampled them cannot be had again, so a checkpoint holds them.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from trainer import records
from trainer.collect import Collected, Collector
from trainer.learn import Learner, Prepared
from trainer.ranks import Ranks


def in_background(ranks: Ranks, work: Callable[[], Collected]) -> Callable[[], Collected]:
    """Begin on rank 0, in a thread that dies with the process; call the result to wait for it."""
    future: Future[Collected] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    if ranks.leads:
        threading.Thread(target=run, daemon=True).start()
    return lambda: ranks.share(future.result)


def freeze(ranks: Ranks, batch: Collected | None, waiting: Prepared | None) -> Any:
    """The batch that waits, in plain data; None if none does. All ranks call it."""
    if batch is None or waiting is None:
        return None
    olds = [part.old for part in waiting.batches]
    mine = [None if old is None else (old.soft.cpu(), old.hard.cpu()) for old in olds]
    return {"record": records.encode(batch.record), "old": ranks.gather(mine)}


def thaw(frozen: Any, collector: Collector, learner: Learner) -> tuple[Collected, Prepared]:
    """What `freeze` kept, ready to train on.

    Raises:
        ValueError: another number of ranks split it, or its soft inputs cannot be had again.
    """
    ranks = learner.ranks
    if len(frozen["old"]) != ranks.size:
        raise ValueError(
            f"the checkpoint holds a batch that is split over {len(frozen['old'])} processes: go "
            "on with as many, or from a run with rollout.max_staleness = 0"
        )
    record = records.decode(frozen["record"])
    batch = ranks.share(lambda: collector.judge(record))
    if learner.config.model.table_gradient != "frozen" and records.needs_table(batch.samples):
        raise ValueError(
            "the checkpoint holds a batch with sparse records, whose soft inputs need an embedding "
            "table that has changed since: go on from a checkpoint without a waiting batch, or "
            "start another --run"
        )
    prepared = learner.prepare(batch)
    for part, kept in zip(prepared.batches, frozen["old"][ranks.rank]):
        if part.old is not None and kept is not None:
            soft, hard = (values.to(learner.device) for values in kept)
            part.old = dataclasses.replace(part.old, soft=soft, hard=hard)
    return batch, prepared
