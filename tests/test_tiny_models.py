"""The tiny models of ``tiny_models.py`` are what the other tests take them for."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_models import SPECIAL_TOKENS, VOCAB_SIZE, tiny_gemma, tiny_llama, tiny_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS = {
    "llama_tied": partial(tiny_llama, tied=True),
    "llama_untied": partial(tiny_llama, tied=False),
    "qwen3": tiny_qwen3,
    "gemma": tiny_gemma,
}
TEXTS = ["The final answer is:", "What is 12 + 345?", "Éa ☃ quick brown fox jumps\nover x^2"]


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return KINDS[kind](tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def logits_of(model, tokenizer, text: str) -> torch.Tensor:
    return model(tokenizer(text, return_tensors="pt").input_ids).logits[0]


def test_every_text_round_trips(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_ids_to_tokens(range(4)) == list(SPECIAL_TOKENS)
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])  # there are merges
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>Hi<|eos|><|assistant|>"


def test_the_weights_load_in_float32_and_are_tied_as_asked(model, kind):
    assert model.dtype == torch.float32
    assert model.config.vocab_size == VOCAB_SIZE and VOCAB_SIZE % 64
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (kind in ("llama_tied", "gemma"))


def test_the_next_token_is_neither_uniform_nor_certain(model, tokenizer):
    for text in TEXTS:
        logp = logits_of(model, tokenizer, text).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        print(f"entropy {entropy.min():.2f} to {entropy.max():.2f}, mean {entropy.mean():.2f}")
        assert entropy.min() > 1 and entropy.max() < 5
        best, second = logp.topk(2).values.unbind(-1)
        # float32 engines differ by 1e-5 or so: a greedy choice must not hang on that.
        assert (best - second).min() > 5e-4


def test_the_next_token_depends_on_the_whole_context(model, tokenizer):
    text = TEXTS[1]
    changed = logits_of(model, tokenizer, "T" + text[1:])[-1]
    assert (changed - logits_of(model, tokenizer, text)[-1]).abs().max() > 0.1


def test_greedy_decoding_does_not_repeat_one_token(model, tokenizer):
    prompt = tokenizer(TEXTS[0], return_tensors="pt")
    out = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    assert len(set(out[0, prompt.input_ids.shape[1] :].tolist())) >= 8


def test_the_same_seed_gives_the_same_model(kind, model, tmp_path):
    again = AutoModelForCausalLM.from_pretrained(KINDS[kind](tmp_path))
    other = AutoModelForCausalLM.from_pretrained(KINDS[kind](tmp_path / "other", seed=1))
    for a, b, c in zip(model.parameters(), again.parameters(), other.parameters()):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_gemma_multiplies_its_embedding(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_gemma(tmp_path)).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden = model.model(ids, output_hidden_states=True).hidden_states[0]
    assert torch.allclose(hidden, 8 * model.model.embed_tokens.weight[ids])
