"""Train a model's chains of thought: `python -m trainer.rl --config FILE --rollout-url URL`.

A step, in order: problems -> rollouts (rewards are computed as samples arrive) -> advantages ->
micro-batches -> loss and gradient -> AdamW -> weights to the server -> numbers. `train` below is
the whole of it; docs/trainer.md tells the life of a sample and what every number means.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

from trainer import checkpoint, config_file, measure, setup
from trainer.checkpoint import State
from trainer.collect import Collected, Collector
from trainer.config import Config
from trainer.data import Problems
from trainer.learn import Learner, Prepared
from trainer.logging import Journal
from trainer.optim import learning_rate
from trainer.probe import probe
from trainer.records import Record
from trainer.rewards.pool import RewardFailure, RewardPool
from trainer.rollout_client import ServerGone, ServerRefused
from trainer.sync import build as build_sync
from trainer.sync.base import NoSync, WeightSync
from trainer.validate import validate


def main(arguments: list[str] | None = None) -> int:
    """The command; 0: the run is finished, 1: it stopped and said why."""
    try:
        config = config_file.parse(arguments)
        if config.dry_run:
            print(config_file.to_toml(config), end="")
            return 0
        train(config)
        return 0
    except (ValueError, ServerRefused, ServerGone, RewardFailure) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; go on with --resume", file=sys.stderr)
        return 1


def train(config: Config) -> None:
    """One run, from its configuration to the final model.

    Raises:
        ValueError: settings, data, model or samples are at fault.
        ServerRefused, ServerGone: the server does not play along.
        RewardFailure: too many rewards failed.
    """
    run = Path(config.run)
    state = setup.open_run(run, config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    transformers.utils.logging.disable_progress_bar()
    with ExitStack() as stack:
        # ---- the parties: journal, rewards, server, problems, model ------------------------------
        journal = Journal(run, config.log, state.step, config_file.to_mapping(config))
        stack.callback(journal.close)
        say = journal.say
        pool = stack.enter_context(
            RewardPool(
                config.reward.function,
                config.reward.workers,
                config.reward.timeout,
                config.reward.max_failure_rate,
            )
        )
        client, info = setup.connect(config, say, stack)
        sync: WeightSync = NoSync() if client is None else build_sync(config.sync, client, run)
        tokenizer = setup.load_tokenizer(config.model.path)
        problems, prompt_ids = setup.load_problems(config, tokenizer, pool, say)
        learner = Learner(config, setup.stop_ids(config, tokenizer), setup.min_think(config, info))
        collector = Collector(config, problems, prompt_ids, pool, client, sync)
        extra = _restore(run, learner, state, say)
        setup.require_fitting_server(info, config, learner)
        lr_steps, started = config.steps, state.step

        # ---- before the first step: weights, agreement, accuracy ---------------------------------
        if client is not None and state.step < config.steps:
            sync.push(_version(state), learner.trained)
            if config.probe.samples:
                found = probe(collector, learner, config.probe, _version(state))
                say("trainer and server agree: " + _few(found))
            if state.step == 0 and config.validation.every:
                _validate(collector, config, state, journal, learner, tokenizer)

        # ---- steps -------------------------------------------------------------------------------
        overlap = config.rollout.max_staleness > 0
        waiting: Prepared | None = None
        batch: Collected | None = None
        if extra is not None:
            batch, waiting = _thaw(extra, collector, learner)
        while state.step < config.steps:
            clock = Clock()
            with clock("rollout"):
                if batch is None:
                    batch = collector.collect(state.step, state.cursor, _version(state))
            with clock("prepare"):
                prepared = waiting or learner.prepare(batch)
            collected, batch, waiting = batch, None, None
            following: Future[Collected] | None = None
            cursor = state.cursor + len(collected.record.problems)
            if overlap and state.step + 1 < config.steps:
                # At the weights of this step, which are one step old when the samples are used.
                following = _start(collector.collect, state.step + 1, cursor, _version(state))

            metrics: dict[str, float] = {}
            every = config.log.gradient_parts_every
            if every and state.step % every == 0:
                metrics |= learner.gradient_parts(prepared)
            rate = learning_rate(config.optim, state.step, lr_steps)
            for update in range(config.updates_per_batch):
                with clock("train"):
                    found = learner.gradient(prepared)
                    metrics = found | metrics if update == 0 else metrics | _policy_part(found)
                if following is not None and update == 0:
                    with clock("rollout"):
                        batch = following.result()
                    with clock("prepare"):  # while the weights are still those that sampled
                        waiting = learner.prepare(batch)
                with clock("train"):
                    metrics["grad/norm"] = learner.optimiser.step(rate)
            state.step, state.cursor = state.step + 1, cursor
            with clock("sync"):
                times = sync.push(_version(state), learner.trained)

            metrics |= {"lr": rate, "data/cursor": float(cursor)}
            metrics |= {f"sync/{name}": value for name, value in times.items()}
            metrics |= measure.of_samples(collected, prepared, pool.tally)
            metrics |= measure.of_speed(collected, prepared, clock.times())
            journal.metrics(state.step, metrics)
            journal.transcripts(state.step, collected)
            journal.line(state.step, config.steps, metrics)

            last = state.step == config.steps
            every = config.validation.every
            if client is not None and every and (last or state.step % every == 0):
                _validate(collector, config, state, journal, learner, tokenizer)
            every = config.checkpoint.every
            if last or (every and state.step % every == 0):
                frozen = None if batch is None or waiting is None else _freeze(batch, waiting)
                checkpoint.save(
                    run / "checkpoints", state, learner.optimiser, config.checkpoint.keep, frozen
                )

        # ---- what stays --------------------------------------------------------------------------
        _save_model(run / "final", learner, tokenizer)
        journal.finish(_summary(run, state, problems, started))
        best = f"; best {state.best:.1%} at step {state.best_step}" if state.best >= 0 else ""
        say(f"done: {run / 'final'} holds the model{best}")


# ---- parts of `train`, in the order of their use -------------------------------------------------


def _restore(run: Path, learner: Learner, state: State, say: Callable[[str], None]) -> Any:
    """The last whole checkpoint, if there is one; returns what else it held."""
    saved = checkpoint.whole(run / "checkpoints")
    if not saved:
        return None
    loaded, extra = checkpoint.load(saved[-1][1], learner.optimiser)
    assert loaded == state
    say(f"going on after step {state.step} ({saved[-1][1]})")
    return extra


def _version(state: State) -> str:
    """Name of the weights after `state.step` steps."""
    return f"{state.run_id}-{state.step:06d}"


def _validate(
    collector: Collector,
    config: Config,
    state: State,
    journal: Journal,
    learner: Learner,
    tokenizer: Any,
) -> None:
    """Greedy accuracy; the best weights so far are kept as a model of their own."""
    if not collector.problems.held_out:
        return
    start = time.monotonic()
    found = validate(collector, config.validation, _version(state))
    found["time/validation"] = time.monotonic() - start
    journal.metrics(state.step, found)
    journal.say(f"step {state.step}: " + _few(found))
    if found["validation/accuracy"] > state.best:
        state.best, state.best_step = found["validation/accuracy"], state.step
        _save_model(Path(config.run) / "best", learner, tokenizer)


def _save_model(folder: Path, learner: Learner, tokenizer: Any) -> None:
    if learner.trained is learner.model:
        checkpoint.save_model(folder, learner.model, tokenizer)
    else:  # LoRA: the adapter is the model to keep, beside its base
        learner.trained.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _start(work: Callable[..., Collected], *arguments: Any) -> Future[Collected]:
    """Run in a thread that dies with the process."""
    future: Future[Collected] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _freeze(batch: Collected, waiting: Prepared) -> dict[str, Any]:
    """The batch that waits to be trained on, for a checkpoint: its weights are gone by then."""
    old = [None if o is None else (o.soft.cpu(), o.hard.cpu()) for o in waiting.old]
    return {"record": msgspec.msgpack.encode(batch.record), "old": old}


def _thaw(frozen: Any, collector: Collector, learner: Learner) -> tuple[Collected, Prepared]:
    batch = collector.judge(msgspec.msgpack.decode(frozen["record"], type=Record))
    prepared = learner.prepare(batch)
    for at, kept in enumerate(frozen["old"]):
        now = prepared.old[at]
        if kept is not None and now is not None:
            soft, hard = (values.to(learner.device) for values in kept)
            prepared.old[at] = dataclasses.replace(now, soft=soft, hard=hard)
    return batch, prepared


def _policy_part(metrics: dict[str, float]) -> dict[str, float]:
    """Later updates on a batch change its ratios; losses and agreement are those of the first."""
    return {k: v for k, v in metrics.items() if k.startswith("policy/")}


def _few(metrics: dict[str, float]) -> str:
    return ", ".join(f"{k.partition('/')[2]} {v:.4g}" for k, v in metrics.items())


def _summary(run: Path, state: State, problems: Problems, started: int) -> dict[str, Any]:
    return {
        "run": run.name,
        **dataclasses.asdict(state),
        "resumed_after_step": started,
        "problems": len(problems.train),
        "held_out": len(problems.held_out),
        "dropped": [problem.id for problem in problems.dropped],
    }


class Clock:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._times = dict.fromkeys(("rollout", "prepare", "train", "sync"), 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._times[phase] += time.monotonic() - start

    def times(self) -> dict[str, float]:
        """By phase, and `step`: all of it."""
        return {**self._times, "step": time.monotonic() - self._start}


if __name__ == "__main__":
    sys.exit(main())
