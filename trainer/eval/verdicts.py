"""Verification: worker pools of an evaluation, and what earlier runs left to be judged again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec
from tqdm import tqdm

from trainer.eval.checkpoints import Checkpoint
from trainer.eval.config import EvalConfig
from trainer.eval.plan import Cell, gold_digest, prompt_digest
from trainer.eval.store import Key, Row, Store
from trainer.rewards.pool import RewardFailure, RewardPool


class Verifiers:
    """Pools of worker processes, one for every reward, started when there is work.

    Args:
        stack: ends them.
    """

    def __init__(self, config: EvalConfig, stack: ExitStack) -> None:
        self.config, self.stack = config, stack
        self._lock = threading.Lock()
        self._pools: dict[str, RewardPool] = {}

    def __call__(self, reward: str) -> RewardPool:
        with self._lock:
            if reward not in self._pools:
                self._pools[reward] = self.stack.enter_context(self._make(reward))
            return self._pools[reward]

    @contextmanager
    def apart(self, reward: str) -> Iterator[RewardPool]:
        """A pool whose failures do not count for `check`: those of old answers are expected."""
        with self._make(reward) as pool:
            yield pool

    def check(self, reward: str) -> None:
        """Stop early where a scorer is broken.

        A few failures say nothing about a rate: below as many as a full window may hold, the count
        over all files decides (`sampling.require_sound`), whatever run they were made in.

        Raises:
            RewardFailure: too many of the last verifications failed.
        """
        pool = self(reward)
        if pool.tally.failed <= self.config.max_failure_rate * pool.window:
            return
        try:
            pool.check()
        except RewardFailure as failure:
            text = str(failure).replace("reward.timeout", "--judge-timeout")
            text = text.replace("reward.max_failure_rate", "--max-failure-rate")
            raise RewardFailure(text) from None

    def _make(self, reward: str) -> RewardPool:
        c = self.config
        return RewardPool(reward, c.workers, c.judge_timeout, c.max_failure_rate)


def settle(
    points: Sequence[Checkpoint],
    cells: Sequence[Cell],
    stores: dict[tuple[str, int], Store[Row]],
    verifiers: Verifiers,
) -> int:
    """Look through what earlier runs left, before anything is added to it.

    Answers whose verification failed (a timeout, a crash) are judged again; a verdict replaces the
    failure, another failure changes nothing.

    Returns:
        How many samples that this evaluation wants remain without a result or a verdict.

    Raises:
        ValueError: a problem had another prompt, gold or metadata.
    """
    failed = 0
    for point in points:
        for number, cell in enumerate(cells):
            store = stores[point.name, number]
            broken = _broken(store, cell)
            answers = [row for row in broken.values() if row.error is None]
            if answers:
                tqdm.write(f"{store.path}: judging {len(answers)} answers again")
            failed += len(broken) - _judged_again(store, cell, answers, verifiers)
    return failed


def _broken(store: Store[Row], cell: Cell) -> dict[Key, Row]:
    """Rows without a result or a verdict; insists that all belong to the problems of today."""
    task = cell.task
    digests = {
        p.id: (prompt_digest(ids), gold_digest(p)) for p, ids in zip(task.problems, task.prompts)
    }
    wanted = set(cell.all_keys())
    broken: dict[Key, Row] = {}
    for row in store.rows():
        if row.key not in wanted:
            continue
        prompt, gold = digests[row.problem]
        if row.prompt != prompt or row.gold != gold:
            what = "prompt" if row.prompt != prompt else "gold or other metadata"
            raise ValueError(
                f"{store.path}: problem {row.problem} had another {what}; data or tokenizer "
                "changed. Choose another --out or delete the file"
            )
        if row.failed:
            broken[row.key] = row
        else:
            broken.pop(row.key, None)  # a later line holds the verdict
    return broken


def _judged_again(store: Store[Row], cell: Cell, rows: Sequence[Row], verifiers: Verifiers) -> int:
    """How many of these rows now have a verdict."""
    if not rows:
        return 0
    mended = 0
    problems = {p.id: p for p in cell.task.problems}
    with verifiers.apart(cell.task.reward) as pool:
        asked = [
            pool.submit(row.answer, problems[row.problem].gold, problems[row.problem].metadata)
            for row in rows
        ]
        for row, future in zip(rows, asked):
            scored = future.result()
            if scored.failure is None:
                verdict = {"correct": scored.correct, "extracted": scored.extracted}
                store.replace(msgspec.structs.replace(row, judge=None, **verdict))
                mended += 1
    return mended
