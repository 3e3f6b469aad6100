"""What the routes share: one `ServerContext` per app, at `app.state.softvllm`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm.exceptions import VLLMValidationError

from server.metrics import METRICS
from server.options import ServerOptions
from server.turn import Turn
from softvllm.core.params import CoTParams
from softvllm.core.recipe import marker_ids


@dataclass
class ServerContext:
    """The engine client and vLLM's handlers behind our routes."""

    engine: Any
    """vLLM's `AsyncLLM`."""
    options: ServerOptions
    chat: Any
    """`SoftServingChat`."""
    completion: Any
    """`SoftServingCompletion`."""
    model_name: str
    weights_at_start: str | None = None
    """Fingerprint of what the engine loaded, before any update; `name@commit` of a model that came
    from the hub; None where neither is known."""

    @property
    def vllm_config(self) -> Any:
        return self.engine.vllm_config

    @property
    def max_model_len(self) -> int:
        return int(self.vllm_config.model_config.max_model_len)

    @property
    def tokenizer(self) -> Any:
        return self.chat.renderer.tokenizer

    @cached_property
    def markers(self) -> frozenset[int]:
        return frozenset() if self.tokenizer is None else marker_ids(self.tokenizer)

    def turn(self, cot: CoTParams, trace: bool) -> Turn:
        tokenizer = self.tokenizer

        def decode(token: int) -> str:
            return str(token) if tokenizer is None else tokenizer.decode([token])

        return Turn(cot, trace=trace, markers=self.markers, decode=decode)


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Count what is refused inside, by field."""
    try:
        yield
    except VLLMValidationError as error:
        if not getattr(error, "counted", False):
            METRICS.refuse(error.parameter)
        raise
