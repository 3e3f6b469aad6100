"""Imported by every Python process whose PYTHONPATH holds this folder: applies
the patches of ``tests/v2_on_cpu.py`` that SOFTVLLM_TEST_V2 and
SOFTVLLM_TEST_ASYNC ask for. Does nothing, and imports nothing, without them."""

import os

if os.environ.get("SOFTVLLM_TEST_V2") == "1" or os.environ.get("SOFTVLLM_TEST_ASYNC") == "1":
    import importlib.util
    from pathlib import Path

    _path = Path(__file__).resolve().parent.parent / "v2_on_cpu.py"
    _spec = importlib.util.spec_from_file_location("v2_on_cpu", _path)
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    _module.activate_from_environment()
