"""Configurations: TOML, command line, contradictions; data, prompts and the order of problems."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from trainer import config_file, data
from trainer.agreement import Agreement
from trainer.config import (
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    PromptConfig,
)
from trainer.config_file import from_mapping, parse, to_toml
from trainer.data import Problem, Problems
from trainer.eval.checkpoints import base_of
from trainer.load import with_folder
from trainer.logging import Journal
from trainer.optim import learning_rate
from trainer.probe import compare, gap_limit
from trainer.rewards.pool import RewardPool
from trainer.setup import IDENTITY, require_same_problems
from trainer.templates import ids_of, text_of

PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
OVERLAYS = [path for path in PRESETS if path.stem in ("smollm2_cpu_soft", "smollm2_cpu_fuzzy")]
PRESETS = [path for path in PRESETS if path not in OVERLAYS]


def test_the_default_model_is_named_as_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.load.resolve_model", lambda name, progress: f"/made/{name}")
    default = Config(model=ModelConfig(path="smollm2"))
    assert with_folder(default).model.path == "/made/smollm2"
    assert base_of("smollm2", []) == "/made/smollm2"  # of an evaluation
    other = Config(model=ModelConfig(path="/elsewhere"))
    assert with_folder(other) is other


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_is_complete_but_for_model_and_server(path: Path) -> None:
    config = parse(
        ["--config", str(path), "--rollout-url", "http://127.0.0.1:1", "--model.path", "m"]
    )
    config.check()


def test_several_files_lie_over_one_another(tmp_path: Path) -> None:
    below, above = tmp_path / "a.toml", tmp_path / "b.toml"
    below.write_text("steps = 7\n[rollout]\nprompts = 3\n[rollout.cot]\ntop_k = 5\n")
    above.write_text("[rollout]\nsamples = 4\n[rollout.cot]\nnoise_scale = 0.5\n")
    files = ["--config", str(below), f"--config={above}", "--dry-run"]
    config = parse([*files, "--rollout.prompts", "9"])
    assert (config.steps, config.rollout.prompts, config.rollout.samples) == (7, 9, 4)
    assert config.rollout.cot == {"top_k": 5, "noise_scale": 0.5}
    above.write_text("[rollout]\nsample = 4\n")
    with pytest.raises(ValueError, match=r"unknown setting rollout\.sample"):
        parse(files)


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.stem)
def test_the_small_soft_and_fuzzy_runs_lie_over_the_small_run(path: Path) -> None:
    below = str(path.with_name("smollm2_cpu.toml"))
    given = ["--rollout-url", "http://127.0.0.1:1", "--model.path", "m"]
    config = parse(["--config", below, "--config", str(path), *given])
    assert config.rollout.mode == path.stem.rpartition("_")[2]
    assert config.rollout.cot["noise_scale"] > 0.33
    assert config.data.source == "reasoning_gym"


RATES = {"llama3b": 6e-6, "llama8b": 3e-6, "qwen3b": 8e-6}
LENGTHS = {"gsm8k": 128, "math": 512, "deepscaler": 512}
TEMPERATURES = {"hard": 1.0, "soft": 0.5, "fuzzy": 1e-4}


def test_the_papers_runs_have_the_papers_numbers() -> None:
    """Section 4 and appendix C; all 15 trained rows of its table 1."""
    names = [path.stem for path in PRESETS if path.stem.startswith("paper_")]
    assert len(names) == 15
    for name in names:
        _, model, problems, mode = name.split("_")
        config = config_file.load(str(PRESETS[0].parent / f"{name}.toml"))
        asked, optim = config.rollout, config.optim
        assert (config.steps, asked.prompts, asked.samples) == (4000, 2, 32)
        assert (asked.mode, asked.cot["temperature"]) == (mode, TEMPERATURES[mode])
        assert asked.cot.get("noise_scale") == (None if mode == "hard" else 0.33)
        assert (asked.max_think_tokens, asked.answer_max_tokens) == (LENGTHS[problems], 32)
        assert (optim.lr, optim.warmup, optim.schedule) == (RATES[model], 20, "cosine")
        assert (config.estimator, config.objective) == ("rloo", Config().objective)
        assert config.prompt.template == "paper"
        assert config.run == f"runs/{name}"


def test_the_command_line_lies_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('steps = 7\n[optim]\nlr = 1e-3\n[rollout.cot]\ntop_k = 30\n[model]\npath="m"')
    config = parse([f"--config={file}", "--optim.lr", "2e-3", "--rollout-url", "http://x"])
    assert (config.steps, config.optim.lr, config.optim.warmup) == (7, 2e-3, 20)
    assert config.rollout.cot == {"top_k": 30}


def test_a_saved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = from_mapping(
        {
            "rollout": {"cot": {"policy_params": {"weight": 0.5}, "end_strings": ['"a"\n']}},
            "optim": {"betas": [0.9, 0.95], "max_grad_norm": 1.0},
            "data": {"task_parameters": {"min digits": 1}},
        }
    )
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config))
    assert config_file.load(str(file)) == config


def test_the_api_key_is_never_saved() -> None:
    assert "secret" not in to_toml(from_mapping({"rollout": {"api_key": "secret"}}))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"optim": {"learning_rate": 1}}, "optim.learning_rate"),
        ({"steps": "many"}, "steps"),
        ({"rollout": {"mode": "softer"}}, "rollout.mode"),
        ({"optim": 3}, "optim is a table"),
        ({"objective": {"correction_cap": 0.5}}, "correction_cap"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_mapping(raw)


@pytest.mark.parametrize(
    ("raw", "remedy"),
    [
        ({"model": {}}, "model.path is missing"),
        ({"rollout_url": ""}, "--rollout-url"),
        ({"rollout": {"samples": 1}}, "at least 2"),
        ({"rollout": {"max_staleness": 1}}, "objective.ratio"),
        ({"updates_per_batch": 2}, "objective.ratio"),
        ({"rollout": {"cot": {"seed": 3}}}, "leave it out"),
        ({"rollout": {"cot": {"noise_scale": 0}}}, "no density"),
        ({"model": {"path": "m", "lora_rank": 8}}, "go together"),
        ({"record": "a", "replay": "b"}, "exclude"),
        ({"steps": 0}, "at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"data": {"order_seed": -1}}, "data.order_seed must be at least 0"),
        ({"rollout": {"max_failure_rate": 5}}, "rollout.max_failure_rate is a share"),
        ({"reward": {"timeout": 0}}, "reward.timeout is in seconds, above 0"),
        ({"rollout": {"retry_for": -1}}, "rollout.retry_for is in seconds, from 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(raw: dict[str, Any], remedy: str) -> None:
    config: Config = from_mapping({"model": {"path": "m"}, "rollout_url": "http://x", **raw})
    with pytest.raises(ValueError, match=remedy):
        config.check()


def test_only_settings_that_bend_the_trajectory_bind_a_resumed_run() -> None:
    before: Config = from_mapping({"steps": 5, "rollout_url": "http://a"})
    now: Config = from_mapping({"steps": 9, "rollout_url": "http://b", "optim": {"lr": 1.0}})
    assert config_file.differences(before, now) == ["optim.lr: 6e-06 -> 1.0"]


def test_the_learning_rate_warms_up_and_follows_the_cosine_to_zero() -> None:
    config = OptimConfig(lr=1.0, warmup=20)
    rates = [learning_rate(config, step, 4000) for step in range(4000)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates[19] == rates[20] == 1.0
    assert rates[2010] == pytest.approx(0.5, abs=1e-3)
    assert 0.0 < rates[-1] < 1e-6
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_metrics_reach_a_tracker_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tracker:
        """The three calls that wandb and trackio share."""

        def __init__(self) -> None:
            self.seen: list[Any] = []

        def init(self, **settings: Any) -> None:
            self.seen.append(settings)

        def log(self, data: dict[str, float], step: int) -> None:
            self.seen.append((step, data))

        def finish(self) -> None:
            self.seen.append("finished")

    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    config = LogConfig(track="trackio", tensorboard=False, project="p")
    journal = Journal(tmp_path / "r1", config, 0, {"steps": 3})
    journal.metrics(1, {"reward/mean": 2.5})
    journal.close()
    init, logged, end = tracker.seen
    assert (init["project"], init["name"], init["config"]) == ("p", "r1", {"steps": 3})
    assert logged == (1, {"reward/mean": 2.5})
    assert end == "finished"

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Journal(tmp_path / "r2", LogConfig(track="wandb", tensorboard=False), 0, {})


def test_the_probe_allows_two_byte_types_their_rounding_but_no_other_model() -> None:
    """SmolLM2 (d = 576) shows a gap of 1.0 in bfloat16; half of mu's length would be 36."""
    assert gap_limit({"float32"}, 576) == 0.2
    assert 2.0 < gap_limit({"bfloat16"}, 576) < 5.0
    assert gap_limit({"float32", "bfloat16"}, 4 * 576) == 2 * gap_limit({"bfloat16"}, 576)


class Compared:
    """A learner whose comparison with the server gave these distances."""

    config = Config(model=ModelConfig(dtype="bfloat16"))
    policy = SimpleNamespace(table=torch.zeros(1, 576))

    def __init__(self, distances: list[float]) -> None:
        values = torch.tensor(distances)
        self.metrics = Agreement.metrics(
            {"distance": [values], "gap": [values.sqrt()], "floor": [values * 0], "mismatch": []}
        )

    def compare(self, samples: list[Any]) -> dict[str, float]:
        return self.metrics


@pytest.mark.parametrize(
    ("tau", "distances", "words"),
    [
        (0.5, [1.0] * 96, None),
        (0.5, [1.0] * 95 + [19.0], "gaussian_distance is 1.188"),
        (1e-4, [1.0] * 95 + [19.0], None),  # one near-tie fell the other way
        (1e-4, [1.0] * 70 + [19.0] * 26, "27% of the steps"),
        (1e-4, [1.3] * 96, "gaussian_distance_median is 1.300"),
    ],
)
def test_the_probe_forgives_fuzzy_chains_a_flipped_argmax_and_nobody_another_mean(
    tau: float, distances: list[float], words: str | None
) -> None:
    sample: Any = SimpleNamespace(trace=SimpleNamespace(meta={"tau": tau, "dtype": "bfloat16"}))
    learner: Any = Compared(distances)
    if words is None:
        assert compare(learner, ProbeConfig(), [sample])["agree/gaussian_distance_median"] == 1.0
    else:
        with pytest.raises(ValueError, match=words):
            compare(learner, ProbeConfig(), [sample])


def test_what_error_messages_tell_to_change_may_change_on_resume() -> None:
    before = Config()
    patient = {"timeout": 99.0, "max_failure_rate": 0.5}
    now = from_mapping({"micro_batch_tokens": 77, "reward": patient, "rollout": patient})
    assert config_file.differences(before, now) == []
    other = from_mapping({"reward": {"function": "math"}, "rollout": {"samples": 3}})
    assert len(config_file.differences(before, other)) == 2


# ---- data ----------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_golds_are_read_as_their_style_has_them(tmp_path: Path) -> None:
    gsm8k = write(tmp_path / "g.jsonl", [{"question": "q", "answer": "5 <<2+3=5>>\n#### 1,205"}])
    found = data.load(DataConfig(style="gsm8k", path=str(gsm8k)), None, 0)
    assert found.train[0].gold == "1205"
    solution = "First \\boxed{1}. Then \\boxed{\\frac{1}{2}}."
    maths = write(tmp_path / "m.jsonl", [{"problem": "p", "solution": solution, "level": 3}])
    found = data.load(DataConfig(style="math", path=str(maths)), None, 0)
    assert (found.train[0].gold, found.train[0].metadata) == ("\\frac{1}{2}", {"level": 3})


def test_golds_that_cannot_be_scored_are_dropped_and_named(tmp_path: Path) -> None:
    rows = [{"question": str(i), "answer": f"#### {i}"} for i in range(8)]
    rows[3]["answer"] = "#### nobody knows"
    path = write(tmp_path / "train.jsonl", rows)
    with RewardPool("gsm8k", workers=1) as pool:
        found = data.load(DataConfig(style="gsm8k", path=str(path.parent)), pool, 2)
    assert [p.id for p in found.dropped] == ["train-3"]
    ids = {p.id for p in found.train} | {p.id for p in found.held_out}
    assert len(ids) == 7 == len(found.train) + len(found.held_out)


def test_gsm8k_itself_loads_whole() -> None:
    folder = os.environ.get("SOFTVLLM_GSM8K")
    if not folder:
        pytest.skip("set SOFTVLLM_GSM8K to a folder with train.jsonl and test.jsonl")
    config = DataConfig(style="gsm8k", path=folder, validation_split="test", limit=400)
    with RewardPool("gsm8k", workers=1) as pool:
        found = data.load(config, pool, 50)
    assert (len(found.train), len(found.held_out), len(found.dropped)) == (400, 50, 0)


def test_reasoning_gym_splits_do_not_share_problems() -> None:
    config = DataConfig(
        source="reasoning_gym", size=50, validation_split="test", task_parameters={"min_digits": 3}
    )
    with RewardPool("reasoning_gym", workers=1) as pool:
        found = data.load(config, pool, 20)
    assert len(found.train) == 50
    assert len(found.held_out) == 20
    assert not {p.question for p in found.train} & {p.question for p in found.held_out}
    assert found.dropped == []


def test_what_validation_asks_is_not_trained_on(tmp_path: Path) -> None:
    rows = [{"question": f"{i % 5}  + 1", "answer": "a"} for i in range(40)]
    path = str(write(tmp_path / "d.jsonl", rows))
    found = data.load(DataConfig(path=path), None, 2)
    asked = {p.question for p in found.held_out}
    assert not asked & {p.question for p in found.train}
    assert len(found.train) + found.repeated == 38
    assert found.repeated > 0
    kept = data.load(DataConfig(path=path, repeated="keep"), None, 2)
    assert (len(kept.train), kept.repeated) == (38, 0)
    with pytest.raises(ValueError, match="asks every question"):
        data.load(DataConfig(path=path), None, 30)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"validation_split": "test"}, "no meaning for one file"),
        ({"source": "reasoning_gym", "validation_path": "x.jsonl"}, "of no use"),
        ({"source": "reasoning_gym", "validation_split": "train"}, "are the training problems"),
    ],
)
def test_validating_on_the_training_problems_is_refused(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    path = str(write(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}]))
    with pytest.raises(ValueError, match=words):
        data.load(DataConfig(**{"path": path, **config}), None, 1)


def test_a_run_does_not_go_on_with_other_problems(tmp_path: Path) -> None:
    (tmp_path / IDENTITY).write_text('{"run_id": "r"}')
    some = [Problem(str(i), f"{i}?", str(i)) for i in range(4)]
    require_same_problems(tmp_path, Problems(some[1:], some[:1]))
    require_same_problems(tmp_path, Problems(some[1:], some[:1]))
    assert json.loads((tmp_path / IDENTITY).read_text())["run_id"] == "r"
    with pytest.raises(ValueError, match="the data has changed"):
        require_same_problems(tmp_path, Problems(some[1:][::-1], some[:1]))
    with pytest.raises(ValueError, match="golds of 3 could be scored"):
        require_same_problems(tmp_path, Problems(some[1:3], some[:1], some[3:]))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"path": None}, "needs data.path"),
        ({"path": "absent.jsonl"}, "does not exist"),
        ({"question_field": "q"}, "question_field"),
        ({"source": "hub", "path": None}, "the data set's name"),
    ],
)
def test_missing_data_is_named(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    write(tmp_path / "d.jsonl", [{"question": "a", "answer": "b"}])
    given = {"path": str(tmp_path / "d.jsonl"), **config}
    with pytest.raises(ValueError, match=words):
        data.load(DataConfig(**given), None, 0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"answer": None}, "'answer' must be a text or a finite number, got null"),
        ({"answer": [1, 2]}, r"'answer' must be .*, got list \[1, 2\]"),
        ({"answer": {"value": 7}}, "'answer' must be .*, got dict"),
        ({"answer": True}, "'answer' must be .*, got bool True"),
        ({"answer": float("nan")}, "'answer' must be .*, got float nan"),
        ({"question": None}, "'question' must be .*, got null"),
        ({"question": ["a", "b"]}, "'question' must be .*, got list"),
        ({"question": " "}, "'question' is empty"),
        ({"question": "\ud800"}, "'question' holds half a surrogate pair"),
    ],
)
def test_what_is_neither_text_nor_number_is_refused_with_its_place(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    good = {"question": "a", "answer": "b"}
    path = write(tmp_path / "d.jsonl", [good, {**good, **row}])
    with pytest.raises(ValueError, match=rf"d\.jsonl, line 2: {words}.*data\.gold_field"):
        data.load(DataConfig(path=str(path)), None, 0)


def test_numbers_are_golds_as_they_are_written(tmp_path: Path) -> None:
    rows = [{"question": str(i), "answer": gold} for i, gold in enumerate((7, 2.5, "x"))]
    found = data.load(DataConfig(path=str(write(tmp_path / "d.jsonl", rows))), None, 0)
    assert {p.question: p.gold for p in found.train} == {"0": "7", "1": "2.5", "2": "x"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n", "holds no problems"),
        (
            '{"question": "a"}\n{"question": "\u00e9"}'.encode("latin-1"),
            r"line 2: byte 32 \(0xe9\)",
        ),
        ('\ufeff{"question": "a"}'.encode(), "line 1: not JSON .*BOM"),
        (b"[1]", "line 1: not a JSON object"),
        (b'{"question": "a", "answer": "b"}\n{', "line 2: not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"d\.jsonl,? {words}"):
        data.load(DataConfig(path=str(tmp_path / "d.jsonl")), None, 0)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"d\.parquet cannot be read as parquet"):
        data.load(DataConfig(path=str(tmp_path / "d.parquet")), None, 0)


@given(st.integers(1, 9), st.integers(0, 3), st.integers(0, 100))
def test_every_epoch_has_every_problem_once(size: int, epoch: int, seed: int) -> None:
    problems = Problems([Problem(str(i), "", "") for i in range(size)], [])
    ids = [problems.order(seed, epoch * size + i).id for i in range(size)]
    assert sorted(ids) == sorted(map(str, range(size)))
    assert ids == [problems.order(seed, epoch * size + i).id for i in range(size)]


# ---- prompts -------------------------------------------------------------------------------------


def test_the_papers_prompt_is_its_text() -> None:
    text = text_of(PromptConfig(), None, "How many {apples}?")
    assert text.startswith("A conversation between User and Assistant. The user asks a question")
    assert text.endswith("\\boxed{[answer]}.' User: How many {apples}? Assistant:")


def test_a_chat_prompt_is_the_models_template_and_not_tokenised_twice() -> None:
    tokenizer = tiny_tokenizer()
    config = PromptConfig(template="chat", text="Q: {question}", begin="So")
    ids = ids_of(config, tokenizer, "two?")
    assert tokenizer.decode(ids) == "<|user|>Q: two?<|eos|><|assistant|>So"


def test_a_prompt_that_is_too_long_or_has_no_template_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"limit prompt\.max_tokens = 5"):
        ids_of(PromptConfig(template="raw", max_tokens=5), tokenizer, "word " * 9)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ids_of(PromptConfig(template="chat"), tokenizer, "x")
