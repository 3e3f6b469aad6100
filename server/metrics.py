"""Prometheus metrics of the think phase, beside vLLM's own on `/metrics`.

Healthy: `softvllm_refused_total` flat; `softvllm_default_fallbacks_total` a small part of all
requests (else `--default-cot-mode` reaches few of them); `end="budget"` a minority
of `softvllm_think_end_total` (else the budget cuts chains short), entropy neither near 0 (collapsed
chains) nor rising over a training run. Soft steps a second:
`rate(softvllm_tokens_total{kind="soft"}[1m])`.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from server.report import has_nan
from softvllm.engine.outputs import CoTOutput

FIELDS: set[str] = {"body", "prompt"}
"""Names that a label of `softvllm_refused_total` may have; modules with typed fields add theirs.
All else counts as "other": a label lives as long as the process, so clients must not make any."""

_LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_NATS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)


class Metrics:
    """All of them, made once per process."""

    def __init__(self) -> None:
        self.requests = Counter(
            "softvllm_requests",
            "Chat and completion requests served, by mode; stock: without a think phase.",
            ["mode"],
        )
        self.samples = Counter(
            "softvllm_samples", "Samples with a think phase, by how they ended.", ["mode", "finish"]
        )
        self.tokens = Counter(
            "softvllm_tokens",
            "Generated positions: think steps by what was fed (soft, hard), forced, answer.",
            ["mode", "kind"],
        )
        self.think = Histogram(
            "softvllm_think_tokens", "Think steps of a sample.", ["mode"], buckets=_LENGTHS
        )
        self.ends = Counter(
            "softvllm_think_end", "Why thinking ended, at the sample's end.", ["mode", "end"]
        )
        self.entropy = Histogram(
            "softvllm_think_entropy_nats",
            "Mean entropy of a sample's think phase.",
            ["mode"],
            buckets=_NATS,
        )
        self.refused = Counter(
            "softvllm_refused", "Requests refused at the door, by field.", ["field"]
        )
        self.fallbacks = Counter(
            "softvllm_default_fallbacks",
            "Requests decoded without the server's default think phase, as they cannot bear one.",
        )
        self.held = Gauge(
            "softvllm_trace_bytes",
            "Bytes of traces held: front (API process), engine (ledgers of running requests).",
            ["where"],
            multiprocess_mode="livesum",
        )
        self.nan = Counter("softvllm_nan_samples", "Samples whose logits became NaN.", ["mode"])

    def refuse(self, field: object) -> None:
        """Count a refusal; `field` may hold what a client wrote, such as an unknown name."""
        parts = [p for p in str(field or "").split("[")[0].split(".") if not p.isdecimal()][:2]
        known = parts and FIELDS.issuperset(parts)
        self.refused.labels(".".join(parts) if known else "other").inc()

    def finished(self, cot: CoTOutput, reason: str) -> None:
        """Count a sample that ended, also one whose client left."""
        whole = cot.trace
        summary: dict[str, Any] = whole.summary()
        mode = summary["mode"]
        self.samples.labels(mode, reason).inc()
        for kind, name in (
            ("soft", "soft_steps"),
            ("hard", "hard_steps"),
            ("forced", "forced_tokens"),
            ("answer", "answer_tokens"),
        ):
            self.tokens.labels(mode, kind).inc(summary[name])
        self.think.labels(mode).observe(summary["think_tokens"])
        self.ends.labels(mode, summary["end_cause"]).inc()
        entropy = summary["mean_entropy"]
        if has_nan(whole):
            self.nan.labels(mode).inc()
        elif entropy is not None:
            self.entropy.labels(mode).observe(entropy)


METRICS = Metrics()
