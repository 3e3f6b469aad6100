"""Train a model's chains of thought: `python -m trainer.rl --config FILE --rollout-url URL`.

A step, in order: problems -> rollouts (rewards are computed as samples arrive) -> advantages ->
micro-batches -> loss and gradient -> AdamW -> weights to the server -> numbers. `train` below is
the whole of it; docs/trainer.md tells the life of a sample and what every number means.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from trainer import checkpoint, config_file, measure, setup
from trainer.ahead import freeze, in_background, thaw
from trainer.collect import Collected
from trainer.config import Config
from trainer.learn import Prepared
from trainer.load import with_folder
from trainer.measure import Clock
from trainer.optim import learning_rate
from trainer.probe import ask, compare
from trainer.ranks import Ranks
from trainer.rewards.pool import RewardFailure
from trainer.rollout_client import ServerGone, ServerRefused
from trainer.setup import Parties
from trainer.validate import validate


def main(arguments: list[str] | None = None) -> int:
    """The command; 0: the run is finished, 1: it stopped and said why."""
    try:
        config = config_file.parse(arguments)
        if config.dry_run:
            print(config_file.to_toml(config), end="")
            return 0
        with Ranks.of_environment() as ranks:
            train(with_folder(config), ranks)
        return 0
    except (ValueError, ServerRefused, ServerGone, RewardFailure) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by a signal; go on with --resume", file=sys.stderr)
        return 1


def train(config: Config, ranks: Ranks) -> None:
    """One run, from its configuration to the final model.

    Every rank runs this; what only rank 0 can do is in `ranks.share`, or done by parties that do
    nothing elsewhere.

    Raises:
        ValueError: settings, data, model or samples are at fault.
        ServerRefused, ServerGone: the server does not play along.
        RewardFailure: too many rewards failed.
    """
    run = Path(config.run)
    with ExitStack() as stack:
        state = ranks.share(lambda: setup.open_run(run, config, stack))
        parties = setup.gather(config, ranks, state, stack)
        journal, collector, learner = parties.journal, parties.collector, parties.learner
        started, extra = state.step, setup.restore(run, parties, state)

        # ---- before the first step: weights, agreement, accuracy ---------------------------------
        if not config.replay and state.step < config.steps:
            parties.sync.push(state.version, learner.trained)
            if config.probe.samples:
                samples = ranks.share(lambda: ask(collector, config.probe, state.version).samples)
                journal.agreement(compare(learner, config.probe, samples))
            if state.step == 0:
                _validate(config, ranks, parties)

        # ---- steps -------------------------------------------------------------------------------
        overlap = config.rollout.max_staleness > 0
        batch: Collected | None = None
        waiting: Prepared | None = None
        if extra is not None:
            batch, waiting = thaw(extra, collector, learner)
        clock = Clock()
        while state.step < config.steps:
            with clock("rollout"):
                if batch is None:
                    batch = ranks.share(
                        partial(collector.collect, state.step, state.cursor, state.version)
                    )
            with clock("prepare"):
                prepared = waiting or learner.prepare(batch)
            collected, batch, waiting = batch, None, None
            cursor = state.cursor + len(collected.record.problems)
            ahead: Callable[[], Collected] | None = None
            if overlap and state.step + 1 < config.steps:
                # At the weights of this step, which are one step old when the samples are used.
                ahead = in_background(
                    ranks, partial(collector.collect, state.step + 1, cursor, state.version)
                )

            metrics: dict[str, float] = {}
            every = config.log.gradient_parts_every
            if every and state.step % every == 0:
                with clock("parts"):
                    metrics |= learner.gradient_parts(prepared)
            rate = learning_rate(config.optim, state.step, config.steps)
            for update in range(config.updates_per_batch):
                with clock("train"):
                    metrics = measure.of_update(learner.gradient(prepared), metrics, update)
                if ahead is not None and update == 0:
                    with clock("rollout"):
                        batch = ahead()
                    with clock("prepare"):  # while the weights are still those that sampled
                        waiting = learner.prepare(batch)
                with clock("train"):
                    metrics["grad/norm"] = learner.optimiser.step(rate)
            state.step, state.cursor = state.step + 1, cursor
            with clock("sync"):
                times = parties.sync.push(state.version, learner.trained)

            if ranks.leads:
                metrics |= {"lr": rate, "data/cursor": float(cursor)}
                metrics |= {f"sync/{name}": value for name, value in times.items()}
                metrics |= measure.of_samples(collected, prepared, collector.pool.tally)
                metrics |= measure.of_speed(collected, prepared, clock.times())
                journal.step(state.step, config.steps, metrics, collected)

            clock = Clock()
            last = state.step == config.steps
            with clock("keep"):
                every = config.validation.every
                if last or (every and state.step % every == 0):
                    _validate(config, ranks, parties)
                every = config.checkpoint.every
                if last or (every and state.step % every == 0):
                    checkpoint.save(
                        run / "checkpoints",
                        state,
                        learner.optimiser,
                        config.checkpoint.keep,
                        freeze(ranks, batch, waiting),
                        leads=ranks.leads,
                    )

        # ---- what stays --------------------------------------------------------------------------
        parties.save_model(run / "final")
        journal.finish(setup.summary(run, parties, started))


def _validate(config: Config, ranks: Ranks, parties: Parties) -> None:
    """Greedy accuracy; the best weights so far are kept as a model of their own."""
    state, collector = parties.state, parties.collector
    if not config.validation.every or not ranks.share(lambda: len(collector.problems.held_out)):
        return
    found = ranks.share(lambda: validate(collector, config.validation, state.version))
    parties.journal.validation(state.step, found)
    if found["validation/accuracy"] > state.best:
        state.best, state.best_step = found["validation/accuracy"], state.step
        parties.save_model(Path(config.run) / "best")


if __name__ == "__main__":
    # A scheduler's SIGTERM is a Ctrl-C: what is open is closed, a paused server is woken.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
