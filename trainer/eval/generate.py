"""Samples from the server into the files: some requests under way, answers judged meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from softvllm.core.phases import Phase
from softvllm.core.rollout import Sample
from softvllm.core.trace import Trace, is_soft
from trainer.data import Problem
from trainer.eval.plan import Part, gold_digest, prompt_digest
from trainer.eval.store import Key, Row, Step, Store
from trainer.eval.verdicts import Verifiers
from trainer.eval.window import Window
from trainer.patience import Progress
from trainer.rewards.pool import Scored
from trainer.rollout_client import Request, RolloutClient


@dataclass(frozen=True)
class Job:
    """One request and where its samples belong."""

    part: Part
    store: Store[Row]
    version: str | None
    """Weights that every sample must come from."""


class Generator:
    """Works a list of jobs off.

    Args:
        verifiers: who judges the answers.
        recover: see `RolloutClient.generate`.
        token: text of one token id, for think steps.
        on_row: called from other threads for every finished sample.
        slots: samples that the server computes at a time.
    """

    def __init__(
        self,
        client: RolloutClient,
        verifiers: Verifiers,
        recover: Callable[[], None],
        token: Callable[[int], str],
        on_row: Callable[[Row], None],
        slots: int = 32,
    ) -> None:
        self.client, self.verifiers, self.recover = client, verifiers, recover
        self.token, self.on_row, self.slots = token, on_row, slots

    def run(self, jobs: Iterable[Job]) -> None:
        """All jobs; what was judged so far is in the files whatever happens.

        Raises:
            ServerRefused, ServerGone, RewardFailure, ValueError: of the first job that failed.
        """
        # Requests share their patience: what queues behind others hears nothing for long.
        window, progress = Window(self.slots), Progress()

        def work(job: Job) -> None:
            try:
                self._job(job, window, progress)
                window.end(None)
            except BaseException as error:
                window.end(error)

        for job in jobs:
            window.begin(len(job.part.keys))
            # Daemons: Ctrl-C must not wait for a server's last sample.
            threading.Thread(target=work, args=(job,), daemon=True).start()
        window.drain()

    def _job(self, job: Job, window: Window, progress: Progress) -> None:
        cell = job.part.cell
        places = _places(job.part.keys)
        numbers = {p.id: i for i, p in enumerate(cell.task.problems)}
        prompts = [cell.task.prompts[numbers[p]] for p in places]
        asked = [[(p, k) for k in samples] for p, samples in places.items()]
        seeds = [[cell.seed_of(key) for key in keys] for keys in asked]
        pool = self.verifiers(cell.task.reward)
        stored: list[Future[None]] = []

        def row_of(key: Key, **fields: Any) -> Row:
            at = numbers[key[0]]
            return Row(
                problem=key[0],
                sample=key[1],
                seed=cell.seed_of(key),
                prompt=prompt_digest(cell.task.prompts[at]),
                gold=gold_digest(cell.task.problems[at]),
                **fields,
            )

        def write(row: Row) -> None:
            job.store.append(row)
            self.on_row(row)

        def take(at: tuple[int, int], sample: Sample) -> None:
            window.came()
            key = asked[at[0]][at[1]]
            problem: Problem = cell.task.problems[numbers[key[0]]]
            fields = self._facts(sample, job.part.steps)
            written: Future[None] = Future()
            stored.append(written)

            def finish(done: Future[Scored]) -> None:
                try:
                    scored = done.result()
                    verdict = {
                        "correct": scored.correct,
                        "extracted": scored.extracted,
                        "judge": scored.failure,
                    }
                    write(row_of(key, **fields, **verdict))
                    written.set_result(None)
                except BaseException as error:  # a full disk; the job's thread raises it
                    written.set_exception(error)
                finally:
                    window.judged()

            future = pool.submit(sample.answer, problem.gold, problem.metadata)
            future.add_done_callback(finish)

        request = Request(prompts, seeds, cell.body(job.part.steps), job.version)
        got = self.client.generate(request, take, self.recover, progress)
        window.sampled(len(got.failures))
        for written in stored:
            written.result()
        for at, failure in got.failures.items():
            key = asked[at[0]][at[1]]
            write(row_of(key, error=f"{failure.code}: {failure.message}"))
        self.verifiers.check(cell.task.reward)

    def _facts(self, sample: Sample, steps: bool) -> dict[str, Any]:
        trace = sample.trace
        summary = trace.summary()
        think = trace.phase == Phase.THINK
        return {
            "think": sample.text[: sample.answer_start],
            "answer": sample.answer,
            "end": summary["end_cause"],
            "finish": sample.finish_reason,
            "think_tokens": summary["think_tokens"],
            "soft_steps": summary["soft_steps"],
            "answer_tokens": summary["answer_tokens"],
            "entropy": np.round(trace.entropy[think].astype(np.float64), 4).tolist(),
            "steps": self._steps(trace, think) if steps else None,
        }

    def _steps(self, trace: Trace, think: np.ndarray) -> list[Step]:
        out = []
        soft = is_soft(trace.kind)
        for row, at in enumerate(np.flatnonzero(think)):
            top: list[tuple[str, float]] = []
            if trace.top_ids is not None and trace.top_weights is not None:
                pairs = zip(trace.top_ids[row].tolist(), trace.top_weights[row].tolist())
                top = [(self.token(i), round(w, 4)) for i, w in pairs if w >= 5e-4]
            token = self.token(int(trace.token[at]))
            out.append(Step(token, bool(soft[at]), round(float(trace.entropy[at]), 4), top))
        return out


def _places(keys: list[Key]) -> dict[str, list[int]]:
    """Sample numbers by problem, in the plan's order."""
    places: dict[str, list[int]] = {}
    for problem, sample in keys:
        places.setdefault(problem, []).append(sample)
    return places
