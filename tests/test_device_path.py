"""The CUDA path on a CPU: Triton kernels interpreted, and a host that knows phases late.

`DeviceOps` never reads device state; which rows may think or answer follows from results that
already came back. Here it is forced onto CPU tensors, so that both the kernels and that
bookkeeping run in real engines, sync and async.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import v2_on_cpu
from engine_harness import Engine, Sample
from traces import calm_llama

from softvllm import soft_params


def force_device_ops(llm: Any) -> None:
    """Run in the engine process: swap the ops of its one worker."""
    from softvllm.engine.ops import DeviceOps

    core(llm).ops = DeviceOps()


def force_host_ops(llm: Any) -> None:
    from softvllm.engine.ops import HostOps

    core(llm).ops = HostOps()


def core(llm: Any) -> Any:
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.softvllm_core


def check_finish_kernel() -> None:
    """Random states, many rows: the one-launch kernel equals the plain-torch reference."""
    import torch

    from softvllm.core import policies
    from softvllm.core.params import MAX_END_LENGTH
    from softvllm.core.phases import SlotState
    from softvllm.core.resolve import ResolvedCoT
    from softvllm.core.think import ThinkStep
    from softvllm.engine import finish, triton_finish

    def random_cot(rng: np.random.Generator) -> ResolvedCoT:
        def ids(low: int, high: int) -> list[int]:
            return rng.integers(0, 6, rng.integers(low, high)).tolist()

        return ResolvedCoT(
            policy="soft",
            policy_values=[0.0] * policies.NUM_PARAMS,
            num_extra=0,
            tau=0.5,
            gamma=0.33,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            seed=1,
            max_think=int(rng.integers(0, 9)),
            min_think=int(rng.integers(0, 4)),
            cold_entropy=float(rng.choice([0.0, 0.5, 2.0])),
            cold_steps=int(rng.integers(1, 4)),
            end_sequences=[ids(1, 4) for _ in range(rng.integers(0, 3))],
            after_end=ids(0, 3),
            after_cut=ids(0, 4),
            stop_ids=[7, 5][: rng.integers(0, 3)],
            greedy_answer=False,
            answer_max=0,
            record="steps",
            record_top=8,
            mode="soft",
            nonce=0,
        )

    rng = np.random.default_rng(0)
    for _ in range(6):
        count = 12
        slots = rng.permutation(16)[:count]
        cots = [random_cot(rng) for _ in range(count)]
        states = [SlotState(16, "cpu") for _ in range(2)]
        flags = [torch.zeros(20, dtype=torch.bool) for _ in range(2)]
        for state in states:
            for slot, cot in zip(slots, cots):
                state.set_request(int(slot), cot)
        for t in range(14):
            rows = rng.permutation(20)[:count]
            thinks = np.flatnonzero(rng.random(count) < 0.9) if t else np.arange(count)
            thinks = rng.permutation(thinks)
            think_at = np.full(count, -1)
            think_at[thinks] = np.arange(len(thinks))
            # A row that thinks must have a think step: only others may be left out.
            phase = states[0].dyn[torch.from_numpy(slots), SlotState.PHASE].numpy()
            missing = np.flatnonzero((think_at < 0) & (phase == 1))
            think_at[missing] = len(thinks) + np.arange(len(missing))
            total = len(thinks) + len(missing)
            step = ThinkStep(
                token=torch.from_numpy(rng.integers(0, 8, total)),
                soft=torch.from_numpy(rng.random(total) < 0.5),
                sampled=torch.from_numpy(rng.random(total) < 0.5),
                log_prob=torch.from_numpy(rng.normal(size=total).astype(np.float32)),
                entropy=torch.from_numpy(rng.uniform(0, 3, total).astype(np.float32)),
                mean=torch.zeros(0),
                state=torch.from_numpy(rng.normal(size=(total, 2)).astype(np.float32)),
            )
            answer_at = torch.from_numpy(rng.permutation(count))
            answer = torch.from_numpy(rng.integers(0, 8, count))
            log_prob = torch.from_numpy(rng.normal(size=count).astype(np.float32))
            done, tokens = [], []
            for which, run in enumerate((finish.finish, triton_finish.finish)):
                batch = torch.arange(100, 120)
                inputs = finish.FinishInputs(
                    state=states[which],
                    rows=torch.from_numpy(rows),
                    slots=torch.from_numpy(slots),
                    position=torch.full((count,), t),
                    think_at=torch.from_numpy(think_at),
                    think=step if total else None,
                    answer_at=answer_at,
                    answer_token=answer,
                    answer_log_prob=log_prob,
                    tokens=batch,
                    is_soft=flags[which],
                )
                done.append(run(inputs))
                tokens.append(batch)
            assert torch.equal(tokens[0], tokens[1]), (t, tokens)
            for name in ("ints", "floats", "policy_state"):
                assert torch.equal(getattr(done[0], name), getattr(done[1], name)), (t, name)
            for name in ("dyn", "tail", "policy_state"):
                assert torch.equal(getattr(states[0], name), getattr(states[1], name)), (t, name)
            assert torch.equal(flags[0], flags[1])
        assert states[0].tail.shape[1] == MAX_END_LENGTH


def test_the_finish_kernel_equals_its_torch_reference() -> None:
    code = "import test_device_path as t; t.check_finish_kernel(); print('equal')"
    env = v2_on_cpu.v2_env()
    env["PYTHONPATH"] += f":{Path(__file__).resolve().parent}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-3000:]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calm_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[Engine]:
    options: dict[str, Any] = {"async_scheduling": request.param, "max_num_seqs": 8}
    with Engine(model, runner="v2", **options) as running:
        yield running


REQUESTS = [
    ([5, 6, 7, 8], {"mode": "soft", "record": "dense"}),
    ([9, 8, 7], {"mode": "fuzzy", "top_k": 8, "record": "sparse"}),
    ([9, 8, 7], {"mode": "hard", "force_after_cut": ()}),
    ([40, 41], {"mode": "mixed", "policy": "blend", "record": "dense"}),
    ([40, 41], {"mode": "soft", "max_think_tokens": 3, "force_after_cut": (11,)}),
    ([40, 41], {"mode": "mixed", "policy": "interleave", "force_after_cut": (11, 12)}),
]


def run(engine: Engine) -> list[Sample]:
    params = [
        soft_params(
            **{"seed": i, "max_think_tokens": 8, "max_tokens": 24, "temperature": 0.7, **fields}
        )
        for i, (_, fields) in enumerate(REQUESTS)
    ]
    return [s[0] for s in engine.generate([p for p, _ in REQUESTS], params)]


@pytest.mark.engine
def test_a_host_that_learns_phases_late_decodes_the_same_traces(engine: Engine) -> None:
    engine.call("test_device_path:force_host_ops")
    expected = run(engine)
    engine.call("test_device_path:force_device_ops")
    got = run(engine)
    for want, have in zip(expected, got):
        assert have.token_ids == want.token_ids
        assert (have.trace.kind == want.trace.kind).all()
        assert (have.trace.phase == want.trace.phase).all()
        np.testing.assert_allclose(have.trace.log_prob, want.trace.log_prob, atol=1e-4)
        if want.trace.dense is not None:
            assert have.trace.dense is not None
            scale = want.trace.meta["sigma"]
            assert np.abs(have.trace.dense - want.trace.dense).max() < 1e-3 * scale
