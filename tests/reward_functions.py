"""Scorers that misbehave, named by import path in the reward tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any


def score(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """Does what the answer says."""
    if answer == "hang":
        re.match(r"(a+)+$", "a" * 64 + "b")  # no signal handler runs in here
    if answer == "child":
        pid = subprocess.Popen(["sleep", "600"]).pid
        with open(str(metadata["pid_file"]), "w") as file:
            file.write(str(pid))
        time.sleep(600)
    if answer == "crash":
        os._exit(3)
    if answer == "raise":
        raise KeyError("no such thing")
    if answer == "base":
        raise SystemExit("not an Exception")
    if answer == "print":
        print("noise on standard output", flush=True)
        os.write(1, b"more of it\n")
        sys.stdout.flush()
    if answer == "ascii":
        return 1.0 if ascii(dict(metadata)) == gold else 0.0
    if answer == "nan":
        return float("nan")
    return 1.0 if answer == gold else 0.0


def verifiable(gold: str, metadata: Mapping[str, Any]) -> bool:
    if "mark" in metadata and not os.path.exists(str(metadata["mark"])):
        open(str(metadata["mark"]), "w").close()
        raise TimeoutError("busy, the first time")
    if gold == "bad":
        raise ValueError("a bad row")
    return gold != "?"


def share_of_a(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """Dense: the share of a's in what follows the forced text, so that any model can learn it."""
    own = answer.rpartition("\\boxed{")[2]
    return 100.0 * own.count("a") / max(1, len(own))


def fails_on_answers(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    raise RuntimeError("cannot judge")


def all_alike(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    return 10.0
