"""The sampler seams of both runners: ours wraps the stock sampler, one class each.

The stock sampler runs for every row that needs it, with its own processors and random state;
our rows' tokens are then replaced before log-probs are gathered, so `logprobs` describe the
tokens that were really emitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from softvllm.engine.core import SoftCore
    from softvllm.engine.records import StepRecord
    from softvllm.engine.step import Step


class _CaptureLogits:
    """Stands before V1's top-k/top-p sampler and keeps the logits it really samples from."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.capture = False
        self.logits: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, generators: Any, k: Any, p: Any) -> Any:
        if not self.capture:
            return self.inner(logits, generators, k, p)
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        # Filtering first and sampling without filters draws the same tokens.
        self.logits = apply_top_k_top_p(logits, k, p)
        return self.inner(self.logits, generators, None, None)


class SoftSamplerV1:
    """Mixin over `vllm.v1.sample.sampler.Sampler`."""

    softvllm_core: SoftCore
    softvllm_record: StepRecord | None
    _softvllm_step: Step | None
    _softvllm_capture: _CaptureLogits

    def forward(self, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kw: Any) -> Any:
        from vllm.v1.outputs import SamplerOutput

        self.softvllm_record = None
        step = self._softvllm_step = self.softvllm_core.begin(logits)
        if step is None:
            return super().forward(logits, sampling_metadata, *args, **kw)  # type: ignore[misc]
        wants_logprobs = (
            sampling_metadata.max_num_logprobs is not None or sampling_metadata.logprob_token_ids
        )
        if not step.needs_sampler and not wants_logprobs:
            # Every row is thinking or forced: no random sampling at all.
            tokens, self.softvllm_record = step.finish(None, None)
            self._softvllm_step = None
            return SamplerOutput(tokens.to(torch.int32).unsqueeze(-1), None)
        try:
            return super().forward(logits, sampling_metadata, *args, **kw)  # type: ignore[misc]
        finally:
            self._softvllm_step = None

    def sample(self, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kw: Any) -> Any:
        step = self._softvllm_step
        if step is None:
            return super().sample(logits, sampling_metadata, *args, **kw)  # type: ignore[misc]
        capture = self._softvllm_capture
        capture.capture, capture.logits = True, None
        try:
            sampled, processed = super().sample(  # type: ignore[misc]
                logits, sampling_metadata, *args, **kw
            )
        finally:
            capture.capture = False
        # An all-greedy batch never reaches the top-k/top-p sampler: its logits are final.
        shaped = logits if capture.logits is None else capture.logits
        tokens, self.softvllm_record = step.finish(sampled.view(-1), shaped)
        capture.logits = None
        return tokens, processed


def install_v1(sampler: Any, core: SoftCore) -> None:
    """Give a V1 sampler our class."""
    base = type(sampler)
    sampler.__class__ = type(f"Soft{base.__name__}", (SoftSamplerV1, base), {})
    capture = _CaptureLogits(sampler.topk_topp_sampler)
    # An nn.Module refuses a non-module in a module's place, so the module entry goes first.
    del sampler.topk_topp_sampler
    object.__setattr__(sampler, "topk_topp_sampler", capture)
    sampler.softvllm_core = core
    sampler.softvllm_record = None
    sampler._softvllm_step = None
    object.__setattr__(sampler, "_softvllm_capture", capture)


class SoftSamplerV2:
    """Mixin over `vllm.v1.worker.gpu.sample.sampler.Sampler`."""

    softvllm_core: SoftCore
    softvllm_record: StepRecord | None
    use_flashinfer: bool
    use_xpu_sampler: bool

    def sample(self, logits: torch.Tensor, *args: Any, **kw: Any) -> Any:
        self.softvllm_record = None
        step = self.softvllm_core.begin(logits)
        if step is None:
            return super().sample(logits, *args, **kw)  # type: ignore[misc]
        if not step.needs_sampler and not kw.get("return_logprobs"):
            # Every row is thinking or forced; nobody reads the logits afterwards.
            tokens, self.softvllm_record = step.finish(None, None)
            return tokens, logits
        # Fused samplers do not return the filtered logits that answers are drawn from.
        fused = self.use_flashinfer, self.use_xpu_sampler
        if len(step.answer_np):
            self.use_flashinfer = self.use_xpu_sampler = False
        try:
            sampled, processed = super().sample(logits, *args, **kw)  # type: ignore[misc]
        finally:
            self.use_flashinfer, self.use_xpu_sampler = fused
        tokens, self.softvllm_record = step.finish(sampled.view(-1), processed)
        return tokens.to(sampled.dtype).view_as(sampled), processed


def install_v2(sampler: Any, core: SoftCore) -> None:
    """Give a V2 sampler our class."""
    base = type(sampler)
    sampler.__class__ = type(f"Soft{base.__name__}", (SoftSamplerV2, base), {})
    sampler.softvllm_core = core
    sampler.softvllm_record = None
