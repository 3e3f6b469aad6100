"""A LoRA adapter and its base model as one folder, which `trainer.eval` and stock vLLM take.

python -m trainer.merge runs/lora/best runs/lora/merged
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.checkpoint import save_model
from trainer.load import ADAPTER, folder_of
from trainer.setup import load_tokenizer


def merge(adapter: Path, out: Path, base: str | None = None) -> None:
    """Write the merged model: sums in float32, weights in the base model's type.

    Args:
        adapter: folder with `adapter_config.json`, such as `best/` of a run with `model.lora_rank`.
        out: a folder that does not exist yet.
        base: folder or name of the base model; None: the one that the adapter names.

    Raises:
        ValueError: no adapter, no base model, or `out` is there.
    """
    try:
        import peft
    except ImportError:
        raise ValueError("merging needs the package peft: pip install peft") from None
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = adapter / ADAPTER
    if not settings.is_file():
        raise ValueError(f"{adapter} is no LoRA adapter: it has no {ADAPTER}")
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder, or remove it")
    base = folder_of(base or json.loads(settings.read_text())["base_model_name_or_path"])
    try:
        stored = AutoConfig.from_pretrained(base).dtype or torch.float32
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"cannot load the base model {base!r}: {error}; give --base") from None
    merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(out, merged, load_tokenizer(base), stored)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.merge", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--base", help="base model; absent: the one that the adapter names")
    given = parser.parse_args(arguments)
    try:
        merge(given.adapter, given.out, given.base)
    except (ValueError, OSError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
