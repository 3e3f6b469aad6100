"""Run vLLM's V2 model runner (the CUDA code path) on a CPU-only install.

V2 needs Triton, and the PyPI triton has no CPU backend. Triton's interpreter runs the
kernels in numpy: set ``TRITON_INTERPRET=1`` before triton is imported, and register the
backend "cpu" that vLLM looks for. Async scheduling is a separate switch: on a CPU one
assignment in ``CpuPlatform`` turns it off. Children inherit all of it::

    subprocess.run([sys.executable, "script.py"], env=v2_env(async_scheduling=True))

``PYTHONPATH`` then starts with ``tests/v2_site``, whose ``sitecustomize.py`` calls
``activate_from_environment()`` in every Python process. Only the standard library is
imported here: a patch waits until the module it patches is imported.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path

SITE_DIR = Path(__file__).resolve().parent / "v2_site"
TEST_V2, TEST_ASYNC = "SOFTVLLM_TEST_V2", "SOFTVLLM_TEST_ASYNC"


class _PatchAfterImport(importlib.abc.MetaPathFinder):
    """Calls ``patch(module)`` right after the module named ``name`` has run."""

    def __init__(self, name, patch):
        self.name, self.patch = name, patch

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), self.patch(module))
        return spec


def _patch_on_import(name, patch):
    """Register the patch once; say so when the module is imported already."""
    if any(isinstance(f, _PatchAfterImport) and f.name == name for f in sys.meta_path):
        return
    if name in sys.modules:
        raise RuntimeError(f"too late: {name} is imported already")
    sys.meta_path.insert(0, _PatchAfterImport(name, patch))


def _register_cpu_backend(triton_backends):
    from triton.backends.compiler import GPUTarget

    class Driver:
        """Never launches a kernel: answers what vLLM and inductor ask."""

        is_active = staticmethod(lambda: True)
        get_current_target = staticmethod(lambda: GPUTarget("cpu", 0, 1))

    class Compiler:
        """Never compiles: inductor generates C++ and wants a hash for its cache."""

        supports_target = staticmethod(lambda target: target.backend == "cpu")

        def __init__(self, target):
            pass

        def hash(self):
            return "interpreter"

    triton_backends.backends["cpu"] = triton_backends.Backend(Compiler, Driver)


def _top_k_top_p_in_torch(sampler_ops):
    """The interpreter cannot run this kernel: its ``tl.range`` yields plain ints."""
    sampler_ops.apply_top_k_top_p_triton = sampler_ops.apply_top_k_top_p_pytorch


def _splat_bools(interpreter):
    """Broadcasting a scalar comparison gives int32 in the interpreter, which no mask may
    be (structured output's kernel does it). Keep bool data bool."""
    original = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, ret_ty, arg):
        if arg.data.dtype == bool:
            arg = interpreter.TensorHandle(arg.data, interpreter.tl.int1)
        return original(self, ret_ty, arg)

    interpreter.InterpreterBuilder.create_splat = create_splat


def _keep_async_scheduling(cpu_platform):
    """Undo ``scheduler_config.async_scheduling = False``, nothing else."""
    original = cpu_platform.CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        resolved = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = resolved

    cpu_platform.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def enable_v2_on_cpu():
    """Make vLLM select the V2 runner in this process. Children need ``v2_env``."""
    if os.environ.get("TRITON_INTERPRET") != "1" and "triton" in sys.modules:
        raise RuntimeError("enable_v2_on_cpu(): too late, triton is imported already")
    _patch_on_import("triton.backends", _register_cpu_backend)
    _patch_on_import("triton.runtime.interpreter", _splat_bools)
    _patch_on_import("vllm.v1.sample.ops.topk_topp_sampler", _top_k_top_p_in_torch)
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def enable_async_on_cpu():
    """Keep async scheduling on (vLLM's default where it is supported) on a CPU."""
    _patch_on_import("vllm.platforms.cpu", _keep_async_scheduling)


def activate_from_environment():
    """What ``v2_site/sitecustomize.py`` runs in every process."""
    if os.environ.get(TEST_V2) == "1":
        enable_v2_on_cpu()
    if os.environ.get(TEST_ASYNC) == "1":
        enable_async_on_cpu()


def _env(v2, async_scheduling, tp):
    env = dict(os.environ)
    for name in ("TRITON_INTERPRET", "TORCHDYNAMO_DISABLE", "VLLM_USE_V2_MODEL_RUNNER"):
        env.pop(name, None)
    path = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p not in ("", str(SITE_DIR))]
    env["PYTHONPATH"] = os.pathsep.join([str(SITE_DIR), *path])
    env[TEST_V2], env[TEST_ASYNC] = str(int(v2)), str(int(async_scheduling))
    # Tiny models: one thread each, and one core per worker where there are several.
    env["OMP_NUM_THREADS"] = "1"
    env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(tp))) if tp > 1 else "nobind"
    env |= {"TRITON_INTERPRET": "1"} if v2 else {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    if v2 or tp > 1:  # nothing to gain from compiling; a test may set "0" again
        env["TORCHDYNAMO_DISABLE"] = "1"
    return env


def v2_env(async_scheduling: bool = False, tp: int = 1) -> dict[str, str]:
    """The environment of a subprocess which is to use V2 (``tp``: number of workers)."""
    return _env(True, async_scheduling, tp)


def v1_env(async_scheduling: bool = False, tp: int = 1) -> dict[str, str]:
    """The same for V1."""
    return _env(False, async_scheduling, tp)
