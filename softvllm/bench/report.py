"""A benchmark result as a Markdown table."""

from __future__ import annotations

from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """One table: arms down, batch sizes across; cells are `ratio (tokens/s)`."""
    batches = sorted({row["batch"] for row in result["rows"]})
    lines = [
        f"`{result['command']}`",
        "",
        f"{result['model']}, vLLM {result['vllm']}, {'eager' if result['eager'] else 'compiled'}, "
        f"{result['device']}, {result['cpu_count']} CPUs; {result['tokens']} tokens per request, "
        f"median of {result['rounds']} interleaved rounds. Ratio to stock vLLM (tokens/s).",
        "",
        "| arm | think share | " + " | ".join(f"batch {b}" for b in batches) + " |",
        "|---|---|" + "---|" * len(batches),
    ]
    keys = dict.fromkeys((row["arm"], row["think_share"]) for row in result["rows"])
    for arm, share in keys:
        cells = []
        for batch in batches:
            row = next(
                r
                for r in result["rows"]
                if (r["arm"], r["think_share"], r["batch"]) == (arm, share, batch)
            )
            ratio = row["ratio_to_stock"]
            speed = f"{row['tokens_per_s']:.0f}"
            cells.append(speed if ratio is None else f"{ratio:.3f} ({speed})")
        lines.append(f"| {arm} | {share} % | " + " | ".join(cells) + " |")
    loop = result.get("transformers_tokens_per_s")
    if loop:
        cells = [f"{loop[str(b)]:.0f}" for b in batches]
        lines.append("| transformers loop, soft | 100 % | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
