"""What a run writes down: metrics.jsonl always, TensorBoard, a tracker, transcripts, profiles, log.

docs/trainer.md lists every metric with its healthy range. After a resume, lines of steps that
are trained again are removed first, so each step is there once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from softvllm.core.phases import Phase
from trainer.collect import Collected
from trainer.config import LogConfig
from trainer.diagnostics import entropy_by_position
from trainer.files import write_whole

METRICS, TRANSCRIPTS, PROFILES = "metrics.jsonl", "transcripts.jsonl", "profiles.jsonl"


class Tracker(Protocol):
    """A place that takes numbers; wandb and trackio share this much."""

    def log(self, data: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class Journal:
    """The written side of one run.

    Args:
        run: its folder.
        step: steps already done; what was written of later ones is removed.
        settings: the resolved configuration, for the tracker.
    """

    def __init__(
        self, run: Path, config: LogConfig, step: int, settings: Mapping[str, Any]
    ) -> None:
        self.run, self.config = run, config
        run.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, TRANSCRIPTS, PROFILES):
            _forget_after(run / name, step)
        self._metrics = (run / METRICS).open("a", encoding="utf-8")
        self._transcripts = (run / TRANSCRIPTS).open("a", encoding="utf-8")
        self._profiles = (run / PROFILES).open("a", encoding="utf-8")
        self._log = (run / "log.txt").open("a", encoding="utf-8")
        self._board = _tensorboard(run, step) if config.tensorboard else None
        self._tracker = _tracker(config, run, settings)
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """One line for people, on screen and in log.txt."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and the same to the other places."""
        rounded = {k: float(f"{v:.7g}") for k, v in sorted(values.items())}
        self._metrics.write(json.dumps({"step": step, **rounded}) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in rounded.items():
                self._board.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(dict(rounded), step=step)

    def step(
        self, step: int, steps: int, values: Mapping[str, float], collected: Collected
    ) -> None:
        """Everything about a step."""
        self.metrics(step, values)
        self.transcripts(step, collected)
        self.profile(step, collected)
        self.line(step, steps, values)

    def agreement(self, values: Mapping[str, float]) -> None:
        """The probe's result."""
        self.say("trainer and server agree: " + _few(values))

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a validation."""
        self.metrics(step, values)
        self.say(f"step {step}: " + _few(values))

    def line(self, step: int, steps: int, m: Mapping[str, float]) -> None:
        """The step in one line."""
        parts = [
            f"step {step}/{steps}",
            f"reward {m['reward/mean']:.1f}",
            f"correct {m['reward/correct']:.1%}",
            f"think {m['rollout/think_tokens']:.0f}",
            f"grad {m['grad/norm']:.3g}",
        ]
        if "agree/gaussian_distance" in m:
            parts.append(f"dist {m['agree/gaussian_distance']:.3f}")
        if "agree/hard_kl" in m:
            parts.append(f"kl {m['agree/hard_kl']:.1e}")
        parts.append(
            f"{m['time/step']:.1f} s (rollout {m['time/rollout']:.1f}, train "
            f"{m['time/train']:.1f}, sync {m['time/sync']:.1f})"
        )
        self.say(" | ".join(parts))

    def transcripts(self, step: int, collected: Collected) -> None:
        """A few samples in words: evenly spread over the batch."""
        n, count = len(collected.samples), self.config.transcripts
        chosen = sorted({i * n // count for i in range(count)}) if n and count else []
        for i in chosen:
            sample, scored = collected.samples[i], collected.scored[i]
            problem = collected.record.problems[sample.prompt]
            row = {
                "step": step,
                "problem": problem.id,
                "question": problem.question,
                "gold": problem.gold,
                "think": sample.text[: sample.answer_start],
                "answer": sample.answer,
                "extracted": scored.extracted,
                "reward": scored.reward,
                "failure": scored.failure,
                "end_cause": sample.trace.end_cause.name.lower(),
            }
            self._transcripts.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._transcripts.flush()

    def profile(self, step: int, collected: Collected) -> None:
        """Mean entropy at every think position (paper figure 4), and how many chains reach it."""
        traces = [sample.trace for sample in collected.samples]
        think = [torch.from_numpy(t.entropy[t.phase == Phase.THINK]) for t in traces]
        entropy, count = entropy_by_position(think)
        row = {"step": step, "entropy": [round(e, 4) for e in entropy.tolist()]}
        self._profiles.write(json.dumps({**row, "count": count.tolist()}) + "\n")
        self._profiles.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """summary.json, the plots, and the last line."""
        text = json.dumps(dict(summary), indent=1) + "\n"
        (self.run / "summary.json").write_text(text, encoding="utf-8")
        if self.config.plots:
            self._draw()
        best = ""
        if summary["best"] >= 0:
            best = f"; best accuracy {summary['best']:.1%} at step {summary['best_step']}"
        self.say(f"done: {self.run / 'final'} holds the model{best}")

    def _draw(self) -> None:
        try:
            from trainer.plots import draw

            draw(self.run)
        except ImportError:
            self.say("no plots: the package matplotlib is missing")

    def close(self) -> None:
        for file in (self._metrics, self._transcripts, self._profiles, self._log):
            file.close()
        if self._board is not None:
            self._board.close()
        if self._tracker is not None:
            self._tracker.finish()


class Silent(Journal):
    """Writes nothing: on ranks that do not lead."""

    def __init__(self) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def finish(self, summary: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def _few(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{k.partition('/')[2]} {v:.4g}" for k, v in metrics.items())


def read_metrics(run: Path) -> list[dict[str, float]]:
    """All lines of metrics.jsonl."""
    return read_lines(run / METRICS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSON-lines file; one that was cut by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _forget_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            # Without a checkpoint a run begins anew, with the validation before its first step.
            if step and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # cut by a crash
    write_whole(path, "".join(kept))


def _tensorboard(run: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("no TensorBoard: the package tensorboard is missing", file=sys.stderr)
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)


def _tracker(config: LogConfig, run: Path, settings: Mapping[str, Any]) -> Tracker | None:
    if config.track == "none":
        return None
    import importlib

    try:
        module = importlib.import_module(config.track)
    except ImportError:
        raise ValueError(
            f"log.track = {config.track} needs its package: pip install {config.track}"
        ) from None
    module.init(project=config.project, name=run.name, config=dict(settings), resume="allow")
    tracker: Tracker = module
    return tracker
