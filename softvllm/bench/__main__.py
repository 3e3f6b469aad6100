"""Tokens/s of stock vLLM and of each mode, interleaved in one run.

    python -m softvllm.bench --out bench.json            # SmolLM2, about 20 minutes on 2 cores
    python -m softvllm.bench --batch 32 --rounds 3 --arms stock hard soft-full

Two engines run side by side in processes of their own: stock vLLM (our plugin kept out) and
the softvllm engine. Rounds visit every arm in turn, so a machine whose speed drifts hurts all
arms alike; ratios are taken within a round against stock, and the median over rounds is
reported. Report ratios, not tokens/s: machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softvllm.bench.arms import ARMS, Case, cases, request_params
from softvllm.bench.report import markdown

PROMPT = "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m softvllm.bench", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--model", help="Hugging Face name or folder (default: SmolLM2-135M-Instruct)")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="batch sizes")
    p.add_argument(
        "--share", type=int, nargs="+", default=[0, 50, 100], help="think shares in percent"
    )
    p.add_argument("--tokens", type=int, default=64, help="generated tokens per request")
    p.add_argument("--rounds", type=int, default=5, help="rounds over all arms")
    p.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS), metavar="ARM")
    p.add_argument("--dtype", default="auto")
    p.add_argument(
        "--load-format", default="auto", help="dummy: random weights of a config's shape"
    )
    p.add_argument("--compile", action="store_true", help="torch.compile / CUDA graphs (not eager)")
    p.add_argument("--tensor-parallel-size", type=int, default=1)
    p.add_argument("--max-model-len", type=int, default=1024)
    p.add_argument(
        "--transformers", action="store_true", help="also time a plain transformers loop (soft)"
    )
    p.add_argument("--out", type=Path, help="write JSON here and a Markdown table beside it")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from softvllm.models import resolve_model

    model = resolve_model(args.model)
    plan = cases(args.arms, args.batch, args.share)
    engines = _engines(args, model)
    times: dict[Case, list[float]] = {case: [] for case in plan}
    for case in plan:  # warm-up: compiles, caches, allocators
        _time(engines, case, 8)
    for number in range(args.rounds):
        for case in plan:
            times[case].append(_time(engines, case, args.tokens))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    loop = None
    if args.transformers:
        from softvllm.bench.transformers_loop import loop_seconds

        loop = {
            str(b): b * args.tokens / loop_seconds(model, PROMPT, b, args.tokens)
            for b in args.batch
        }
    result = _result(args, model, times, loop)
    print(markdown(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(result))
    return 0


def _engines(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """The stock engine and ours, with the same options."""
    import vllm

    from softvllm.engine.llm import LLM

    options: dict[str, Any] = {
        "dtype": args.dtype,
        "load_format": args.load_format,
        "enforce_eager": not args.compile,
        "max_num_seqs": max(args.batch),
        "max_model_len": args.max_model_len,
        "tensor_parallel_size": args.tensor_parallel_size,
        "disable_log_stats": True,
        "enable_prefix_caching": False,
    }
    if _on_gpu():  # both engines must fit
        options["gpu_memory_utilization"] = 0.4
    plugins = os.environ.get("VLLM_PLUGINS")
    os.environ["VLLM_PLUGINS"] = ""  # the stock engine's processes see no plugin at all
    try:
        stock = vllm.LLM(model, **options)
    finally:
        os.environ.pop("VLLM_PLUGINS")
        if plugins is not None:
            os.environ["VLLM_PLUGINS"] = plugins
    return {"stock": stock, "soft": LLM(model, **options)}


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _time(engines: dict[str, Any], case: Case, tokens: int) -> float:
    """Seconds for one batch of the case to generate `tokens` tokens per request."""
    params = request_params(case, tokens)
    engine = engines["stock" if case.arm == "stock" else "soft"]
    start = time.perf_counter()
    outputs = engine.generate([PROMPT] * case.batch, params, use_tqdm=False)
    elapsed = time.perf_counter() - start
    counts = {len(out.outputs[0].token_ids) for out in outputs}
    assert counts == {tokens}, f"{case}: generated {counts} tokens instead of {tokens}"
    return elapsed


def _result(
    args: argparse.Namespace,
    model: str,
    times: dict[Case, list[float]],
    loop: dict[str, float] | None,
) -> dict[str, Any]:
    import torch
    import vllm

    rows = []
    for case, seconds in times.items():
        stock = times.get(Case("stock", case.batch, 0))
        ratios = [s / t for s, t in zip(stock, seconds)] if stock else []
        rows.append(
            {
                "arm": case.arm,
                "batch": case.batch,
                "think_share": case.share,
                "tokens_per_s": case.batch * args.tokens / statistics.median(seconds),
                "ratio_to_stock": statistics.median(ratios) if ratios else None,
                "ratio_min": min(ratios) if ratios else None,
                "ratio_max": max(ratios) if ratios else None,
                "seconds": [round(s, 4) for s in seconds],
            }
        )
    return {
        "command": "python -m softvllm.bench " + " ".join(_relevant(sys.argv[1:])),
        "model": Path(model).name,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "eager": not args.compile,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if _on_gpu() else _cpu_name(),
        "cpu_count": os.cpu_count(),
        "rows": rows,
        "transformers_tokens_per_s": loop,
    }


def _relevant(argv: Sequence[str]) -> list[str]:
    """The command line without the output path."""
    out, skip = [], False
    for item in argv:
        if skip or item == "--out":
            skip = item == "--out"
            continue
        out.append(item)
    return out


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
