"""Many clients at once, half of them rude: does the server stay clean and keep requests apart?

    python -m server.soak --url http://127.0.0.1:8000 --seconds 120 --streams 200

First every kind of request is run alone and its answer kept. Then `--streams` clients send random
ones for `--seconds`, streamed or not, and leave some of them at a random moment (closed
connections, cancelled calls). Every answer that is complete must be the one the request had alone.
At the end nothing may be held: no request, no trace, no slot, no memory that keeps growing.

A request has its own prompt and seed, so an answer mixed up with a neighbour's shows. A different
batch may round a matrix product differently, which can change a token where two are nearly equally
likely; so a few answers that differ are expected from a real model, none from a calm one in
float32. An answer that is another request's is counted separately and must never occur.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from server.soak_client import ROLLOUTS, Client, LeftError, Request, make_requests


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m server.soak", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--url", required=True, help="the server, e.g. http://127.0.0.1:8000")
    p.add_argument("--stock-url", help="stock vLLM with the same model: plain answers must be its")
    p.add_argument("--api-key", default="", help="the server's key, if it has one")
    p.add_argument("--seconds", type=float, default=120, help="length of the load")
    p.add_argument("--streams", type=int, default=200, help="clients at once")
    p.add_argument("--requests", type=int, default=60, help="different requests")
    p.add_argument("--leave", type=float, default=0.3, help="share of requests left early")
    p.add_argument("--tokens", type=int, default=48, help="think tokens of a request at most")
    p.add_argument("--seed", type=int, default=0, help="seed of the choices made here")
    p.add_argument("--pid", type=int, help="process of a server on this machine: watch its memory")
    p.add_argument("--out", type=Path, help="write JSON here")
    return p


@dataclass
class Tally:
    """What happened during the load."""

    done: Counter[str] = field(default_factory=Counter)
    """Complete answers by mode."""
    left: Counter[str] = field(default_factory=Counter)
    """Requests left early, by where."""
    differs: Counter[str] = field(default_factory=Counter)
    """Complete answers other than alone, by mode."""
    neighbours: int = 0
    """Of these, answers that belong to another request."""
    errors: Counter[str] = field(default_factory=Counter)
    tokens: int = 0


async def load(
    client: Client,
    requests: list[Request],
    alone: list[str],
    args: argparse.Namespace,
    tally: Tally,
) -> None:
    """All clients, until the time is over and the last answers are there."""
    owners: dict[str, int] = {text: i for i, text in enumerate(alone)}
    end = time.monotonic() + args.seconds

    async def one(number: int) -> None:
        rng = random.Random(args.seed * 100_003 + number)
        while time.monotonic() < end:
            index = rng.randrange(len(requests))
            request, stream = requests[index], rng.random() < 0.7
            try:
                if rng.random() < args.leave:
                    await rudely(client, request, stream, rng, tally)
                    continue
                text = await client.ask(request, stream)
            except (httpx.HTTPError, RuntimeError, ValueError) as error:
                tally.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                continue
            tally.done[request.mode] += 1
            if text != alone[index]:
                tally.differs[request.mode] += 1
                tally.neighbours += owners.get(text, index) != index

    await asyncio.gather(*(one(number) for number in range(args.streams)))


async def rudely(
    client: Client, request: Request, stream: bool, rng: random.Random, tally: Tally
) -> None:
    """Send a request and leave: in the middle of the answer, or while waiting for it."""
    if rng.random() < 0.5:
        try:
            await client.ask(request, True, bytes_until=rng.randint(1, 6000))
            tally.left["too late"] += 1
        except LeftError:
            tally.left["reading"] += 1
        return
    job = asyncio.create_task(client.ask(request, stream))
    await asyncio.wait({job}, timeout=rng.uniform(0, 1.5))
    tally.left["too late" if job.done() else "waiting"] += 1
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)


async def settled(client: Client, seconds: float = 60) -> dict[str, int]:
    """What the server still holds once it had time to let go."""
    deadline = time.monotonic() + seconds
    while True:
        held = (await client.info())["held"]
        if not any(held.values()) or time.monotonic() > deadline:
            return dict(held)
        await asyncio.sleep(0.2)


def memory(pid: int | None) -> float | None:
    """MiB of the server's processes; None if not asked for."""
    if pid is None:
        return None
    top = psutil.Process(pid)
    family = [top, *top.children(recursive=True)]
    return sum(process.memory_info().rss for process in family) / 2**20


async def full_batch(client: Client, requests: list[Request], slots: int) -> float:
    """Seconds of as many think phases at once as there are slots: a slot lost would show."""
    thinking = [r for r in requests if r.mode == "soft" and r.path != ROLLOUTS]
    start = time.monotonic()
    jobs = [client.ask(thinking[i % len(thinking)], False) for i in range(slots)]
    await asyncio.gather(*jobs)
    return time.monotonic() - start


async def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything; the result as plain data."""
    client, tally = Client(args.url, args.api_key), Tally()
    info = await client.info()
    slots = int(info["limits"]["max_num_seqs"])
    requests = make_requests(args.requests, args.tokens, random.Random(args.seed), info["model"])
    say(f"{len(requests)} requests alone ...")
    alone = [await client.ask(request, stream=False) for request in requests]
    if args.stock_url:
        stock = Client(args.stock_url, args.api_key)
        for i, request in enumerate(requests):
            if request.mode == "plain":
                alone[i] = await stock.ask(request, stream=False)
    repeated = sum([await client.ask(r, True) == a for r, a in zip(requests, alone)])
    before_batch = await full_batch(client, requests, slots)
    # A first taste of the load, so that pools and caches that fill once do not count as a leak.
    warm = argparse.Namespace(**{**vars(args), "seconds": min(10.0, args.seconds / 4)})
    await load(client, requests, alone, warm, Tally())
    before = {"held": await settled(client), "mib": memory(args.pid)}
    say(f"{args.streams} clients for {args.seconds:g} s ...")
    start = time.monotonic()
    await load(client, requests, alone, args, tally)
    seconds = time.monotonic() - start
    after = {"held": await settled(client), "mib": memory(args.pid)}
    after_batch = await full_batch(client, requests, slots)
    again = sum([await client.ask(r, False) == a for r, a in zip(requests, alone)])
    done, differs = sum(tally.done.values()), sum(tally.differs.values())
    return {
        "model": info["model"],
        "dtype": info["dtype"],
        "streams": args.streams,
        "slots": slots,
        "seconds": round(seconds, 1),
        "complete": dict(sorted(tally.done.items())),
        "left_early": dict(sorted(tally.left.items())),
        "errors": dict(tally.errors),
        "same_as_alone": round(1 - differs / done, 6) if done else None,
        "differs": dict(tally.differs),
        "neighbours_answers": tally.neighbours,
        "alone_streamed_same": f"{repeated} of {len(requests)}",
        "alone_afterwards_same": f"{again} of {len(requests)}",
        "held_before": before["held"],
        "held_after": after["held"],
        "mib_before": _rounded(before["mib"]),
        "mib_after": _rounded(after["mib"]),
        "full_batch_seconds_before": round(before_batch, 2),
        "full_batch_seconds_after": round(after_batch, 2),
    }


def _rounded(mib: Any) -> float | None:
    return None if mib is None else round(float(mib), 1)


def failures(result: dict[str, Any], bound: float) -> list[str]:
    """What is wrong with a result, in words; `bound`: share of equal answers that is enough."""
    wrong = []
    if any(result["held_after"].values()):
        wrong.append(f"still held: {result['held_after']}")
    if result["errors"]:
        wrong.append(f"errors: {result['errors']}")
    if result["neighbours_answers"]:
        wrong.append(f"{result['neighbours_answers']} answers were another request's")
    if result["differs"].get("plain"):
        wrong.append(f"{result['differs']['plain']} plain answers were not those of stock vLLM")
    if result["same_as_alone"] is not None and result["same_as_alone"] < bound:
        wrong.append(f"only {result['same_as_alone']:.1%} of answers as alone")
    if result["mib_before"] is not None and result["mib_after"] > 1.1 * result["mib_before"] + 50:
        wrong.append(f"memory grew from {result['mib_before']} to {result['mib_after']} MiB")
    return wrong


def say(text: str) -> None:
    print(f"soak: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    result = asyncio.run(soak(args))
    wrong = failures(result, bound=0.5)
    result = {"command": "python -m server.soak " + " ".join(words), **result, "wrong": wrong}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
