"""Scorers of the evaluation's tests: their verdict hangs on answer and gold together."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from typing import Any

from trainer.rewards.base import Verdict

BUSY = "EVAL_SCORERS_BUSY"
"""Environment variable: a file while which exists some answers cannot be judged."""
SLOW = "EVAL_SCORERS_SLOW"
"""Environment variable: a file while which exists no answer is judged in any test's time."""


def by_hash(answer: str, gold: str, metadata: Mapping[str, Any]) -> Verdict:
    """Right for a third of the answers; wrong ones read as one of two numbers, some as none."""
    number = int.from_bytes(hashlib.sha256(f"{gold}|{answer}".encode()).digest()[:4], "big")
    if number % 5 == 0 and os.path.exists(os.environ.get(BUSY, "")):
        raise TimeoutError("busy")
    if os.path.exists(os.environ.get(SLOW, "")):
        time.sleep(600)
    read = None if number % 3 and number % 7 == 0 else str(number % 3)
    return Verdict(100.0 if number % 3 == 0 else 10.0, number % 3 == 0, read)
