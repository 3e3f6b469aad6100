"""What HTTP costs: tokens/s of `POST /v1/rollouts` against the offline engine, in one run.

    python -m server.bench --out docs/bench/rollouts_cpu.json    # SmolLM2, about 5 minutes

A `softvllm serve` process and an offline engine with the same options take turns, so a machine
whose speed drifts hurts both alike. Each round runs the same batch (same seeds, same parameters)
in both; the ratio is taken within a round, the median over rounds is reported. Also counts the
bytes on the wire per soft token.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2

from softvllm.core.rollout import FrameReader, Sample

PROMPT = "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many"
ARMS: dict[str, dict[str, Any]] = {
    "soft dense": {"mode": "soft", "record": "dense"},
    "soft sparse": {"mode": "soft", "top_k": 32, "record": "sparse"},
    "hard": {"mode": "hard", "record": "steps"},
}
START_SECONDS = 300


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m server.bench", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--model", help="Hugging Face name or folder (default: SmolLM2-135M-Instruct)")
    p.add_argument("--batch", type=int, default=32, help="samples per request")
    p.add_argument("--tokens", type=int, default=64, help="generated tokens per sample")
    p.add_argument("--rounds", type=int, default=5, help="rounds over all arms")
    p.add_argument("--out", type=Path, help="write JSON here")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from softvllm.engine.llm import LLM
    from softvllm.models import resolve_model

    model = resolve_model(args.model)
    options = {"enforce_eager": True, "max_num_seqs": args.batch, "max_model_len": 1024}
    with Server(model, options) as server:
        engine = LLM(model, disable_log_stats=True, **options)
        for cot in ARMS.values():  # warm-up: caches, allocators, compiled kernels
            offline(engine, cot, args.batch, 8, -1)
            server.rollouts(cot, args.batch, 8, -1)
        rows = []
        rounds: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ARMS}
        for number in range(args.rounds):
            for name, cot in ARMS.items():
                rounds[name].append(one_round(server, engine, cot, args, number))
            print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    total = args.batch * args.tokens
    for name, times in rounds.items():
        ratios = [off / on for off, on, _ in times]
        rows.append(
            {
                "arm": name,
                "offline_tokens_per_s": total / statistics.median(t[0] for t in times),
                "http_tokens_per_s": total / statistics.median(t[1] for t in times),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "bytes_per_token": times[0][2] / total,
            }
        )
    result = {
        "command": f"python -m server.bench --batch {args.batch} --tokens {args.tokens} "
        f"--rounds {args.rounds}",
        "model": Path(model).name,
        "cpu_count": os.cpu_count(),
        "rows": rows,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def one_round(
    server: Server, engine: Any, cot: dict[str, Any], args: argparse.Namespace, number: int
) -> tuple[float, float, int]:
    """(offline seconds, HTTP seconds, bytes received); the order alternates from round to round."""
    if number % 2:
        http_seconds, size = server.rollouts(cot, args.batch, args.tokens, number)
        return offline(engine, cot, args.batch, args.tokens, number), http_seconds, size
    seconds = offline(engine, cot, args.batch, args.tokens, number)
    return (seconds, *server.rollouts(cot, args.batch, args.tokens, number))


def request(cot: dict[str, Any], tokens: int) -> dict[str, Any]:
    """CoT fields of a sample that thinks for all its tokens."""
    return {
        **cot,
        "max_think_tokens": tokens - 1,
        "end_strings": [],
        "force_after_end": "",
        "force_after_cut": "",
        "min_think_tokens": tokens - 1,
    }


def offline(engine: Any, cot: dict[str, Any], batch: int, tokens: int, number: int) -> float:
    """Seconds of the batch in the offline engine, traces decoded as the server's client does."""
    from softvllm.engine.llm import soft_params

    params = [
        soft_params(
            **request(cot, tokens),
            seed=1000 * (number + 1) + k,
            max_tokens=tokens,
            temperature=1.0,
            ignore_eos=True,
        )
        for k in range(batch)
    ]
    start = time.perf_counter()
    outputs = engine.generate([PROMPT] * batch, params, use_tqdm=False)
    traces = [out.outputs[0].cot.trace for out in outputs]
    seconds = time.perf_counter() - start
    assert [len(trace) for trace in traces] == [tokens] * batch
    return seconds


class Server:
    """A `softvllm serve` process."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        flags = ["--enforce-eager"]
        for name in ("max_num_seqs", "max_model_len"):
            flags += [f"--{name.replace('_', '-')}", str(options[name])]
        command = [sys.executable, "-m", "softvllm.cli", "serve", model, "--host", "127.0.0.1"]
        self.process = subprocess.Popen([*command, "--port", str(port), *flags])

    def __enter__(self) -> Server:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx2.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx2.TransportError:
                pass
            time.sleep(0.5)
        self.__exit__()
        raise RuntimeError("the server did not start; its log is above")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def rollouts(
        self, cot: dict[str, Any], batch: int, tokens: int, number: int
    ) -> tuple[float, int]:
        """Seconds until the last trace is decoded, and bytes received."""
        body = {
            "prompts": [{"prompt": PROMPT}],
            "n": batch,
            "seeds": [[1000 * (number + 1) + k for k in range(batch)]],
            "cot": request(cot, tokens),
            "sampling": {"max_tokens": tokens, "temperature": 1.0, "ignore_eos": True},
        }
        start = time.perf_counter()
        reader, size, lengths = FrameReader(), 0, []
        with httpx2.stream("POST", f"{self.url}/v1/rollouts", json=body, timeout=600) as answer:
            if answer.status_code != 200:
                raise RuntimeError(answer.read().decode())
            for chunk in answer.iter_bytes():
                size += len(chunk)
                for frame in reader.feed(chunk):
                    if isinstance(frame, Sample):
                        lengths.append(len(frame.trace))
        reader.close()
        assert lengths == [tokens] * batch, lengths
        return time.perf_counter() - start, size


if __name__ == "__main__":
    sys.exit(main())
