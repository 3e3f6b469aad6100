"""The `cot` block of a choice: what the think phase was, in plain JSON."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np

from softvllm.core.phases import Phase
from softvllm.core.trace import Trace, encode, is_soft
from softvllm.engine.outputs import CoTOutput

Decode = Callable[[int], str]
"""Text of one token."""


class NanLogitsError(RuntimeError):
    """The model produced NaN logits: no number of this sample means anything."""

    def __init__(self) -> None:
        super().__init__("the model produced NaN logits; check the checkpoint and its dtype")


def has_nan(trace: Trace) -> bool:
    """Whether NaN logits show: in the entropy of a thought, in the log-prob of any token."""
    return bool(np.isnan(trace.entropy).any() or np.isnan(trace.log_prob).any())


def final_block(cot: CoTOutput, *, trace: bool, top: bool, decode: Decode) -> dict[str, Any]:
    """Everything about a finished sample.

    Raises:
        NanLogitsError: JSON has no NaN, and a client must not take such a sample for a result.
    """
    whole = cot.trace
    if has_nan(whole):
        raise NanLogitsError
    block = {**whole.summary(), "policy": whole.meta["policy"]}
    if top:
        block["steps"] = think_steps(whole, decode)
    if trace:
        block["trace"] = base64.b64encode(encode(whole)).decode()
    return block


def think_steps(trace: Trace, decode: Decode) -> list[dict[str, Any]]:
    """Each think step with its top tokens: [token, id, weight], the likeliest first."""
    soft = is_soft(trace.kind)
    out = []
    row = 0
    for t in range(len(trace)):
        if trace.phase[t] != Phase.THINK:
            continue
        entropy = float(trace.entropy[t])
        if entropy != entropy:
            raise NanLogitsError
        token = int(trace.token[t])
        step: dict[str, Any] = {
            "token": decode(token),
            "id": token,
            "soft": bool(soft[t]),
            "entropy": round(entropy, 6),
        }
        if trace.top_ids is not None and trace.top_weights is not None:
            pairs = zip(trace.top_ids[row].tolist(), trace.top_weights[row].tolist())
            step["top"] = [[decode(i), i, round(w, 6)] for i, w in pairs if w > 0]
        out.append(step)
        row += 1
    return out
