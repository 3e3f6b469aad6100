"""Scorers in worker processes that are killed when they hang, and the count of what went wrong.

A hung regular expression or a symbolic simplification cannot be interrupted from inside, so each
worker has a wall clock outside: it is killed with all its children and replaced. A timeout, a
crash or an exception is a reward of 0 that is counted; above a rate it stops the run, since
silent zeros look like a model that does not learn.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from trainer.rewards.worker import Reply, Request

START_SECONDS = 60.0
SEVERAL = 2
"""Golds that must fail before the scorer is at fault; one may be a bad row."""
_SCRUBBED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""A scorer that finds these would take itself for a training rank."""


class RewardFailure(RuntimeError):
    """Too many rewards could not be computed."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The result for one answer."""

    reward: float
    correct: bool
    extracted: str | None = None
    failure: str | None = None
    """timeout, crash or error; the reward is 0 then."""
    message: str = ""


@dataclass(slots=True)
class Tally:
    """What came out of the pool so far. Healthy: no failures; look at `examples` otherwise."""

    scored: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


class _Worker:
    """One process and the line to it; owned by one thread."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if k not in _SCRUBBED}
        # A fresh interpreter, not a fork: forking a process with threads and a GPU is not safe.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainer.rewards.worker", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        self.line = Connection(ours.detach())

    def greet(self) -> None:
        """Wait until it is ready.

        Raises:
            RewardFailure: it never will be.
        """
        if not self.line.poll(START_SECONDS):
            raise RewardFailure(f"a reward worker did not start in {START_SECONDS:.0f} s")
        try:
            self.line.recv_bytes()
        except (EOFError, OSError):
            raise RewardFailure(
                "a reward worker died at its start; run `python -m trainer.rewards.worker 0` to "
                "see why"
            ) from None

    def kill(self) -> None:
        """End the process and everything it started; from any thread. The line reads as ended."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def bury(self) -> None:
        """Kill it and free what it holds here; nobody may use the line any more."""
        self.kill()
        self.process.wait()
        self.line.close()


class RewardPool:
    """A few worker processes behind `submit`. Use as a context manager.

    Args:
        scorer: name of the scorer (`base.find`).
        workers: processes.
        timeout: seconds one answer may take.
        max_failure_rate: share of failed rewards among the last `window` above which `check`
            raises.
        window: see `max_failure_rate`.
    """

    def __init__(
        self,
        scorer: str,
        workers: int = 2,
        timeout: float = 10.0,
        max_failure_rate: float = 0.05,
        window: int = 500,
    ) -> None:
        if workers < 1 or timeout <= 0:
            raise ValueError("a reward pool needs workers >= 1 and timeout > 0")
        self.scorer, self.timeout = scorer, timeout
        self.max_failure_rate, self.window = max_failure_rate, window
        self.tally = Tally()
        self._recent: list[bool] = []
        self._lock = threading.Lock()
        self._checks_golds = False
        """Whether any check of a gold has come to a result."""
        self._failed_golds = 0
        self._closed = False
        self._workers: set[_Worker] = set()
        """Processes to kill where a thread is busy with them, starting or scoring."""
        self._jobs: queue.SimpleQueue[tuple[Request, Future[Scored]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, answer: str, gold: str, metadata: Mapping[str, Any]) -> Future[Scored]:
        """Score one answer; the future never raises for a failure of the scorer. It is cancelled
        if the pool closes first."""
        return self._put("score", answer, gold, metadata)

    def verifiable(self, golds: Sequence[tuple[str, Mapping[str, Any]]]) -> list[bool]:
        """Which golds can be scored at all; a check that fails or hangs says no.

        Raises:
            RewardFailure: the check has failed on several golds, in this call or calls before, and
                never worked in this pool: that is the scorer, not the data.
        """

        def judged(some: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Scored]:
            futures = [self._put("verifiable", "", gold, metadata) for gold, metadata in some]
            return [future.result() for future in futures]

        results = judged(golds)
        again = [i for i, r in enumerate(results) if r.failure is not None]
        with self._lock:
            self._checks_golds |= len(again) < len(results)
            able = self._checks_golds
            self._failed_golds += len(again)
            failed = self._failed_golds
        if able:  # a busy moment must not decide what a run trains on
            for i, result in zip(again, judged([golds[i] for i in again])):
                results[i] = result
        with self._lock:  # bad data is dropped, not a failing scorer
            self.tally, self._recent = Tally(), []
        if failed >= SEVERAL and not able:
            raise RewardFailure(
                f"the reward {self.scorer!r} fails on every gold: {results[0].message}"
            )
        return [result.correct for result in results]

    def check(self) -> None:
        """Raise `RewardFailure` if too many of the last rewards failed."""
        with self._lock:
            recent, tally = list(self._recent), self.tally
            examples = "; ".join(f"{kind}: {text}" for kind, text in tally.examples.items())
        if recent and sum(recent) / len(recent) > self.max_failure_rate:
            raise RewardFailure(
                f"{sum(recent)} of the last {len(recent)} rewards failed (limit "
                f"{self.max_failure_rate:.1%}): {dict(tally.failures)}. {examples}. Mend the "
                "reward function, raise reward.timeout, or raise reward.max_failure_rate"
            )

    def close(self) -> None:
        """Stop at once: workers are killed, busy or not, and what has no result is cancelled.

        Who wants results waits for them first. What is left here was left by an error or an
        interrupt, and may be hours of work.
        """
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
        for _ in self._threads:  # behind all jobs, which the threads cancel on their way
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(
        self, kind: str, answer: str, gold: str, metadata: Mapping[str, Any]
    ) -> Future[Scored]:
        request = Request(self.scorer, kind, answer, gold, json.dumps(dict(metadata)))
        future: Future[Scored] = Future()
        with self._lock:
            if not self._closed:
                self._jobs.put((request, future))
                return future
        future.cancel()
        return future

    def _run(self) -> None:
        worker: _Worker | None = None
        while (job := self._jobs.get()) is not None:
            request, future = job
            if self._closed:
                future.cancel()
                continue
            try:
                worker = worker or self._start()
                result = self._ask(worker, request)
            except Exception as error:
                result = Scored(0.0, False, failure="crash", message=str(error))
            if result.failure in ("timeout", "crash"):
                self._end(worker)
                worker = None
            if self._closed:  # the crash is the close's own
                future.cancel()
                continue
            self._count(request, result)
            future.set_result(result)
        self._end(worker)

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise RewardFailure("the pool is closed")
            worker = _Worker()
            self._workers.add(worker)
        try:
            worker.greet()
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: _Worker | None) -> None:
        if worker is not None:
            with self._lock:  # before its number may be another process's
                self._workers.discard(worker)
            worker.bury()

    def _ask(self, worker: _Worker, request: Request) -> Scored:
        try:
            worker.line.send_bytes(msgspec.msgpack.encode(request))
            if not worker.line.poll(self.timeout):
                text = f"no result within {self.timeout:g} s"
                return Scored(0.0, False, failure="timeout", message=text)
            reply = msgspec.msgpack.decode(worker.line.recv_bytes(), type=Reply)
        except (EOFError, OSError):
            code = worker.process.wait()
            return Scored(0.0, False, failure="crash", message=f"the worker died (status {code})")
        if reply.error is not None:
            return Scored(0.0, False, failure="error", message=reply.error)
        return Scored(reply.reward, reply.correct, reply.extracted)

    def _count(self, request: Request, result: Scored) -> None:
        with self._lock:
            self.tally.scored += 1
            self._recent = [*self._recent, result.failure is not None][-self.window :]
            if result.failure is not None:
                self.tally.failures[result.failure] += 1
                shown = (request.answer or request.gold)[:120]
                self.tally.examples.setdefault(result.failure, f"{result.message} on {shown!r}")
