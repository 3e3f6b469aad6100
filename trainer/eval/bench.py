"""What the evaluator costs over bare rollouts: `python -m trainer.eval.bench ARGUMENTS`.

Arguments are those of `python -m trainer.eval`, for weights in service. Every round makes the same
samples twice, in turns first: as an evaluation, with verification and files, and as bare calls of
`RolloutClient.generate`, one for each task and setting. A round before the first warms the
server's prefix cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from trainer import setup, templates
from trainer.eval import settings, tasks
from trainer.eval.config import EvalConfig, parse
from trainer.eval.plan import Cell
from trainer.eval.run import evaluate
from trainer.eval.verdicts import Verifiers
from trainer.files import write_whole
from trainer.load import folder_of
from trainer.rewards.pool import RewardFailure
from trainer.rollout_client import Request, RolloutClient, ServerGone, ServerRefused


def measure(config: EvalConfig, rounds: int) -> dict[str, Any]:
    """Seconds of both ways in every round, and the mean ratio with its standard error.

    The evaluator's seconds are those of its samples, from the first request to the last verdict;
    tables and plots, which do not grow with the samples' cost, are not in it.

    Raises:
        ValueError: other checkpoints than the weights in service, no base model, one round.
    """
    url, base = config.rollout_url, config.model.path
    served = config.checkpoints == ("none=served",) and config.restore is None
    if not (served and config.tasks and url and base) or rounds < 2:
        raise ValueError(
            "bench takes --tasks, --model.path, the weights in service (--checkpoints none=served, "
            "no --restore) and two rounds or more"
        )
    if config.choice.sets or config.kl.texts:
        raise ValueError("bench compares samples; leave --choice.sets and --kl.texts out")
    if config.out != EvalConfig.out:
        raise ValueError("bench evaluates into folders that it removes; leave --out out")
    config = replace(config, report=replace(config.report, plots=False))
    with ExitStack() as stack:
        key = config.api_key or os.environ.get("SOFTVLLM_API_KEY")
        client = RolloutClient(url, api_key=key, timeout=config.timeout)
        stack.callback(client.close)
        cells = _cells(config, folder_of(base), stack)
        _tool(config)
        seconds: dict[str, list[float]] = {"evaluation": [], "bare": []}
        for number in range(rounds):
            ways = [
                ("evaluation", partial(_tool, config)),
                ("bare", partial(_bare, client, cells)),
            ]
            for name, way in ways if number % 2 else ways[::-1]:
                seconds[name].append(round(way(), 2))
                print(f"round {number + 1}: {name} {seconds[name][-1]} s", file=sys.stderr)
    ratios = [a / b for a, b in zip(seconds["evaluation"], seconds["bare"])]
    return {
        "samples": sum(len(cell.all_keys()) for cell in cells),
        "settings": [f"{cell.task.name}, {cell.setting.name}" for cell in cells],
        "seconds": seconds,
        "evaluation_over_bare": round(mean(ratios), 4),
        "standard_error": round(stdev(ratios) / rounds**0.5, 4),
    }


def _cells(config: EvalConfig, base: str, stack: ExitStack) -> list[Cell]:
    tokenizer = setup.load_tokenizer(base)
    prompt_ids = partial(templates.ids_of, config.prompt, tokenizer)
    found = tasks.load(config, prompt_ids, Verifiers(config, stack))
    ways = settings.named(config.settings, config.setting)
    return [
        Cell.of(task, way, config.samples, config.seed, config.report.transcripts)
        for task in found
        for way in ways
    ]


def _tool(config: EvalConfig) -> float:
    with tempfile.TemporaryDirectory() as out, redirect_stdout(sys.stderr):
        evaluate(replace(config, out=out))
        lines = (Path(out) / "sessions.jsonl").read_text().splitlines()
        return float(json.loads(lines[-1])["seconds"])


def _bare(client: RolloutClient, cells: Sequence[Cell]) -> float:
    start = time.monotonic()
    for cell in cells:
        seeds = [[cell.seed_of((p.id, k)) for k in range(cell.samples)] for p in cell.task.problems]
        client.generate(Request(cell.task.prompts, seeds, cell.body(steps=False), None))
    return time.monotonic() - start


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.eval.bench", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--save", type=Path, help="JSON file for the numbers")
    own, rest = parser.parse_known_args(arguments)
    try:
        found = measure(parse(rest), own.rounds)
    except (ValueError, OSError, ServerRefused, ServerGone, RewardFailure) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if own.save:
        write_whole(own.save, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
