"""The process behind ``engine_harness.Engine``: holds one LLM and answers requests."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from multiprocessing.connection import Client
from typing import Any


def samples_of(output: Any) -> list[Any]:
    from engine_harness import Sample

    from softvllm.core.trace import encode

    samples = []
    for completion in output.outputs:
        logprobs = None
        if completion.logprobs is not None:
            logprobs = [{k: v.logprob for k, v in step.items()} for step in completion.logprobs]
        cot = getattr(completion, "cot", None)
        samples.append(
            Sample(
                token_ids=list(completion.token_ids),
                text=completion.text,
                finish_reason=completion.finish_reason,
                stop_reason=completion.stop_reason,
                logprobs=logprobs,
                trace_bytes=None if cot is None else encode(cot.trace),
                num_cached_tokens=output.num_cached_tokens,
            )
        )
    return samples


def start(model: str, stock: bool, options: dict[str, Any]) -> Any:
    if stock:
        import vllm

        return vllm.LLM(model, **options)
    from softvllm import LLM

    return LLM(model, **options)


def leave(llm: Any) -> None:
    """Skip the interpreter's slow teardown where no child process has to be taken down."""
    parallel = 1 if llm is None else llm.llm_engine.vllm_config.parallel_config.world_size
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and parallel == 1:
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    connection = Client(sys.argv[1], "AF_UNIX", authkey=bytes.fromhex(sys.argv[2]))
    llm: Any = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        try:
            match message:
                case ("start", model, stock, options):
                    llm = start(model, stock, options)
                    answer: Any = None
                case ("generate", prompts, params, kwargs):
                    outputs = llm.generate(prompts, params, use_tqdm=False, **kwargs)
                    answer = [samples_of(output) for output in outputs]
                case ("call", function, args):
                    module, name = function.split(":")
                    answer = getattr(importlib.import_module(module), name)(llm, *args)
                case _:
                    leave(llm)
                    return
            connection.send((True, answer))
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            connection.send((False, f"{text}"))


if __name__ == "__main__":
    main()
