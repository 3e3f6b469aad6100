"""`POST /v1/rollouts`: prompts x samples in, binary frames out as samples finish (docs/wire.md)."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.sampling_params import RequestOutputKind, SamplingParams

from server.backlog import Backlog
from server.context import ServerContext, counted
from server.metrics import METRICS
from server.phases import answer_start
from server.protocol import CoTOptions, build_cot, check_sendable, shown, trace_record
from server.report import NanLogitsError, has_nan
from server.rollout_request import RolloutRequest, parse_body
from softvllm.core.noise import sample_seeds
from softvllm.core.params import MAX_SEED, CoTParams
from softvllm.core.rollout import MEDIA_TYPE, End, Failure, Sample, Start, encode_frame
from softvllm.core.trace import encode
from softvllm.engine.errors import CoTRequestError, FieldRefusal
from softvllm.engine.keys import USER_KEY


async def create_rollouts(raw_request: Request) -> Response:
    """Generate n samples of every prompt and stream each as a binary frame once it is done."""
    context: ServerContext = raw_request.app.state.softvllm
    with counted():
        request = await parse_body(raw_request)
        run = await RolloutRun.prepare(request, context)
    if isinstance(run, ErrorResponse):
        return JSONResponse(run.model_dump(), status_code=run.error.code)
    return StreamingResponse(run.frames(), media_type=MEDIA_TYPE)


class RolloutRun:
    """A request that passed the door: feeds the engine and yields frames."""

    def __init__(
        self, request: RolloutRequest, context: ServerContext, cot: CoTParams, inputs: list[Any]
    ) -> None:
        self.request = request
        self.context = context
        self.cot = cot
        self.inputs = inputs
        self.id = request.request_id or f"rollout-{secrets.token_hex(8)}"
        self.lora: Any = None
        self.weight_version: str | None = None
        base = secrets.randbelow(MAX_SEED) if request.seed is None else request.seed
        # All at once: the event loop serves nobody meanwhile.
        self.seeds = request.seeds or sample_seeds(base, len(inputs), request.n)

    @classmethod
    async def prepare(
        cls, request: RolloutRequest, context: ServerContext
    ) -> RolloutRun | ErrorResponse:
        """Check everything before anything is scheduled: model, prompts, parameters."""
        cot = build_cot(
            request.cot_mode or context.options.default_mode or _mode_of(request.cot) or "soft",
            request.cot if request.cot is not None else CoTOptions(),
            context.options,
            context.tokenizer,
        )
        assert cot is not None
        if getattr(request.cot, "record", None) is None:
            given = CoTParams.to_dict(cot)
            given["record"] = trace_record(cot.mode, cot.top_k)
            cot = CoTParams.from_dict(given)
        if getattr(request.cot, "seed", None) is not None:
            raise CoTRequestError.of(
                "seed", "every sample of a rollout has its own; give seed or seeds beside cot"
            )
        inputs = []
        for index in range(len(request.prompts)):
            rendered = await _render(index, request, context)
            if isinstance(rendered, ErrorResponse):
                return rendered
            inputs.append(rendered)
        run = cls(request, context, cot, inputs)
        run.lora = context.chat._maybe_get_adapters(_chat(request, [])) if request.model else None
        run.weight_version = await context.engine.get_weight_version()
        check_sendable(run.sampling(0, 0), request_id=run.id, priority=request.priority)
        tasks = await context.engine.get_supported_tasks()
        for index, prompt in enumerate(inputs):  # a dry run: refusals come before the stream
            context.engine.input_processor.process_inputs(
                f"{run.id}-check", prompt, run.sampling(index, 0), tasks, lora_request=run.lora
            )
            await asyncio.sleep(0)  # thousands of prompts must not keep the loop from the others
        return run

    def sampling(self, prompt: int, sample: int) -> SamplingParams:
        """vLLM's parameters of one sample."""
        fields = self.request.sampling.model_dump()
        bias = fields.pop("logit_bias")
        room = self.context.max_model_len - len(self.inputs[prompt]["prompt_token_ids"])
        asked = fields.pop("max_tokens")
        cot = {**self.cot.to_dict(), "seed": self.seeds[prompt][sample]}
        return SamplingParams(
            **fields,
            logit_bias=None if bias is None else {int(k): v for k, v in bias.items()},
            max_tokens=room if asked is None else min(asked, room),
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={USER_KEY: cot},
        )

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """All frames; closing it early (the client left) aborts what is unfinished."""
        prompts, n = len(self.inputs), self.request.n
        yield encode_frame(
            Start(
                request_id=self.id,
                model=self.request.model or self.context.model_name,
                weight_version=self.weight_version,
                num_prompts=prompts,
                num_samples=n,
            )
        )
        backlog = Backlog(self.context.vllm_config.scheduler_config.max_num_seqs)
        feeder = asyncio.create_task(self._feed(backlog))
        errors = 0
        try:
            for _ in range(prompts * n):
                data, failed = await backlog.take()
                errors += failed
                yield data
            yield encode_frame(End(samples=prompts * n - errors, errors=errors))
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)

    async def _feed(self, backlog: Backlog) -> None:
        """Start every sample when there is room for it; cancelled, it takes all of them along."""
        async with asyncio.TaskGroup() as running:
            # Prompt by prompt: a group's first sample fills the prefix cache for the others.
            for prompt in range(len(self.inputs)):
                for sample in range(self.request.n):
                    await backlog.admit()
                    running.create_task(self._work(prompt, sample, backlog))

    async def _work(self, prompt: int, sample: int, backlog: Backlog) -> None:
        try:
            frame = await self._sample(prompt, sample)
        except Exception as error:  # one sample's failure must not take the others along
            frame = self._failure(prompt, sample, "engine", str(error))
        try:
            data = encode_frame(frame)
        except ValueError as error:
            frame = self._failure(prompt, sample, "limit", str(error))
            data = encode_frame(frame)
        backlog.put(data, failed=isinstance(frame, Failure))

    async def _sample(self, prompt: int, sample: int) -> Sample | Failure:
        outputs = self.context.engine.generate(
            self.inputs[prompt],
            self.sampling(prompt, sample),
            f"{self.id}-{prompt}-{sample}-{secrets.token_hex(4)}",
            lora_request=self.lora,
            priority=self.request.priority,
        )
        result = None
        async for item in outputs:
            result = item
        if result is None or not result.outputs:
            return self._failure(prompt, sample, "aborted", "the engine gave no output")
        output = result.outputs[0]
        METRICS.finished(output.cot, output.finish_reason or "abort")
        trace = output.cot.trace
        if has_nan(trace):
            return self._failure(prompt, sample, "nan", str(NanLogitsError()))
        if output.finish_reason not in ("stop", "length"):
            message = f"the engine ended the sample: {output.finish_reason}"
            return self._failure(prompt, sample, "aborted", message)
        return Sample(
            prompt=prompt,
            sample=sample,
            prompt_ids=np.asarray(result.prompt_token_ids, "<i4").tobytes(),
            trace_bytes=encode(trace),
            text=output.text,
            answer_start=answer_start(output.cot.stream, output.text),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )

    @staticmethod
    def _failure(prompt: int, sample: int, code: str, message: str) -> Failure:
        return Failure(prompt=prompt, sample=sample, code=code, message=message)


def _mode_of(options: BaseModel | None) -> str | None:
    return getattr(options, "mode", None)


def _chat(request: RolloutRequest, messages: list[Any]) -> ChatCompletionRequest:
    return ChatCompletionRequest(
        model=request.model, messages=messages, chat_template_kwargs=request.chat_template_kwargs
    )


async def _render(
    index: int, request: RolloutRequest, context: ServerContext
) -> Any | ErrorResponse:
    """vLLM's engine input of one prompt, or its refusal."""
    prompt, place = request.prompts[index], f"prompts.{index}"
    if prompt.messages is not None:
        try:
            chat = _chat(request, prompt.messages)
        except ValidationError as failed:  # one line in place of an error per kind of message
            error = failed.errors()[0]
            where = ".".join(shown(part) for part in error["loc"] if part != "messages")
            raise FieldRefusal(f"{place}.messages", f"{error['msg']} ({where})") from None
        rendered = await context.chat.render_chat_request(chat)
        if isinstance(rendered, ErrorResponse):
            return rendered
        return rendered[1][0]
    text = prompt.prompt if prompt.prompt is not None else prompt.prompt_token_ids
    if not text:
        raise FieldRefusal(place, "a prompt must not be empty")
    vocab = context.vllm_config.model_config.get_vocab_size()
    if isinstance(text, list) and not all(0 <= i < vocab for i in text):
        raise FieldRefusal(f"{place}.prompt_token_ids", f"token ids must be in [0, {vocab})")
    plain = CompletionRequest(model=request.model, prompt=text, max_tokens=1)
    inputs = await context.completion.render_completion_request(plain)
    return inputs if isinstance(inputs, ErrorResponse) else inputs[0]
