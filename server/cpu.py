"""Making a CPU server start on the machine it is on: memory and compiler."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30
MAX_KV_CACHE = 4 * GIB
"""KV cache of a server that was not told otherwise. vLLM's own default on a CPU is 92 % of the
machine, and it refuses to start where that much is not free."""
MIN_KV_CACHE = GIB // 4
OVERHEAD = int(1.5 * GIB)
"""Memory of vLLM's processes beside weights and KV cache (measured on SmolLM2: 1.3 GiB)."""


COMPILE_FLAGS = ("--no-enforce-eager", "-O", "-cc", "--compilation-config", "--optimization-level")
"""Who gives one of these wants the model compiled. Prefixes: `-O3`, `-cc.mode=3`."""


def fit(args: Any, words: Sequence[str], say: Callable[[str], None]) -> None:
    """Choose a KV cache that fits; run eagerly unless told otherwise.

    Args:
        args: vLLM's parsed arguments, changed in place.
        words: the command line they came from.

    Raises:
        ValueError: the model does not fit into memory, or it cannot be compiled.
    """
    wants_compile = any(word.replace("_", "-").startswith(COMPILE_FLAGS) for word in words)
    if not args.enforce_eager and not wants_compile:
        say("running without torch.compile, which starts sooner (--no-enforce-eager compiles)")
        args.enforce_eager = True
    elif not args.enforce_eager and not _has_compiler():
        raise ValueError(
            "torch.compile on a CPU needs a C++ compiler (Debian: apt install g++); install one or "
            "drop " + ", ".join(COMPILE_FLAGS)
        )
    from vllm.config import CacheConfig

    told = (
        args.kv_cache_memory_bytes is not None
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        or args.gpu_memory_utilization != CacheConfig.gpu_memory_utilization
    )
    available = available_memory()
    if told or available is None:
        return
    weights = weights_size(args.model_tag) * max(1, args.tensor_parallel_size)
    room = available - weights - OVERHEAD
    if room < MIN_KV_CACHE:
        needed = weights + OVERHEAD + MIN_KV_CACHE
        raise ValueError(
            f"too little memory: {available / GIB:.1f} GiB are available, the model needs about "
            f"{needed / GIB:.1f} GiB; free some, choose a smaller model, or set "
            "--kv-cache-memory-bytes if you know better"
        )
    args.kv_cache_memory_bytes = min(MAX_KV_CACHE, room // 2)
    say(
        f"KV cache of {args.kv_cache_memory_bytes / GIB:.1f} GiB "
        "(--kv-cache-memory-bytes or VLLM_CPU_KVCACHE_SPACE change it)"
    )


def available_memory() -> int | None:
    """Bytes that processes can still get; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limit = _cgroup_room()
    return min([*found, *([] if limit is None else [limit])], default=None)


def _cgroup_room() -> int | None:
    """What a container's limit leaves (cgroup v2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # File pages count as used, but make room when asked.
    return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))


def weights_size(model: str | None) -> int:
    """Bytes of the checkpoint's files; 0 where the model is not a folder on this machine."""
    if model is None or not Path(model).is_dir():
        return 0
    return sum(f.stat().st_size for f in Path(model).glob("*.safetensors"))


def _has_compiler() -> bool:
    names = ("g++", "c++", "clang++", os.environ.get("CXX", ""))
    return any(name and shutil.which(name) for name in names)
