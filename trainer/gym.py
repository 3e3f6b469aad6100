"""Problems of reasoning-gym, the same in every process.

Some of its tasks walk through sets of strings, whose order Python draws anew in every process, or
draw from generators that their seed does not reach. So problems are made in a process of their
own, in which hashes and generators are fixed: `python -m trainer.gym` reads a request from its
standard input and writes a JSON line for every problem.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

FIXED = {
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MPLBACKEND": "Agg",  # one of its packages imports pyplot
}
OURS = ("size", "seed")
"""Parameters that every task has and `data` sets."""
_ERROR = "error"
"""What a line holds in place of a problem, under no other key."""


def entries(
    task: str, size: int, seed: int, parameters: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The first so many entries of a task: question, answer and what its scorer reads, plain JSON.

    Args:
        parameters: fields of the task's configuration.

    Raises:
        ValueError: no such task or parameter, values that the task refuses, or no package; the
            message says what is possible.
    """
    place = "data.task_parameters"
    for name in OURS:
        if name in parameters:
            raise ValueError(f"{place}.{name} is not taken; set data.{name}")
    if size < 1:
        raise ValueError(f"data.size must be at least 1, got {size}")
    try:
        asked = json.dumps([task, size, seed, dict(parameters)], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}; give numbers, texts, lists and tables") from None
    for line in _lines(asked):
        yield json.loads(line)


@lru_cache(maxsize=16)  # an evaluation asks for the same ones for its task and for what was seen
def _lines(asked: str) -> tuple[str, ...]:
    done = subprocess.run(
        [sys.executable, "-m", "trainer.gym"],
        input=asked,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, **FIXED},
    )
    task, lines = json.loads(asked)[0], tuple(done.stdout.split("\n")[:-1])
    if lines and (last := json.loads(lines[-1])).keys() == {_ERROR}:
        raise ValueError(last[_ERROR])
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(
            f"reasoning_gym task {task}: its process ended with status {done.returncode} ({said})"
        )
    return lines


# ---- in the process ------------------------------------------------------------------------------


def main() -> None:
    """Write the entries that standard input asks for, or what is wrong, to standard output."""
    # Only lines of ours may go there, whatever a task prints.
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        for entry in _made(*json.load(sys.stdin)):
            out.write(entry + "\n")
    except ValueError as error:
        out.write(json.dumps({_ERROR: str(error)}) + "\n")
    out.flush()


def _made(task: str, size: int, seed: int, parameters: dict[str, Any]) -> Iterator[str]:
    try:
        import numpy
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ValueError(
            "data.source = reasoning_gym needs the package reasoning-gym: pip install "
            f"'softvllm[trainer]' ({error})"
        ) from None
    if task not in DATASETS:
        near = get_close_matches(task, DATASETS, 5)
        known = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(DATASETS)}"
        raise ValueError(f"reasoning_gym has no task {task!r}; {known}")
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    possible = {
        field.name: _default(field)
        for field in dataclasses.fields(DATASETS[task][1])
        if field.name not in OURS
    }
    has = f"it has {', '.join(f'{k} = {v}' if v else k for k, v in possible.items()) or 'none'}"
    for name in parameters:
        if name not in possible:
            raise ValueError(
                f"reasoning_gym task {task} has no parameter {name!r} (data.task_parameters); {has}"
            )
    given = ", ".join(f"{name} = {value!r}" for name, value in parameters.items()) or "none"
    try:
        made = create_dataset(task, size=size, seed=seed, **parameters)
    except Exception as error:  # assertions, mostly
        raise ValueError(
            f"reasoning_gym task {task} refuses its parameters ({given}): {_said(error)}; {has}"
        ) from None
    for index in range(size):
        try:
            # Plain JSON: the entry travels to a worker and into records.
            yield json.dumps(made[index], default=str)
        except Exception as error:
            raise ValueError(
                f"reasoning_gym task {task} fails at problem {index} (parameters: {given}): "
                f"{_said(error)}; {has}"
            ) from None


def _default(field: dataclasses.Field[Any]) -> str:
    """Its default as text; empty where there is none or it would fill the message."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    text = repr(value)
    return text if len(text) <= 40 else ""


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


if __name__ == "__main__":
    main()
