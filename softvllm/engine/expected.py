"""Which tensors the served model takes, and whether a folder of weights has exactly those."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from softvllm.core.weight_folder import DTYPES, TensorEntry, WeightFolder, open_file, read_header
from softvllm.engine.update import BACKEND

OUTPUT = "lm_head.weight"
"""Name of the output weights, which checkpoints of tied models may hold or leave out."""
_FLOATS = ("F32", "F16", "BF16")
_SHOWN = 5


def served_tensors(vllm_config: Any) -> dict[str, TensorEntry]:
    """Names, shapes and dtypes of the checkpoint the server was started from.

    vLLM fuses and renames parameters, so its own names say little about a checkpoint's.

    Raises:
        ValueError: the model was not loaded from safetensors files.
    """
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = get_model_loader(vllm_config.load_config)
    files: list[str] = []
    if isinstance(loader, DefaultModelLoader):
        model = vllm_config.model_config
        _, files, usable, _ = loader._prepare_weights(
            model.model,
            subfolder=None,
            revision=model.revision,
            fall_back_to_pt=False,
            allow_patterns_overrides=None,
        )
        files = files if usable else []
    if not files:
        raise ValueError(
            f"weight transfer with back-end {BACKEND} needs a model loaded from safetensors files, "
            f"to know which tensors to expect; {vllm_config.model_config.model} (load format "
            f"{vllm_config.load_config.load_format}) is not. Save it with save_pretrained first"
        )
    found: dict[str, TensorEntry] = {}
    for file in files:
        with open_file(Path(file)) as handle:
            found.update(read_header(handle, file))
    return found


def compare(
    expected: Mapping[str, TensorEntry],
    found: Mapping[str, TensorEntry],
    served: torch.dtype,
    tied: bool,
) -> tuple[list[str], int]:
    """What is wrong with the tensors found (empty: nothing), and how many will be rounded.

    A dtype fits if it is the served model's or the started checkpoint's, or float32 for a model
    served in half precision. Output weights tied to the embedding may be there or not, and so may
    the rotary frequencies of old checkpoints, which no engine reads.
    """
    served_name = next(name for name, dtype in DTYPES.items() if dtype == served)

    def optional(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (tied and name == OUTPUT)

    missing = [n for n in expected if n not in found and not optional(n)]
    extra = [n for n in found if n not in expected and not optional(n)]
    shapes, dtypes, narrowed = [], [], 0
    for name, entry in found.items():
        wanted = expected.get(name)
        if wanted is None:
            continue
        if entry.shape != wanted.shape:
            shapes.append(f"{name} is {list(entry.shape)} instead of {list(wanted.shape)}")
        as_served = entry.dtype in (served_name, "F32") and wanted.dtype in _FLOATS
        if entry.dtype != wanted.dtype and not as_served:
            dtypes.append(f"{name} is {entry.dtype} instead of {wanted.dtype}")
        narrowed += entry.dtype == "F32" and served_name in ("BF16", "F16")
    problems = []
    for what, items in (
        ("missing", missing),
        ("not in the model", extra),
        ("wrong shape", shapes),
        ("wrong dtype", dtypes),
    ):
        if items:
            more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
            problems.append(f"{what}: {', '.join(items[:_SHOWN])}{more}")
    return problems, narrowed


def tied_mismatch(folder: WeightFolder, expected: Mapping[str, TensorEntry]) -> list[str]:
    """Output weights of a tied model must be the embedding, since they are not loaded."""
    output = folder.entries[OUTPUT]
    twins = [n for n in expected if n.endswith(("embed_tokens.weight", "wte.weight"))]
    if len(twins) != 1:
        return [f"{OUTPUT} cannot be told from the embedding it is tied to; leave it out"]
    twin = folder.entries[twins[0]]
    same = (output.shape, output.dtype) == (twin.shape, twin.dtype)
    if same:
        raw = folder.read(OUTPUT).view(torch.uint8), folder.read(twins[0]).view(torch.uint8)
        same = torch.equal(*raw)
    if same:
        return []
    return [f"{OUTPUT} differs from {twins[0]}, but the served model ties them; leave it out"]
