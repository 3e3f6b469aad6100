"""From a step number to scored samples: problems, prompts, rollouts, rewards.

Everything drawn depends on the run's seed and the step alone, so a step collected again (after a
crash, or because the server restarted) is the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softvllm.core.noise import derive_seed, sample_seeds
from softvllm.core.rollout import Sample
from trainer import records
from trainer.config import Config
from trainer.data import Problem, Problems
from trainer.records import Record
from trainer.rewards.pool import RewardPool, Scored
from trainer.rollout_client import Key, Request, RolloutClient
from trainer.sync.base import WeightSync

GREEDY_TAU = 1e-6
"""Lowest temperature the server takes: hard thinking without chance."""
PROBE_STEP, VALIDATION_STEP = 2**40, 2**40 + 1
"""Numbers in place of a step for seeds that no training step uses."""


@dataclass
class Collected:
    """The samples of one step with their rewards, in the order of (prompt, sample)."""

    record: Record
    samples: list[Sample]
    scored: list[Scored]
    seconds: float = 0.0
    """From the request to the last reward."""
    reward_wait: float = 0.0
    """Of these, after the last sample: rewards that did not overlap with generation."""
    attempts: int = 0
    bytes: int = 0
    failures: list[str] = field(default_factory=list)
    """Why samples are missing."""


class Collector:
    """Asks for rollouts and has them judged.

    Args:
        client: None where rollouts are replayed.
        prompt_ids: prompt token ids of a problem.
        min_think: the server's min_think_tokens, for the record.
    """

    def __init__(
        self,
        config: Config,
        problems: Problems,
        prompt_ids: Callable[[Problem], list[int]],
        pool: RewardPool,
        client: RolloutClient | None,
        sync: WeightSync,
        min_think: int = 0,
    ) -> None:
        self.config, self.problems, self.prompt_ids = config, problems, prompt_ids
        self.pool, self.client, self.sync = pool, client, sync
        self.min_think = min_think

    def collect(self, step: int, cursor: int, version: str) -> Collected:
        """One training step's samples, from the server or from a recording.

        Raises:
            ServerRefused, ServerGone: no rollouts.
            ValueError: too many samples failed, or the recording lacks the step or cannot be
                trained on.
        """
        if self.config.replay:
            collected = self.judge(records.read(Path(self.config.replay), step))
            if records.needs_table(collected.samples):
                raise ValueError(
                    f"{self.config.replay} has sparse records of step {step}: their soft inputs "
                    "need the embedding table that fed them, which the recording lacks; record "
                    "again with this trainer, which asks for dense records"
                )
            return collected
        count = self.config.rollout.prompts
        problems = [self.problems.order(self.config.order_seed, cursor + i) for i in range(count)]
        collected = self.ask(problems, self.config.rollout.samples, step, version)
        if self.config.record:
            records.write(Path(self.config.record), collected.record)
        return collected

    def ask(
        self,
        problems: Sequence[Problem],
        n: int,
        step: int,
        version: str,
        *,
        greedy: bool = False,
        mode: str | None = None,
        max_think_tokens: int | None = None,
    ) -> Collected:
        """n samples of each problem.

        Args:
            greedy: without noise and chance (validation).
            mode: thinking mode; None: the configured one.
        """
        assert self.client is not None
        prompts = [self.prompt_ids(problem) for problem in problems]
        base = derive_seed(derive_seed(self.config.seed, step >> 20), step & (2**20 - 1))
        request = Request(
            prompts,
            sample_seeds(base, len(prompts), n),
            self.body(greedy, mode, max_think_tokens),
            version if self.sync.checks_versions else None,
        )
        futures: dict[Key, Future[Scored]] = {}

        def judge(key: Key, sample: Sample) -> None:
            problem = problems[key[0]]
            futures[key] = self.pool.submit(sample.answer, problem.gold, problem.metadata)

        start = time.monotonic()
        got = self.client.generate(request, judge, self.sync.recover)
        generated = time.monotonic()
        keys = sorted(got.samples)
        samples = [got.samples[key] for key in keys]
        scored = [futures[key].result() for key in keys]
        self.pool.check()
        end = time.monotonic()
        failures = [f"{f.code}: {f.message}" for _, f in sorted(got.failures.items())]
        if len(failures) > self.config.rollout.max_failure_rate * len(prompts) * n:
            raise ValueError(
                f"{len(failures)} of {len(prompts) * n} samples failed (limit "
                f"rollout.max_failure_rate = {self.config.rollout.max_failure_rate:.1%}); the "
                f"first: {failures[0]}"
            )
        record = Record.of(
            step, list(problems), prompts, version, samples, len(failures), self.min_think
        )
        return Collected(
            record,
            samples,
            scored,
            end - start,
            end - generated,
            got.attempts,
            got.bytes,
            failures,
        )

    def judge(self, record: Record) -> Collected:
        """Recorded samples with fresh rewards."""
        start = time.monotonic()
        samples = record.samples
        futures = [
            self.pool.submit(
                s.answer, record.problems[s.prompt].gold, record.problems[s.prompt].metadata
            )
            for s in samples
        ]
        scored = [future.result() for future in futures]
        self.pool.check()
        return Collected(record, samples, scored, time.monotonic() - start)

    def body(
        self, greedy: bool = False, mode: str | None = None, max_think_tokens: int | None = None
    ) -> dict[str, Any]:
        """What a rollout request says besides prompts and seeds."""
        asked = self.config.rollout
        mode = mode or asked.mode
        cot: dict[str, Any] = {
            **asked.cot,
            "max_think_tokens": max_think_tokens or asked.max_think_tokens,
            "answer_max_tokens": asked.answer_max_tokens,
        }
        if mode != asked.mode:  # these belong to the configured mode
            for name in ("temperature", "policy", "policy_params", "noise", "noise_scale"):
                cot.pop(name, None)
        if mode != "hard" and self._outlives_table():
            cot["record"] = "dense"
        if greedy:
            cot.pop("noise_scale", None)
            cot["record"] = "steps"
            if mode == "hard":
                cot["temperature"] = GREEDY_TAU
            else:
                cot["noise"] = "none"
        sampling: dict[str, Any] = {
            "temperature": 0.0 if greedy else asked.answer_temperature,
            "stop": asked.stop,
            "include_stop_str_in_output": True,
        }
        body: dict[str, Any] = {"cot_mode": mode, "cot": cot, "sampling": sampling}
        if self.sync.served_model is not None:
            body["model"] = self.sync.served_model
        return body

    def _outlives_table(self) -> bool:
        """Whether samples may be read again at another embedding table than the one that fed them:
        by a replay, or by a resumed run in which they waited for an update. Left to itself the
        server sends tokens and weights where top_k is set, and only that table rebuilds h~."""
        trained = self.config.model.table_gradient != "frozen"
        return bool(self.config.record) or (self.config.rollout.max_staleness > 0 and trained)
