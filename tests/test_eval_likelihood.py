"""Likelihoods of choices and texts, and what they are bound to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_fixtures import other_model, tiny_model
from trainer_rollouts import single_thread
from transformers import AutoTokenizer

from trainer.eval import likelihood
from trainer.eval.__main__ import main
from trainer.eval.choice import Item
from trainer.eval.config import ModelConfig

threads = pytest.fixture(single_thread, autouse=True, scope="module")
model = pytest.fixture(tiny_model, scope="module")
other = pytest.fixture(other_model, scope="module")


@pytest.mark.parametrize(
    ("context", "choices", "merged"),
    [
        ("Question: how many apples?\nAnswer:", [" seven more", " 12", " the answer"], 0),
        ("Question: how many apples?\nAnswer:", ["x", "y"], 0),
        ("The capital and the ans", ["wer", " of France", "x"], 1),  # "answer" is a token
        ("Step by st", ["ep", "ep by step"], 2),
    ],
    ids=["words", "letters", "merged", "all-merged"],
)
def test_choices_have_the_likelihood_of_a_plain_forward_pass(
    model: Path, context: str, choices: list[str], merged: int
) -> None:
    loaded = likelihood.load_model(str(model), ModelConfig(device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    item = Item("a", context, choices, 0)
    row = likelihood.choice_row(loaded, tokenizer, item)
    alone = tokenizer(context)["input_ids"]
    starts = []
    for choice, found, tokens in zip(item.choices, row.log_likelihood, row.tokens):
        ids = tokenizer(context + choice)["input_ids"]
        # Up to where the text with the choice is read as the context alone is.
        start = max(n for n in range(len(alone) + 1) if ids[:n] == alone[:n])
        starts.append(start)
        with torch.no_grad():
            logits = loaded(torch.tensor([ids])).logits[0]
        logp = logits.log_softmax(-1)
        expected = sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids)))
        assert found == pytest.approx(expected, rel=1e-5)
        assert tokens == len(ids) - start
    assert sum(start < len(alone) for start in starts) == merged


def test_kl_is_that_of_the_definition_and_zero_for_the_model_itself(
    model: Path, other: Path
) -> None:
    config = ModelConfig(device="cpu")
    base, trained = (likelihood.load_model(str(m), config) for m in (model, other))
    ids = list(range(4, 84))
    row = likelihood.kl_row(trained, base, "0", ids)
    with torch.no_grad():
        p, q = (m(torch.tensor([ids])).logits[0, :-1].double().softmax(-1) for m in (base, trained))
    assert row.forward == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
    assert row.reverse == pytest.approx(float((q * (q / p).log()).sum()), rel=1e-4)
    target = torch.tensor(ids[1:])[:, None]
    assert row.nll == pytest.approx(-float(q.gather(1, target).log().sum()), rel=1e-5)
    assert row.tokens == 79
    same = likelihood.kl_row(base, base, "0", ids)
    assert abs(same.forward) < 1e-4 and same.nll == same.base_nll


def arguments_of(tmp_path: Path, *more: str) -> list[str]:
    """Five items, two texts."""
    items, text = tmp_path / "mc.jsonl", tmp_path / "text.txt"
    if not items.exists():
        rows = [
            {"question": f"q{i}", "choices": ["a b", "c", "d e f"], "answer": 1} for i in range(5)
        ]
        items.write_text("\n".join(map(json.dumps, rows)))
        text.write_text("One text, long enough.\n\nAnother text.\n")
    fixed = ["--out", str(tmp_path / "out"), "--model.device", "cpu", "--report.replicates", "50"]
    return [*fixed, "--choice.sets", f"own={items}", "--kl.texts", str(text), *more]


def test_likelihoods_need_no_server_and_are_not_made_twice(
    model: Path, other: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    points = ("--checkpoints", "none=served", f"soft={other}")
    arguments = arguments_of(tmp_path, "--model.path", str(model), *points)
    assert main(arguments) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(e["checkpoint"], e["items"]) for e in results["choice"]] == [("none", 5), ("soft", 5)]
    assert results["kl"][0]["kl"][0] == pytest.approx(0, abs=1e-6)
    assert results["kl"][1]["kl"][0] > 0.1
    assert "Out of domain" in (tmp_path / "out" / "tables.md").read_text()
    monkeypatch.setattr(likelihood, "load_model", None)  # would fail if it were needed
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_a_text_too_short_is_refused_before_any_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(likelihood, "load_model", None)
    arguments = arguments_of(tmp_path, "--model.path", str(model))
    (tmp_path / "text.txt").write_text("One text, long enough.\n\na\n")
    assert main(arguments) == 1
    assert "is shorter than two tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("points", "part", "words"),
    [
        (("hard={other}", "soft={model}"), "--kl.texts", "measures from the base model"),
        (("none=served", "hard={other}"), "--choice.sets", "(served) need its folder"),
        (("none=served", "hard={other}"), "--kl.texts", "give --model.path"),
    ],
    ids=["kl", "served", "both"],
)
def test_no_trained_checkpoint_stands_in_for_the_base_model(
    model: Path, other: Path, tmp_path: Path, capsys: Any, points: Any, part: str, words: str
) -> None:
    arguments = arguments_of(tmp_path)
    at = arguments.index("--kl.texts" if part == "--choice.sets" else "--choice.sets")
    del arguments[at : at + 2]
    given = [point.format(model=model, other=other) for point in points]
    assert main([*arguments, "--checkpoints", *given]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "likelihood").exists()


def test_a_folder_tagged_none_is_the_base_model_wherever_it_stands(
    model: Path, other: Path, tmp_path: Path
) -> None:
    arguments = arguments_of(tmp_path, "--checkpoints", f"soft={other}", f"none={model}")
    assert main(arguments) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["likelihood"]["base"]["model"] == str(model)
    by_name = {entry["checkpoint"]: entry for entry in results["kl"]}
    assert by_name["none"]["kl"][0] == pytest.approx(0, abs=1e-6)
    assert by_name["soft"]["kl"][0] > 0.1


def test_results_name_the_base_model_as_it_was_given(
    model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(model.parent)
    for given in (("--model.path", model.name), ("--checkpoints", f"none={model.name}")):
        where = tmp_path / given[0].strip("-")
        where.mkdir()
        assert main(arguments_of(where, *given)) == 0
        text = (where / "out" / "results.json").read_text()
        assert json.loads(text)["likelihood"]["base"]["model"] == model.name
        assert str(model.parent) not in text


@pytest.mark.parametrize("part", ["items", "gold", "text", "base", "base-of-choice"])
def test_likelihoods_of_other_content_or_another_base_are_not_mixed(
    model: Path, other: Path, tmp_path: Path, capsys: Any, part: str
) -> None:
    point = "none=served" if part == "base-of-choice" else f"soft={other}"
    arguments = arguments_of(tmp_path, "--checkpoints", point)
    if part == "base-of-choice":
        at = arguments.index("--kl.texts")
        del arguments[at : at + 2]
    assert main([*arguments, "--model.path", str(model)]) == 0
    items, text, base = tmp_path / "mc.jsonl", tmp_path / "text.txt", model
    if part == "items":
        items.write_text(items.read_text().replace("d e f", "d e g"))
    elif part == "gold":
        items.write_text(items.read_text().replace('"answer": 1', '"answer": 2', 1))
    elif part == "text":
        text.write_text(text.read_text().replace("Another", "A third"))
    else:
        base = other
    assert main([*arguments, "--model.path", str(base)]) == 1
    error = capsys.readouterr().err
    assert "was made with other settings" in error and "another --out" in error


def test_more_items_of_the_same_set_are_added(model: Path, tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, "--model.path", str(model))
    assert main([*arguments, "--choice.limit", "2", "--kl.limit", "1"]) == 0
    file = tmp_path / "out" / "likelihood" / "none" / "choice-own.jsonl"
    before = file.read_text()
    assert main(arguments) == 0
    assert file.read_text().startswith(before) and len(file.read_text().splitlines()) == 6
