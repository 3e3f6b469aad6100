"""Functions that tests run inside an engine process: ``engine.call("engine_probe:state")``.

They take the ``LLM`` first and need its engine core in the same process.
"""

from __future__ import annotations

from typing import Any


def core_of(llm: Any) -> Any:
    """The in-process engine core."""
    return llm.llm_engine.engine_core.engine_core


def soft_core(llm: Any) -> Any:
    """The worker's `SoftCore`."""
    return core_of(llm).model_executor.driver_worker.worker.model_runner.softvllm_core


def settle(llm: Any) -> None:
    """Let the worker hear of requests that ended: it learns that with the step after."""
    core = core_of(llm)
    while core.scheduler.has_requests():
        core.step_fn()


def state(llm: Any) -> dict[str, int]:
    """What requests hold right now, in all three layers."""
    core, soft = core_of(llm), soft_core(llm)
    return {
        "scheduled": len(core.scheduler.requests),
        "front": len(llm.llm_engine.output_processor.request_states),
        "held_bytes": core.scheduler.softvllm_held_bytes(),
        "worker_requests": len(soft.requests),
        "free_slots": len(soft.free_slots),
        "slots": soft.max_num_reqs,
        "soft_rows": int(soft.buffers.is_soft.sum()),
    }


def settled_state(llm: Any) -> dict[str, int]:
    settle(llm)
    return state(llm)


def beam_search(llm: Any, params: Any) -> None:
    llm.beam_search([{"prompt_token_ids": [5, 6, 7]}], params)


def abort_midway(llm: Any, params: list[Any], steps: int) -> tuple[dict, dict]:
    """Start requests, run a few steps, abort them all: what they held before and after."""
    engine = llm.llm_engine
    ids = [
        engine.add_request(f"abort-{i}", {"prompt_token_ids": [5, 6, 7, 8 + i]}, p)
        for i, p in enumerate(params)
    ]
    for _ in range(steps):
        engine.step()
    before = state(llm)
    engine.abort_request(ids, internal=True)
    return before, settled_state(llm)


def has_nan(llm: Any, prompt: list[int], params: Any) -> bool:
    """`cot.has_nan` of one request."""
    (output,) = llm.generate([{"prompt_token_ids": prompt}], [params], use_tqdm=False)
    return output.outputs[0].cot.has_nan


def set_norm(llm: Any, value: float | None) -> None:
    """Overwrite the last norm's first weight; None puts the old value back."""

    def change(model: Any) -> None:
        weight = model.model.norm.weight
        if value is None:
            weight.data[0] = model.softvllm_test_kept
        else:
            model.softvllm_test_kept = float(weight[0])
            weight.data[0] = value

    llm.apply_model(change)


def reload_weights(llm: Any, path: str | None = None) -> None:
    """vLLM's own way to change weights in place."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    llm.reset_prefix_cache()


def reload_midway(llm: Any, params: Any, steps: int, path: str) -> bytes:
    """One request whose weights change after some steps: its encoded trace."""
    from softvllm.core.trace import encode

    engine = llm.llm_engine
    engine.add_request("reload", {"prompt_token_ids": [5, 6, 7, 8]}, params)
    for _ in range(steps):
        engine.step()
    reload_weights(llm, path)
    done: list[Any] = []
    while engine.has_unfinished_requests():
        done += [o for o in engine.step() if o.finished]
    return encode(done[0].outputs[0].cot.trace)


def sleep_and_wake(llm: Any) -> None:
    llm.sleep(level=1)
    llm.wake_up()


def compilation_mode(llm: Any) -> str:
    """Name of the mode in force; NONE is eager."""
    return core_of(llm).vllm_config.compilation_config.mode.name
