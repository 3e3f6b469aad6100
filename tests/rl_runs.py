"""Small runs of the trainer for its tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.logging import read_metrics
from trainer.rl import main

REPOSITORY = Path(__file__).parent.parent


def arguments(model: Path, run: Path, url: str | None, **settings: Any) -> list[str]:
    """A command line: soft mode, two prompts of three samples, three steps, a dense reward."""
    problems = run.parent / "problems.jsonl"
    if not problems.exists():
        run.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]
        problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {
        "model.path": model,
        "model.dtype": "float32",
        "model.device": "cpu",
        "run": run,
        "steps": 3,
        "threads": 1,
        "rollout.samples": 3,
        "rollout.max-think-tokens": 6,
        "rollout.answer-max-tokens": 6,
        "rollout.retry-for": 20,
        "data.path": problems,
        "prompt.template": "raw",
        "reward.function": "reward_functions:share_of_a",
        "reward.workers": 1,
        "optim.lr": "1e-3",
        "optim.warmup": 1,
        "validation.every": 0,
        "checkpoint.every": 1,
        "log.plots": False,
        "log.tensorboard": False,
        **settings,
    }
    if url is not None:
        given["rollout-url"] = url
    out = []
    for name, value in given.items():
        if isinstance(value, bool):
            group, dot, last = name.rpartition(".")
            out.append(f"--{name}" if value else f"--{group}{dot}no-{last}")
        else:
            out += [f"--{name}", str(value)]
    return out


def train(model: Path, run: Path, url: str | None, **settings: Any) -> list[dict[str, float]]:
    """Run in this process; the metrics of all steps."""
    assert main(arguments(model, run, url, **settings)) == 0
    return read_metrics(run)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Run in a process of its own."""
    path = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.rl", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def learned(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """What must repeat exactly: everything but times, speeds and sizes."""
    skipped = ("time/", "speed/", "memory/", "sync/", "rollout/attempts", "rollout/mib")
    return [{k: v for k, v in row.items() if not k.startswith(skipped)} for row in rows]
