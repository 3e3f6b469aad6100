"""Entry point `vllm.general_plugins: softvllm`: loaded by vLLM in each of its processes."""

from __future__ import annotations

import logging


def register() -> None:
    """Apply the seams. On another vLLM release: warn and leave vLLM alone.

    Enabling softvllm on such a release fails with a clear error (`softvllm.LLM` checks), but a
    stock vLLM that merely shares the environment must keep working.
    """
    from softvllm.core import policies
    from softvllm.engine import compat

    policies.load_entry_points()
    try:
        compat.apply()
    except compat.UnsupportedVllmError as error:
        logging.getLogger("softvllm").warning("softvllm is inactive: %s", error)
