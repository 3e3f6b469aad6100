"""What a run needs before its first step: folder, server, problems, facts of the model."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers

from trainer import checkpoint, config_file, data, records, sync, templates
from trainer.checkpoint import State
from trainer.collect import Collector
from trainer.config import Config
from trainer.data import Problem, Problems
from trainer.files import alone, write_whole
from trainer.learn import Learner
from trainer.logging import Journal, Silent
from trainer.ranks import Ranks
from trainer.rewards.pool import RewardPool
from trainer.rollout_client import RolloutClient, check_server
from trainer.server_address import shown
from trainer.sync.base import Following, NoSync, WeightSync

IDENTITY = "run.json"
"""File of a run with its id and the fingerprint of its problems."""


@dataclass
class Parties:
    """Who takes part in a run. On ranks that do not lead, the journal is silent, the collector has
    no server and the sync only hands over shards."""

    config: Config
    ranks: Ranks
    state: State
    journal: Journal
    collector: Collector
    learner: Learner
    sync: WeightSync
    tokenizer: Any

    def save_model(self, folder: Path) -> None:
        """The trained model, or with LoRA the adapter, beside whose base it is kept."""
        learner, leads = self.learner, self.ranks.leads
        if learner.trained is learner.model:
            dtype = getattr(torch, self.config.model.dtype)
            checkpoint.save_model(folder, learner.model, self.tokenizer, dtype, leads=leads)
        else:
            learner.trained.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def gather(config: Config, ranks: Ranks, state: State, stack: ExitStack) -> Parties:
    """Everybody, in working order; `stack` sends them home.

    Raises:
        ValueError, ServerGone, ServerRefused: somebody cannot take part.
    """
    run = Path(config.run)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    transformers.utils.logging.disable_progress_bar()
    require_one_process(config, ranks)
    journal: Journal = (
        Journal(run, config.log, state.step, config_file.to_mapping(config))
        if ranks.leads
        else Silent()
    )
    stack.callback(journal.close)
    reward = config.reward
    pool = RewardPool(  # starts processes when there is work, which only rank 0 gives
        reward.function, reward.workers, reward.timeout, reward.max_failure_rate
    )
    stack.enter_context(pool)
    client, info = connect(config, journal.say, stack) if ranks.leads else (None, {})
    way: WeightSync = NoSync()
    if client is not None:
        way = sync.build(config.sync, client, run, getattr(torch, config.model.dtype))
    elif not ranks.leads and not config.replay and config.sync.method != "none":
        way = Following()
    tokenizer = load_tokenizer(config.model.path)
    problems, prompt_ids = load_problems(
        config, tokenizer, pool, journal.say, needed=ranks.leads and not config.replay
    )
    least = ranks.share(lambda: min_think(config, info))
    learner = Learner(config, stop_ids(config, tokenizer), least, ranks)
    require_fitting_server(info, config, learner)
    collector = Collector(config, problems, prompt_ids, pool, client, way, least)
    return Parties(config, ranks, state, journal, collector, learner, way, tokenizer)


def require_one_process(config: Config, ranks: Ranks) -> None:
    """Refuse what several ranks cannot do."""
    if ranks.size == 1:
        return
    if config.model.lora_rank:
        raise ValueError("LoRA trains in one process: start without torchrun")
    if config.sync.method == "nccl":
        raise ValueError(
            "sync.method = nccl sends from one process: start without torchrun, or set "
            "sync.method = safetensors"
        )


def restore(run: Path, parties: Parties, state: State) -> Any:
    """Put back the last whole checkpoint, if there is one; returns what else it held."""
    ranks = parties.ranks
    path = ranks.share(lambda: next(iter(checkpoint.whole(run / "checkpoints")[-1:]), None))
    if path is None:
        return None
    loaded, extra = checkpoint.load(path[1], parties.learner.optimiser)
    assert loaded == state
    parties.journal.say(f"going on after step {state.step} ({path[1]})")
    return extra


def summary(run: Path, parties: Parties, started: int) -> dict[str, Any]:
    """What summary.json says beside the metrics."""
    problems = parties.collector.problems
    return {
        "run": run.name,
        **dataclasses.asdict(parties.state),
        "resumed_after_step": started,
        "processes": parties.ranks.size,
        "problems": len(problems.train),
        "held_out": len(problems.held_out),
        "dropped": [problem.id for problem in problems.dropped],
        "repeated": problems.repeated,
    }


def open_run(run: Path, config: Config, stack: ExitStack) -> State:
    """The run's folder, for this process alone until the stack ends, and where it stands; refuses
    to mix two runs."""
    settings, identity = run / "config.toml", run / IDENTITY
    stack.enter_context(alone(run))
    if identity.exists():
        if not config.resume:
            raise ValueError(
                f"{run} holds a run already: go on with it by --resume, or choose another --run"
            )
        changed = config_file.differences(config_file.load(str(settings)), config)
        if changed:
            raise ValueError(
                f"{run} was started with other settings ({'; '.join(changed)}); take those back "
                "or start another --run"
            )
        known = json.loads(identity.read_text())
        checkpoint.put_back(run)
    else:
        known = {"run_id": secrets.token_hex(4)}
    run_id = str(known["run_id"])
    write_whole(settings, config_file.to_toml(dataclasses.replace(config, resume=False)))
    write_whole(identity, json.dumps(known))
    state = State(run_id)
    saved = checkpoint.whole(run / "checkpoints")
    if saved:
        state = State(**json.loads((saved[-1][1] / checkpoint.STATE).read_text()))
    return state


def connect(
    config: Config, say: Callable[[str], None], stack: ExitStack
) -> tuple[RolloutClient | None, dict[str, Any]]:
    if config.replay:
        return None, {}
    assert config.rollout_url is not None
    client = RolloutClient(
        config.rollout_url,
        api_key=config.rollout.api_key or os.environ.get("SOFTVLLM_API_KEY"),
        timeout=config.rollout.timeout,
        retry_for=config.rollout.retry_for,
        say=say,
    )
    stack.callback(client.close)
    return client, client.info()


def load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path = {path!r} has no tokenizer: {error}") from None


def load_problems(
    config: Config, tokenizer: Any, pool: RewardPool, say: Callable[[str], None], needed: bool
) -> tuple[Problems, Callable[[Problem], list[int]]]:
    """Problems whose prompts fit (none if they are not needed), and the prompts' ids."""

    @lru_cache(maxsize=4096)
    def ids(question: str) -> tuple[int, ...]:
        return tuple(templates.ids_of(config.prompt, tokenizer, question))

    def prompt_ids(problem: Problem) -> list[int]:
        return list(ids(problem.question))

    if not needed:
        return Problems([], []), prompt_ids
    held_out = config.validation.problems if config.validation.every else 0
    found = data.load(config.data, pool, held_out)
    kept: list[list[Problem]] = [[], []]
    for part, problems in zip(kept, (found.train, found.held_out)):
        for problem in problems:
            try:
                prompt_ids(problem)
                part.append(problem)
            except ValueError:
                found.dropped.append(problem)
    if not kept[0]:
        prompt_ids(found.train[0])  # raises the reason
    say(
        f"{len(kept[0])} problems to train on, {len(kept[1])} held out, {len(found.dropped)} "
        f"dropped (gold cannot be scored, or prompt too long), {found.repeated} left out because "
        "a held-out problem asks the same"
    )
    fitting = Problems(kept[0], kept[1], found.dropped, found.repeated)
    require_same_problems(Path(config.run), fitting)
    return fitting, prompt_ids


def require_same_problems(run: Path, problems: Problems) -> None:
    """Note the problems of a new run; refuse other ones for a run that goes on, whose data cursor
    would point at other problems without a word.

    Raises:
        ValueError: a data file was edited, or golds were dropped in one of the two starts only.
    """
    path = run / IDENTITY
    identity = json.loads(path.read_text())
    now = {"problems": problems.fingerprint, "dropped": [p.id for p in problems.dropped]}
    if "problems" not in identity:
        write_whole(path, json.dumps(identity | now))
    elif identity["problems"] != now["problems"]:
        odd = sorted(set(identity["dropped"]) ^ set(now["dropped"]))
        why = (
            f"the golds of {', '.join(odd[:5])} could be scored in one of the two starts only"
            if odd
            else "the data has changed"
        )
        raise ValueError(
            f"{run} was started with other problems: {why}. Restore the data (or raise "
            "reward.timeout), or start another --run"
        )


def stop_ids(config: Config, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a request: EOS of tokenizer and generation config, as the server has them."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(config.model.path).eos_token_id
    except OSError:
        eos = None
    several = eos if isinstance(eos, list) else [eos]
    return tuple(sorted({i for i in [*several, tokenizer.eos_token_id] if i is not None}))


def min_think(config: Config, info: dict[str, Any]) -> int:
    """min_think_tokens of the rollouts: asked for, the server's own, or the recording's."""
    if config.replay:
        return records.read(Path(config.replay), 0).min_think
    recipe = info.get("recipe") or {}
    return int(config.rollout.cot.get("min_think_tokens", recipe.get("min_think_tokens", 0)))


def require_fitting_server(info: dict[str, Any], config: Config, learner: Learner) -> None:
    if not info:
        return
    table = learner.policy.table
    trouble = list(
        check_server(
            info, mode=config.rollout.mode, dim=table.shape[1], vocab_size=learner.policy.vocab_size
        )
    )
    if config.sync.method != "none" and not info.get("enable_rl"):
        trouble.append(
            "the server takes no weights: start it with --enable-rl, or set sync.method = none"
        )
    if trouble:
        raise ValueError(
            f"{shown(config.rollout_url or '')} does not fit this run: " + "; ".join(trouble)
        )
