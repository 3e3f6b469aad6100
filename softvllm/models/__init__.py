"""Which model folder a model name stands for.

Model hubs cannot be assumed to be reachable, so the default model comes from a package registry
(see :mod:`softvllm.models.smollm2`). Every other name is left for vLLM and transformers to load.
"""

from __future__ import annotations

from collections.abc import Callable

DEFAULT_MODEL = "smollm2"


def resolve_model(name: str | None, progress: Callable[[str], None] = print) -> str:
    """Return what to hand to vLLM or transformers as the model.

    ``None`` and ``"smollm2"`` mean the default model, which is prepared on first use; anything
    else (a folder or a hub name) is returned unchanged.
    """
    if name is not None and name != DEFAULT_MODEL:
        return name
    # Imported here so that a user of another model does not need the conversion's packages.
    from softvllm.models.smollm2 import prepare

    return str(prepare(progress=progress))
