"""Peak memory of one gradient: `python -m trainer.bench_memory fused|plain --replay DIR [flags]`.

A process of its own per case; the flags are those of trainer.rl. How far a gradient over a recorded
step raises the process's memory (on CUDA: the device's) above weights and gradients.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from trainer import config_file, head_reference, records, setup
from trainer.checkpoint import State
from trainer.config import Config
from trainer.episodes import Episode
from trainer.learn import Learner, Prepared
from trainer.load import with_folder
from trainer.objective import Normaliser
from trainer.ranks import Ranks


def head_case(kind: str, folder: Path, flags: list[str]) -> dict[str, float]:
    """One case on the step recorded in `folder`/tape."""
    words = [kind, *flags, "--replay", str(folder / "tape"), "--steps", "1"]
    words += ["--run", str(folder / f"head_{kind}")]
    command = [sys.executable, "-m", "trainer.bench_memory", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the memory case {kind} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_memory(config: Config, kind: str) -> dict[str, float]:
    """MiB and seconds of a gradient with the fused or the plain head."""
    if kind == "plain":
        from trainer import head

        plain: Any = head_reference
        head.soft_mean, head.token_log_prob = plain.soft_mean, plain.token_log_prob
    with ExitStack() as stack:
        learner = setup.gather(config, Ranks(), State("bench"), stack).learner
        samples = records.read(Path(str(config.replay)), 0).samples
        episodes, kept, _ = learner.read(samples)
        gain = torch.tensor([1.0 if samples[i].sample % 2 else -1.0 for i in kept])
        data = prepared_of(learner, episodes, gain)
        learner.gradient(data)  # gradients exist before the mark
        gc.collect()
        cuda = learner.device.type == "cuda"
        before = _mark(cuda)
        start = time.perf_counter()
        learner.gradient(data)
        seconds = time.perf_counter() - start
        peak = _peak(cuda)
    return {
        "rise_mib": round(peak - before, 1),
        "peak_mib": round(peak, 1),
        "seconds": round(seconds, 3),
        "largest_batch_rows": max(part.batch.num_rows for part in data.batches),
    }


def prepared_of(learner: Learner, episodes: list[Episode], gain: torch.Tensor) -> Prepared:
    """Training data of all episodes, whatever their advantage."""
    rows = sum(e.num_inputs for e in episodes)
    return Prepared(gain, learner.batches(episodes, gain), Normaliser.of(episodes), 0, 1, rows)


def _mark(cuda: bool) -> float:
    """Begin a new peak; MiB in use now."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    return _status("VmRSS")


def _peak(cuda: bool) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if cuda else _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("fused", "plain"):
        sys.exit("usage: python -m trainer.bench_memory fused|plain --replay DIR [flags]")
    print(json.dumps(peak_memory(with_folder(config_file.parse(sys.argv[2:])), sys.argv[1])))
