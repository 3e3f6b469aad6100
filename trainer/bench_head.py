"""Cost of the fused head against plain torch: `python -m trainer.bench_head --out FILE.json`.

Each case runs in its own process, forward and backward with gradients to hidden states and one
tied table, at SmolLM2-135M's sizes by default. Memory is the rise of the process's peak over what
inputs and gradients take anyway; times are the best of `--repeats`: of the clock, and of the
processor, which on one thread also means something on a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from trainer import head, head_reference

OPS = ("soft", "hard")
KINDS = ("fused", "plain")


def measure(op: str, kind: str, n: int, vocab: int, dim: int, repeats: int) -> dict:
    """One case: seconds forward, seconds in all, MiB above the inputs and gradients."""
    torch.manual_seed(0)
    table = (torch.randn(vocab, dim) * dim**-0.5).requires_grad_()
    hidden = torch.randn(n, dim, requires_grad=True)
    tau = torch.full((n,), 0.5 if op == "soft" else 1.0)
    targets = torch.randint(vocab, (n,))
    direction = torch.randn(n, dim)
    table.grad, hidden.grad = torch.zeros_like(table), torch.zeros_like(hidden)
    module = head if kind == "fused" else head_reference

    def step() -> tuple[float, float, float]:
        start, busy = time.perf_counter(), time.process_time()
        if op == "soft":
            out = (module.soft_mean(hidden, table, table, tau)[0] * direction).sum()
        else:
            out = module.token_log_prob(hidden, table, targets, tau)[0].sum()
        middle = time.process_time()
        out.backward()
        end = time.process_time()
        return time.perf_counter() - start, end - busy, middle - busy

    # Threads and their buffers exist before the mark.
    tiny = torch.randn(8, 8, requires_grad=True)
    head.soft_mean(tiny, tiny, tiny, torch.ones(8))[0].sum().backward()
    torch.mm(hidden, hidden.t())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [first, *(step() for _ in range(repeats - 1))]
    return {
        "op": op,
        "kind": kind,
        "n": n,
        "vocab": vocab,
        "dim": dim,
        "seconds": round(min(t[0] for t in times), 3),
        "cpu_seconds": round(min(t[1] for t in times), 3),
        "cpu_seconds_forward": round(min(t[2] for t in times), 3),
        "peak_mib": round((peak - before) / 1024, 1),
        "float32_nv_mib": round(n * vocab * 4 / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--case", nargs=3, metavar=("OP", "KIND", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        op, kind, n = args.case
        print(json.dumps(measure(op, kind, int(n), args.vocab, args.dim, args.repeats)))
        return
    results = []
    for op in OPS:
        for n in args.rows:
            for kind in KINDS:
                command = [sys.executable, "-m", "trainer.bench_head", "--case", op, kind, str(n)]
                command += ["--vocab", str(args.vocab), "--dim", str(args.dim)]
                command += ["--repeats", str(args.repeats), "--threads", str(args.threads)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
                results.append(json.loads(done.stdout))
                print(results[-1])
    report = {
        "what": "forward and backward of one head call, float32, tied table",
        "machine": f"{platform.machine()}, {args.threads} threads",
        "torch": torch.__version__,
        "results": results,
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
