"""Every runner and scheduler that ``v2_on_cpu`` offers is really used, and all
give the same greedy tokens for a tiny random Llama."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from v2_on_cpu import v1_env, v2_env

V1 = "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
V2 = "vllm.v1.worker.cpu.model_runner.CPUModelRunner"

# name: environment, runner class, async scheduling, tensor parallel size
CASES = {
    "v1-sync": (v1_env(False), V1, False, 1),
    "v1-async": (v1_env(True), V1, True, 1),
    "v2-sync": (v2_env(False), V2, False, 1),
    "v2-async": (v2_env(True), V2, True, 1),
    "v2-sync-tp2": (v2_env(False, tp=2), V2, False, 2),
}

# Runs in the subprocess. The runner is looked up inside the worker, so that the
# tensor parallel case, whose workers are processes of their own, is covered too.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams


def runner_class(worker):
    cls = type(worker.model_runner)
    return f"{cls.__module__}.{cls.__qualname__}"


if __name__ == "__main__":
    model, tp = sys.argv[1], int(sys.argv[2])
    llm = LLM(model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
              max_model_len=128, max_num_seqs=4, kv_cache_memory_bytes=16 << 20,
              tensor_parallel_size=tp)
    prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (4, 9, 17)]
    outs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True,
                                                detokenize=False), use_tqdm=False)
    core = llm.llm_engine.engine_core.engine_core
    print("RESULT " + json.dumps({
        "tokens": [list(o.outputs[0].token_ids) for o in outs],
        "runners": llm.collective_rpc(runner_class),
        "async": core.vllm_config.scheduler_config.async_scheduling,
        "scheduler": type(core.scheduler).__name__,
        "queue": getattr(core, "batch_queue_size", 0),
    }))
"""


def build_model(path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        torch_dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(path)


def run_case(name, folder):
    env, _, _, tp = CASES[name]
    # In-process engine core, so that the script can look into it; function
    # pickling lets collective_rpc carry ``runner_class`` to worker processes.
    env = env | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "HF_HUB_OFFLINE": "1",
    }
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(folder / "model"), str(tp)],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{name}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT ")) | {"seconds": time.perf_counter() - start}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v2_on_cpu")
    build_model(folder / "model")
    (folder / "script.py").write_text(SCRIPT)
    jobs = max(1, min(2, os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(CASES, pool.map(lambda name: run_case(name, folder), CASES)))


@pytest.mark.parametrize("name", CASES)
def test_runner_and_tokens(results, name):
    _, runner, is_async, tp = CASES[name]
    got = results[name]
    print(f"{name}: {got['seconds']:.1f} s")
    assert got["runners"] == [runner] * tp
    assert got["async"] is is_async
    assert got["scheduler"] == ("AsyncScheduler" if is_async else "Scheduler")
    assert got["queue"] == (2 if is_async else 1)
    assert got["tokens"] == results["v1-sync"]["tokens"]
    # A model that repeats one token would hide errors in positions and in the cache.
    assert all(len(set(tokens)) > 3 for tokens in got["tokens"])
