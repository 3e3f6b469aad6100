"""A llama-architecture GGUF file as a Hugging Face model folder with bf16 weights.

Written out here because transformers' own GGUF route loses the tokenizer's digit splitting
(see :mod:`softvllm.models.gguf_tokenizer`). The tensor names and the order of the q/k rows are
those of llama.cpp's ``convert_hf_to_gguf.py`` (class ``LlamaModel``), read backwards.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file

from softvllm.models.gguf_tokenizer import write_tokenizer

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf_llama(gguf_path: Path, folder: Path) -> None:
    """Write the model of ``gguf_path`` to ``folder``: configs, bf16 weights and tokenizer."""
    reader = GGUFReader(str(gguf_path))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ValueError(f"{gguf_path} holds a '{architecture}' model; only llama is converted.")
    folder.mkdir(parents=True)
    config = llama_config(metadata)
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name.endswith("q_proj.weight"):
            values = unpermute_rows(values, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            values = unpermute_rows(values, config["num_key_value_heads"])
        # A copy: the values may be a view of the memory-mapped file, in its read-only memory.
        weights[name] = torch.tensor(values).to(torch.bfloat16).contiguous()
    # llama.cpp stores no output matrix where it is the embedding itself.
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _ids(metadata))
    weights_path = folder / "model.safetensors"
    save_file(weights, str(weights_path), metadata={"format": "pt"})
    # save_file lets only the owner read; a cache that several people share needs the usual mode.
    weights_path.chmod((folder / "config.json").stat().st_mode & 0o777)
    write_tokenizer(metadata, folder)


def llama_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The ``LlamaConfig`` fields that the GGUF metadata determine."""
    if any(name.startswith("llama.rope.scaling.") for name in metadata):
        raise ValueError("This GGUF file scales its rotary embedding, which is not converted.")
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata["llama.embedding_length"] // heads,
        "max_position_embeddings": metadata["llama.context_length"],
        # float32 in the file: 9.999999747378752e-06 was 1e-05 before it was stored.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        # The older spelling, which both transformers 4 and 5 (and vLLM through them) read.
        "rope_theta": metadata["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        **_ids(metadata),
    }


def hf_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown one is refused, never left out."""
    if gguf_name in GLOBAL_NAMES:
        return GLOBAL_NAMES[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in BLOCK_NAMES:
        raise ValueError(f"The GGUF file has a tensor that is not converted: {gguf_name}")
    return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.weight"


def unpermute_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the q and k rows.

    Within a head of size d, llama.cpp rotates the rows 2i and 2i+1 together, Hugging Face the
    rows i and i+d/2. ``LlamaModel.permute`` in llama.cpp's converter maps [head, 2, d/2] to
    [head, d/2, 2]; this maps it back.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _ids(metadata: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
