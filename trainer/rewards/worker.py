"""A reward worker: `python -m trainer.rewards.worker FD`, started and killed by `pool.py`.

Reads requests from a socket and answers each with a verdict or the error it met. What scorers
print goes to standard error. It dies with its parent.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from trainer.rewards.base import as_verdict, find

_PR_SET_PDEATHSIG = 1


class Request(msgspec.Struct):
    """What a worker is asked."""

    scorer: str
    kind: str
    """score: the answer; verifiable: the gold."""
    answer: str
    gold: str
    metadata: str
    """JSON: msgpack would not hold every number of it."""


class Reply(msgspec.Struct):
    """What it answers; `error` is set instead where the scorer raised."""

    reward: float = 0.0
    correct: bool = False
    extracted: str | None = None
    error: str | None = None


def answer(request: Request) -> Reply:
    """Run one scorer; whatever it raises becomes an error reply."""
    try:
        scorer, verifiable = find(request.scorer)
        metadata: dict[str, Any] = json.loads(request.metadata)
        if request.kind == "verifiable":
            good = verifiable is None or verifiable(request.gold, metadata)
            return Reply(correct=bool(good))
        verdict = as_verdict(scorer(request.answer, request.gold, metadata))
        return Reply(verdict.reward, verdict.correct, verdict.extracted)
    except BaseException as error:  # math-verify's timeout is a BaseException
        if isinstance(error, KeyboardInterrupt):
            raise
        return Reply(error=f"{type(error).__name__}: {error}"[:2000])


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    os.dup2(2, 1)
    requests = msgspec.msgpack.Decoder(Request)
    encoder = msgspec.msgpack.Encoder()
    with Connection(int(sys.argv[1])) as line:
        line.send_bytes(b"ready")
        gc.freeze()
        while True:
            try:
                request = requests.decode(line.recv_bytes())
            except EOFError:
                return
            line.send_bytes(encoder.encode(answer(request)))


if __name__ == "__main__":
    main()
