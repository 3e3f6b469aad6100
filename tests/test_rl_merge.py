"""LoRA adapters become folders that the evaluation and stock vLLM take."""

from pathlib import Path

import peft
import pytest
import torch
from rl_fixtures import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer.eval import checkpoints
from trainer.merge import main

model = pytest.fixture(tiny_model, scope="module")
IDS = torch.arange(2, 12)[None]  # [1, T]


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    adapted.save_pretrained(tmp_path / "best")
    return tmp_path / "best"


def test_the_merged_model_computes_what_base_and_adapter_do(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    assert main([str(adapter), str(tmp_path / "new" / "merged")]) == 0
    base = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        plain = base(IDS).logits
        want = peft.PeftModel.from_pretrained(base, str(adapter))(IDS).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "merged")(IDS).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (want - plain).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "merged").encode("a")


def test_the_evaluation_refuses_the_adapter_and_takes_the_merged_folder(
    adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"python -m trainer\.merge"):
        checkpoints.parse([f"soft={adapter}"], None)
    assert main([str(adapter), str(tmp_path / "merged")]) == 0
    assert checkpoints.parse([f"soft={tmp_path / 'merged'}"], None)[0].training == "soft"


def test_weights_keep_the_base_models_type(model: Path, adapter: Path, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "half")
    given = [str(adapter), str(tmp_path / "out"), "--base", str(tmp_path / "half")]
    assert main(given) == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_what_cannot_be_merged_is_refused(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, words in (
        ([str(model), str(tmp_path / "x")], "no LoRA adapter"),
        ([str(adapter), str(model)], "exists"),
        ([str(adapter), str(tmp_path / "x"), "--base", str(tmp_path / "none")], "--base"),
    ):
        assert main(given) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
