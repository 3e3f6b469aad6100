"""One evaluation, in the order in which things happen."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer import config_file, setup, templates
from trainer.data import Problem
from trainer.eval import checkpoints as ckpt
from trainer.eval import drift, page, sampling, service, settings, summary, tables, tasks
from trainer.eval.checkpoints import Checkpoint
from trainer.eval.compare import with_paper
from trainer.eval.config import EvalConfig
from trainer.eval.likely import Likelihoods
from trainer.eval.plan import Cell
from trainer.eval.store import Row
from trainer.eval.verdicts import Verifiers, settle
from trainer.files import alone
from trainer.rollout_client import RolloutClient
from trainer.sync.base import served_version


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Make what is missing in `config.out`, then numbers, tables, plots and report.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: settings, data, checkpoints or samples are at fault.
        ServerRefused, ServerGone: the server does not play along.
        RewardFailure: too many verifications failed.
    """
    try:
        return _evaluate(config, wait=False)
    except service.ServerNeeded:
        return _evaluate(config, wait=True)


def _evaluate(config: EvalConfig, wait: bool) -> dict[str, Any]:
    """As `evaluate`.

    Args:
        wait: for a server that does not answer; else recorded facts stand in for it.

    Raises:
        ServerNeeded: they do not do.
    """
    out = Path(config.out)
    _require_folder(out)
    with ExitStack() as stack:
        # ---- the parties: server, checkpoints, tokenizer, verifiers, tasks -----------------------
        client = _client(config, stack) if config.tasks else None
        info, answers = service.reach(client, out, wait) if client else ({}, False)
        served = served_version(client) if client and answers and info.get("enable_rl") else None
        points = ckpt.parse(config.checkpoints, served or info.get("weight_version"))
        ways = settings.named(config.settings, config.setting) if config.tasks else []
        for way in ways:
            if way.mode not in info.get("modes", ()):
                raise ValueError(
                    f"setting {way.name}: the server has no mode {way.mode!r} but "
                    f"{info.get('modes')} ({info.get('refusal') or 'no reason given'})"
                )
        if config.restore:  # refused before hours of work, not after
            ckpt.require_fit(ckpt.restored(config.restore), info)
        stack.enter_context(alone(out))  # only now: arguments refused above leave no folder
        in_service = service.served_facts(points, info, out) if client else None
        base = ckpt.base_of(config.model.path, points)
        likely = Likelihoods(config, points, base, out)
        verifiers = Verifiers(config, stack)
        plan: list[tasks.Task] = []
        token: Callable[[int], str] = str
        plain: Callable[[str], Sequence[int]] = str.encode
        if config.tasks:
            path = _tokenizer_path(base, points, info)
            tokenizer = setup.load_tokenizer(path)
            ckpt.require_sizes(path, info)  # its tokenizer writes the prompts
            prompt_ids = partial(templates.ids_of, config.prompt, tokenizer)
            plan = tasks.load(config, prompt_ids, verifiers)
            token = lru_cache(maxsize=100_000)(lambda i: str(tokenizer.decode([i])))
            plain = partial(tokenizer.encode, add_special_tokens=False)

        # ---- samples -----------------------------------------------------------------------------
        cells = [
            Cell.of(task, way, config.samples, config.seed, config.report.transcripts)
            for task in plan
            for way in ways
        ]
        for cell in cells:
            cell.check()
        service.require_room(cells, info, plain)
        stores = sampling.open_stores(config, points, cells, info, out)
        failed = settle(points, cells, stores, verifiers)
        if client and not answers:
            if config.restore or any(sampling.missing(points, cells, stores).values()):
                raise service.ServerNeeded
            print(
                "the server does not answer; no sample is missing, so this report takes what "
                f"{out / service.SERVER_FILE} says of it",
                file=sys.stderr,
            )
        if client is not None:
            if answers:
                service.record(info, out)
            parties = (points, cells, stores, verifiers, token)
            sampling.fill(config, client, info, *parties, out, failed)

        # ---- likelihoods -------------------------------------------------------------------------
        with tqdm(total=likely.total, desc="likelihoods", disable=not likely.total) as bar:
            choices, divergences = likely.run(lambda: bar.update() and None)

        # ---- what stays --------------------------------------------------------------------------
        results, shown = _results(config, points, plan, ways, cells, stores)
        if in_service:
            results["checkpoints"][0]["served"] = in_service
        results |= {"choice": choices, "kl": divergences, "likelihood": likely.facts}
        results["drift"] = drift.summary(results, likely.sets, likely.texts, out)
        results |= _provenance(config, info)
        _write(config, results, shown, out)
        return results


# ---- parts of `evaluate`, in the order of their use ----------------------------------------------


def _require_folder(out: Path) -> None:
    """Raise ValueError if --out cannot be a folder."""
    there = next(place for place in (out, *out.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ValueError(f"--out {out}: {there} is no folder; choose another")


def _client(config: EvalConfig, stack: ExitStack) -> RolloutClient:
    assert config.rollout_url is not None
    client = RolloutClient(
        config.rollout_url,
        api_key=config.api_key or os.environ.get("SOFTVLLM_API_KEY"),
        timeout=config.timeout,
        retry_for=config.retry_for,
        say=tqdm.write,
    )
    stack.callback(client.close)
    return client


def _tokenizer_path(base: str | None, points: Sequence[Checkpoint], info: dict[str, Any]) -> str:
    if base is not None:
        return base
    for point in points:  # training leaves the tokenizer as it is
        if point.folder is not None:
            return str(point.folder)
    served = str(info.get("model", ""))
    if Path(served).is_dir():
        return served
    raise ValueError(
        "whose tokenizer? Give --model.path, the folder or name of the model that the server was "
        "started with"
    )


Shown = list[tuple[str, Problem, Row]]
PLACES = ("config", "out", "rollout_url")
"""Settings that `results.json` leaves out, as it does the key."""


def _results(
    config: EvalConfig,
    points: Sequence[Checkpoint],
    plan: Sequence[tasks.Task],
    ways: Sequence[settings.Setting],
    cells: Sequence[Cell],
    stores: sampling.Stores,
) -> tuple[dict[str, Any], Shown]:
    """Everything but likelihoods, and the samples to show."""
    found, shown = [], []
    for point in points:
        for number, cell in enumerate(cells):
            rows = stores[point.name, number].ordered(cell.all_keys())
            found.append(summary.of_cell(point, cell, rows, config.report.replicates, config.seed))
            problems = {p.id: p for p in cell.task.problems}
            title = f"{point.name}, {cell.task.name}, {cell.setting.name}"
            shown += [
                (title, problems[row.problem], row) for row in rows if cell.shows_steps(row.key)
            ]
    failed = sum(r.numbers["failed_samples"] + r.numbers["failed_verifications"] for r in found)
    sampling.require_sound(config, failed, len(points) * sum(len(c.all_keys()) for c in cells))
    replicates, seed = config.report.replicates, config.seed
    results = {
        "format": 1,
        "seed": config.seed,
        "samples": config.samples,
        "replicates": replicates,
        "prompt": config_file.to_mapping(config.prompt),
        "checkpoints": [
            {
                "name": c.name,
                "training": c.training,
                "seed": c.seed,
                "weights": c.weights if c.folder else ckpt.SERVED,
                "folder": c.given,
            }
            for c in points
        ],
        "tasks": [
            {
                "name": t.name,
                "problems": len(t.problems),
                "dropped": t.dropped,
                "seen": len(t.seen),
                "max_think_tokens": t.max_think_tokens,
                "answer_max_tokens": t.answer_max_tokens,
                "stop": t.stop,
                "reward": t.reward,
                "data": t.source,
            }
            for t in plan
        ],
        "settings": [
            {**dataclasses.asdict(w), "cot": dict(w.cot), "sampling": dict(w.sampling)}
            for w in ways
        ],
        "cells": [
            {
                "checkpoint": r.checkpoint.name,
                "training": r.checkpoint.training,
                "training_seed": r.checkpoint.seed,
                "task": r.cell.task.name,
                "setting": r.cell.setting.name,
                **r.numbers,
            }
            for r in found
        ],
        "groups": summary.groups(found),
        "differences": summary.differences(found, replicates, seed),
    }
    return results, shown


def _provenance(config: EvalConfig, info: dict[str, Any]) -> dict[str, Any]:
    """What the numbers were made with. Without keys, and without what names a place only: the same
    evaluation elsewhere gives the same file."""
    configuration = config_file.to_mapping(config)
    for name in PLACES:
        configuration.pop(name, None)
    return {
        "configuration": configuration,
        "server": service.server_facts(info) if info else None,
        "recipe": info.get("recipe"),
    }


def _write(config: EvalConfig, results: dict[str, Any], shown: Shown, out: Path) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")
    made = tables.build(results)
    if config.compare == "paper":
        made += with_paper(results, config.paper_model, config.paper_data)
    (out / "tables.md").write_text(tables.markdown(made), encoding="utf-8")
    (out / "tables.tex").write_text(tables.latex(made), encoding="utf-8")
    figures: list[Path] = []
    if config.report.plots and results["tasks"]:
        try:
            from trainer.eval.plots import draw

            figures = draw(results, out / "plots")
        except ImportError:
            print("no plots: the package matplotlib is missing", file=sys.stderr)
    facts = {
        "checkpoints": ", ".join(c["name"] for c in results["checkpoints"]),
        "seed": str(config.seed),
        "samples a problem": str(config.samples),
        "prompt": config.prompt.template,
    }
    html = page.page(made, figures, shown, facts)
    (out / "report.html").write_text(html, encoding="utf-8")
    print(tables.markdown(made))
    print(f"{out / 'results.json'}, tables.md, tables.tex, plots/, report.html", file=sys.stderr)
