"""What the evaluation's tests share: a server, a command, its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fake_rollout_server import FakeRolloutServer

from softvllm.core.fingerprint import fingerprint
from softvllm.core.rollout import Sample

PROBLEMS = 6


class EvalServer(FakeRolloutServer):
    """The fake with versions to report, defaults of its own and answers that are cut.

    Args:
        dtype: what it says that it computes in.
        name: of the model that it says to serve.
        limits: that it says to have.
        cot: defaults for fields of `cot`, as a server's --cot-config gives them.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        dtype: str = "float32",
        cot: Any = None,
        name: str = "tiny",
        limits: Any = None,
        **trouble: Any,
    ) -> None:
        self.dtype, self.cot = dtype, dict(cot or {})
        self.name, self.limits = name, dict(limits or {})
        self.started_with = fingerprint(Path(model))
        super().__init__(model, **trouble)

    def restart(self) -> None:
        super().restart()
        self.started_with = fingerprint(Path(self.path))

    async def _info(self) -> Any:
        facts = {"dtype": self.dtype, "softvllm": "1", "vllm": "2", "recipe": {"end_strings": []}}
        facts |= {"model": self.name, "limits": self.limits, "weights_at_start": self.started_with}
        return {**await super()._info(), **facts}

    def _sample(self, i: int, k: int, ids: list[int], seed: int, body: dict[str, Any]) -> Sample:
        hard = body["cot_mode"] == "hard"
        defaults = {f: v for f, v in self.cot.items() if not (hard and f.startswith("noise"))}
        sample = super()._sample(i, k, ids, seed, {**body, "cot": {**defaults, **body["cot"]}})
        sample.finish_reason = "stop" if seed % 3 else "length"
        return sample


def eval_server(model: Path) -> Iterator[EvalServer]:
    """To be made a fixture."""
    with EvalServer(model) as server:
        yield server


def command(url: str, model: Path | None, out: Path, *more: str) -> list[str]:
    """Six problems, three samples, two settings; who is right is a matter of answer and gold."""
    problems, table = out.parent / "problems.jsonl", out.parent / "eval.toml"
    if not problems.exists():
        lines = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(PROBLEMS)]
        problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
        table.write_text(
            f'[task.sums]\nreward = "eval_scorers:by_hash"\ndata.path = "{problems}"\n'
        )
    given = {
        "config": table,
        "rollout-url": url,
        "out": out,
        "samples": 3,
        "max-think-tokens": 6,
        "answer-max-tokens": 4,
        "retry-for": 20,
        "workers": 1,
        "prompt.template": "raw",
        "report.replicates": 50,
        "report.transcripts": 1,
    }
    if model is not None:
        given["model.path"] = model
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    arguments += ["--tasks", "sums"]
    if "--settings" not in more:
        arguments += ["--settings", "hard-greedy", "soft-sample"]
    return [*arguments, "--report.no-plots", *more]


def rows_of(out: Path, cell: str) -> list[dict[str, Any]]:
    """All lines of a cell's file but the first."""
    lines = (out / "samples" / f"{cell}.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines]


def results_of(out: Path) -> dict[str, Any]:
    """`results.json`."""
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found
