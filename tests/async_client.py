"""An `AsyncLLM` with its engine core in another process, as a server runs it.

Run as a script: ``python async_client.py MODEL RESULTS`` plays a few clients at once and
pickles what they received. Streams, aborts and n > 1 are checked in ``test_features.py``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import sys
from pathlib import Path
from typing import Any

PROMPT = [5, 60, 7, 80, 9, 70, 11, 65]
REQUEST: dict[str, Any] = {
    "mode": "soft",
    "seed": 3,
    "max_think_tokens": 12,
    "end_strings": (),
    "force_after_end": (42,),
    "force_after_cut": (40, 41),
    "max_tokens": 20,
    "ignore_eos": True,
    "top_k": 4,
}
STREAMS: dict[str, dict[str, Any]] = {
    "soft": {"record": "dense"},
    "sparse": {"record": "sparse"},
    "blend": {"mode": "mixed", "policy": "blend", "record": "dense"},
    "hard": {"mode": "hard", "top_k": 0, "record": "top"},
    "in threes": {"record": "dense", "stream_interval": 3},
    # vLLM merges the chunks that such a client has not fetched yet.
    "slow client": {"record": "dense"},
}


@dataclasses.dataclass
class Streamed:
    """What a streaming client saw."""

    chunks: list[bytes]  # encoded `cot.steps` of each output
    token_ids: list[int]  # the chunks' own ids, concatenated
    text: str
    whole: bytes  # the encoded trace of the last output
    finish_reason: str | None


@dataclasses.dataclass
class Results:
    streams: dict[str, Streamed]
    cumulative: list[int]  # positions in `cot.steps` of each output of a CUMULATIVE stream
    samples: list[list[bytes]]  # encoded traces of n = 4, twice with the same seed
    aborted_after: int  # positions received before the abort
    after_abort: bytes  # a request served afterwards
    refusal: str


async def stream(engine: Any, name: str, options: dict[str, Any]) -> Streamed:
    from vllm.sampling_params import RequestOutputKind

    from softvllm import soft_params
    from softvllm.core.trace import encode

    params = soft_params(**{**REQUEST, **options}, output_kind=RequestOutputKind.DELTA)
    seen = Streamed([], [], "", b"", None)
    async for output in engine.generate({"prompt_token_ids": PROMPT}, params, name):
        (completion,) = output.outputs
        seen.chunks.append(encode(completion.cot.steps))
        seen.token_ids += completion.token_ids
        seen.text += completion.text
        seen.whole = encode(completion.cot.trace)
        seen.finish_reason = completion.finish_reason
        if name == "slow client":
            await asyncio.sleep(0.3)
    return seen


async def cumulative(engine: Any) -> list[int]:
    from softvllm import soft_params

    lengths = []
    params = soft_params(**REQUEST)  # CUMULATIVE is the default
    async for output in engine.generate({"prompt_token_ids": PROMPT}, params, "cumulative"):
        (completion,) = output.outputs
        assert len(completion.token_ids) == len(completion.cot.steps)
        lengths.append(len(completion.cot.steps))
    return lengths


async def sampled(engine: Any, request_id: str) -> list[bytes]:
    from vllm.sampling_params import RequestOutputKind

    from softvllm import soft_params
    from softvllm.core.trace import encode

    params = soft_params(
        **REQUEST, n=4, temperature=1.0, record="dense", output_kind=RequestOutputKind.FINAL_ONLY
    )
    async for output in engine.generate({"prompt_token_ids": PROMPT}, params, request_id):
        if output.finished:
            assert len(output.outputs) == 4
            return [encode(c.cot.trace) for c in output.outputs]
    raise AssertionError("the request never finished")


async def abort(engine: Any) -> int:
    from vllm.sampling_params import RequestOutputKind

    from softvllm import soft_params

    options = {**REQUEST, "max_think_tokens": 300, "max_tokens": 400}
    params = soft_params(**options, record="dense", output_kind=RequestOutputKind.DELTA)
    count = 0
    async for output in engine.generate({"prompt_token_ids": PROMPT}, params, "abort"):
        count += len(output.outputs[0].token_ids)
        if count >= 10:
            break  # closing the generator aborts the request
    return count


async def main(model: str, target: Path) -> None:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from softvllm import soft_params
    from softvllm.engine.llm import engine_config

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            enforce_eager=True,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=16,
            disable_log_stats=True,
            additional_config=engine_config(),
        )
    )
    try:
        names = list(STREAMS)
        *streams, lengths, first, again, count = await asyncio.gather(
            *(stream(engine, name, STREAMS[name]) for name in names),
            cumulative(engine),
            sampled(engine, "n4"),
            sampled(engine, "n4-again"),
            abort(engine),
        )
        after = await stream(engine, "after", STREAMS["soft"])
        try:
            async for _ in engine.generate(
                {"prompt_token_ids": PROMPT}, soft_params(**{**REQUEST, "max_tokens": 5}), "no"
            ):
                pass
            refusal = "not refused"
        except ValueError as error:
            refusal = f"{type(error).__name__}: {error}"
    finally:
        engine.shutdown()
    results = Results(
        dict(zip(names, streams)), lengths, [first, again], count, after.whole, refusal
    )
    target.write_bytes(pickle.dumps(dataclasses.asdict(results)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
