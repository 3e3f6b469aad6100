"""Whole runs of the trainer against an oracle behind the real wire."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_rollout_server import FakeRolloutServer
from rl_fixtures import assert_same_weights, fake_server, surroundings, tiny_model, weights_of
from rl_runs import arguments, learned, start, train
from safetensors.torch import load_file
from trainer_rollouts import single_thread
from transformers import AutoModelForCausalLM

from softvllm.core.rollout import encode_frame
from softvllm.core.trace import encode
from trainer import records
from trainer.ahead import thaw
from trainer.checkpoint import whole
from trainer.collect import Collected
from trainer.config import Config, ModelConfig
from trainer.files import alone
from trainer.logging import read_metrics
from trainer.ranks import Ranks
from trainer.rl import main

threads = pytest.fixture(single_thread, autouse=True, scope="module")
model = pytest.fixture(tiny_model, scope="module")
server = pytest.fixture(fake_server)
around = pytest.fixture(surroundings, autouse=True)


@pytest.mark.parametrize("mode", ["soft", "fuzzy", "hard", "mixed"])
def test_a_run_trains_in_every_mode_and_leaves_a_model(
    server: FakeRolloutServer, model: Path, tmp_path: Path, mode: str
) -> None:
    run = tmp_path / "run"
    shown = {"log.plots": True, "log.tensorboard": True}
    rows = train(model, run, server.url, **{"rollout.mode": mode, "steps": 2}, **shown)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["agree/hard_kl"] < 1e-6 for row in rows)
    if mode in ("soft", "mixed"):
        assert all(0.8 < row["agree/gaussian_distance"] < 1.2 for row in rows)
        assert all(row["agree/mean_gap"] < 0.02 for row in rows)
    assert len(server.versions) == 3  # before the first step and after each
    before, after = weights_of(model), weights_of(run / "final")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(
        after["model.embed_tokens.weight"], server.oracle.model.get_input_embeddings().weight
    )
    assert (run / "plots.png").stat().st_size > 10_000
    assert list((run / "tensorboard").glob("events.*"))
    profiles = [json.loads(line) for line in (run / "profiles.jsonl").open()]
    assert [len(row["entropy"]) for row in profiles] == [6, 6]
    assert len((run / "transcripts.jsonl").read_text().splitlines()) == 8


def test_reward_rises_on_a_toy_task(server: FakeRolloutServer, model: Path, tmp_path: Path) -> None:
    """Soft chains, sampled answers: the answers learn to hold the letter that is paid for.

    Soft terms count per coordinate here: with the paper's sum, 10 steps of 16 samples are mostly
    noise of the soft part.
    """
    rows = train(
        model,
        tmp_path / "run",
        server.url,
        **{
            "steps": 10,
            "rollout.samples": 8,
            "rollout.max-think-tokens": 3,
            "rollout.answer-max-tokens": 3,
            "objective.soft-dims": "mean",
            "optim.lr": "1e-2",
            "checkpoint.every": 0,
        },
    )
    rewards = [row["reward/mean"] for row in rows]
    assert sum(rewards[-4:]) / 4 > 2.0 * sum(rewards[:4]) / 4


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    whole_run, cut_run = tmp_path / "whole", tmp_path / "cut"
    settings: dict[str, Any] = {
        "steps": 6,
        "checkpoint.every": 2,
        "validation.every": 3,
        "validation.problems": 2,
    }
    expected = train(model, whole_run, server.url, **settings)
    server.restart()
    process = start(arguments(model, cut_run, server.url, **settings))
    # Step 3 is trained but not in a checkpoint; wherever the kill falls after it, it must not show.
    while len(read_metrics(cut_run)) < 4:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert 2 <= whole(cut_run / "checkpoints")[-1][0] < 6
    rows = train(model, cut_run, server.url, **settings, resume=True)
    assert learned(rows) == learned(expected)
    assert_same_weights(cut_run / "final", whole_run / "final")
    assert_same_weights(cut_run / "best", whole_run / "best")
    steps = [json.loads(line)["step"] for line in (cut_run / "transcripts.jsonl").open()]
    assert steps == sorted(steps)
    assert len(steps) == 6 * 4


def forget_after(run: Path, step: int) -> None:
    """Leave the run as if it had been killed before its later checkpoints."""
    for number, path in whole(run / "checkpoints"):
        if number > step:
            shutil.rmtree(path)


def test_a_run_one_step_off_policy_resumes_with_the_batch_that_waited(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "steps": 4,
        "rollout.max-staleness": 1,
        "objective.ratio": "clip",
        "objective.soft-dims": "mean",
        "checkpoint.keep": 9,
    }
    one, other = tmp_path / "one", tmp_path / "other"
    expected = train(model, one, server.url, **settings)
    versions = [version for _, version in server.samples_sent]
    # Batches of steps 1 and 2 both come from the first weights: the second was one step old.
    assert versions[4:16] == [server.versions[0]] * 12
    assert expected[1]["policy/ratio_hard"] != pytest.approx(1.0, abs=1e-6)
    assert expected[0]["policy/ratio_hard"] == pytest.approx(1.0, abs=1e-6)

    server.restart()
    train(model, other, server.url, **settings)
    forget_after(other, 2)
    rows = train(model, other, server.url, **settings, resume=True)
    assert learned(rows) == learned(expected)
    assert_same_weights(one / "final", other / "final")


def test_a_replay_is_the_recorded_run_without_a_server(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    tape = tmp_path / "tape"
    recorded = train(model, tmp_path / "one", server.url, record=tape)
    calls = len(server.calls)
    replayed = train(model, tmp_path / "two", None, replay=tape)
    assert len(server.calls) == calls
    assert learned(replayed) == learned(recorded)
    assert_same_weights(tmp_path / "one" / "final", tmp_path / "two" / "final")


def test_seeds_may_share_the_order_of_problems_but_not_their_draws(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    asked, seeds = {}, {}
    for seed, order in ((1, 5), (2, 5), (1, None)):
        tape = tmp_path / f"tape_{seed}_{order}"
        shared = {} if order is None else {"data.order_seed": order}
        given = {"seed": seed, "steps": 2, "record": tape, **shared}
        train(model, tmp_path / f"run_{seed}_{order}", server.url, **given)
        found = [records.read(tape, step) for step in range(2)]
        asked[seed, order] = [problem.id for record in found for problem in record.problems]
        seeds[seed, order] = {s.trace.meta["seed"] for record in found for s in record.samples}
    assert asked[1, 5] == asked[2, 5] != asked[1, None]
    assert seeds[1, 5] == seeds[1, None] and not seeds[1, 5] & seeds[2, 5]


def with_top_k(tmp_path: Path) -> Path:
    """Settings with which a server left to itself records tokens and weights instead of h~."""
    file = tmp_path / "top_k.toml"
    file.write_text("[rollout.cot]\ntop_k = 4\n")
    return file


def test_a_batch_that_waited_keeps_its_soft_inputs_when_the_table_changes(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "config": with_top_k(tmp_path),
        "steps": 3,
        "rollout.max-staleness": 1,
        "objective.ratio": "clip",
        "objective.soft-dims": "mean",
        "optim.lr": "1e-2",
        "checkpoint.keep": 9,
    }
    one, other = tmp_path / "one", tmp_path / "other"
    expected = train(model, one, server.url, **settings)
    server.restart()
    train(model, other, server.url, **settings)
    forget_after(other, 2)
    rows = train(model, other, server.url, **settings, resume=True)
    assert learned(rows) == learned(expected)
    assert_same_weights(one / "final", other / "final")


def test_a_replay_knows_from_when_on_the_server_let_chains_end(model: Path, tmp_path: Path) -> None:
    """Hard tokens drawn while stop tokens were out of the question have other densities."""
    settings: dict[str, Any] = {"rollout.mode": "hard", "steps": 1}
    tape = tmp_path / "tape"
    with FakeRolloutServer(model, min_think=3) as server:
        recorded = train(model, tmp_path / "one", server.url, record=tape, **settings)
    assert all(row["agree/hard_kl"] < 1e-6 for row in recorded)
    replayed = train(model, tmp_path / "two", None, replay=tape, **settings)
    assert learned(replayed) == learned(recorded)


def test_a_replay_with_top_k_feeds_what_was_fed(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    tape, settings = tmp_path / "tape", {"config": with_top_k(tmp_path), "steps": 2}
    recorded = train(model, tmp_path / "one", server.url, record=tape, **settings)
    # Tokens and weights would be another h~ at another table, as of a replay that learns faster.
    assert all(sample.trace.dense is not None for sample in records.read(tape, 1).samples)
    assert learned(train(model, tmp_path / "two", None, replay=tape, **settings)) == learned(
        recorded
    )


def test_a_replay_of_tokens_and_weights_is_refused(
    server: FakeRolloutServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tape = tmp_path / "tape"
    train(model, tmp_path / "one", server.url, record=tape, steps=1)
    record = records.read(tape, 0)
    samples = record.samples
    for sample in samples:
        trace = sample.trace
        n = len(trace.soft_positions)
        trace.dense, trace.sparse_ids = None, np.zeros((n, 1), np.int32)
        trace.sparse_weights = np.ones((n, 1), np.float32)
        sample.trace_bytes = encode(trace)
    record.frames = b"".join(encode_frame(sample) for sample in samples)
    records.write(tape, record)
    assert main(arguments(model, tmp_path / "two", None, replay=tape, steps=1)) == 1
    assert "sparse records of step 0" in capsys.readouterr().err
    frozen = {"record": records.encode(record), "old": [[]]}
    collector: Any = SimpleNamespace(judge=lambda record: Collected(record, record.samples, []))
    for choice in ("full", "no_mixture"):
        config = Config(model=ModelConfig(table_gradient=choice))
        learner: Any = SimpleNamespace(config=config, ranks=Ranks())
        with pytest.raises(ValueError, match="a batch with sparse records"):
            thaw(frozen, collector, learner)


def test_an_adapter_run_resumes_against_a_server_that_serves_later_adapters(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "model.lora-rank": 4,
        "model.table-gradient": "frozen",
        "sync.method": "lora",
        "optim.lr": "1e-2",
        "checkpoint.keep": 9,
    }
    one, other = tmp_path / "one", tmp_path / "other"
    expected = train(model, one, server.url, **settings)
    assert all(row["agree/hard_kl"] < 1e-5 for row in expected)
    server.restart()
    train(model, other, server.url, **settings)
    forget_after(other, 1)
    rows = train(model, other, server.url, **settings, resume=True)
    assert learned(rows) == learned(expected)
    (served,) = server.adapters
    assert served.endswith("-000003")
    left, right = (load_file(run / "final" / "adapter_model.safetensors") for run in (one, other))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_replay_does_not_go_beyond_its_recording(
    server: FakeRolloutServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tape = tmp_path / "tape"
    train(model, tmp_path / "one", server.url, record=tape, steps=1)
    assert main(arguments(model, tmp_path / "two", None, replay=tape, steps=2)) == 1
    assert "no rollouts for step 1" in capsys.readouterr().err


def test_trouble_with_the_server_changes_nothing_but_time(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    expected = train(model, tmp_path / "calm", server.url)
    server.restart()
    server.trouble.cut = [9, 2, 9, 0, 3]
    server.trouble.fail = {(1, 2): "engine"}
    server.trouble.unavailable = 1
    server.trouble.lose_finish = 1
    troubled = train(model, tmp_path / "troubled", server.url)
    assert learned(troubled) == learned(expected)


def test_a_server_that_restarts_in_the_middle_gets_the_current_weights(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    expected = train(model, tmp_path / "calm", server.url)
    server.restart()
    server.trouble.restart = 3
    restarted = train(model, tmp_path / "troubled", server.url)
    assert learned(restarted) == learned(expected)


def test_micro_batches_change_nothing(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    tape = tmp_path / "tape"
    one = train(model, tmp_path / "one", server.url, record=tape)
    many = train(model, tmp_path / "many", None, replay=tape, **{"micro-batch-tokens": 48})
    for left, right in zip(one, many):
        assert right["grad/norm"] == pytest.approx(left["grad/norm"], rel=1e-4)
    start, whole_batch, parts = (
        torch.cat([weight.flatten() for weight in weights_of(folder).values()])
        for folder in (model, tmp_path / "one" / "final", tmp_path / "many" / "final")
    )
    # Adam turns a gradient of rounding size into a step of any sign; such entries are few.
    assert (parts - whole_batch).norm() < 1e-2 * (whole_batch - start).norm()


def test_bfloat16_weights_keep_float32_masters(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    """Updates far below a bfloat16 ulp add up in the masters instead of being rounded away."""
    tape, run = tmp_path / "tape", tmp_path / "run"
    train(model, tmp_path / "one", server.url, record=tape)
    settings = {"model.dtype": "bfloat16", "optim.lr": "1e-6"}
    train(model, run, None, replay=tape, **settings)
    numbers = torch.load(whole(run / "checkpoints")[-1][1] / "state.pt")
    name = "model.layers.0.mlp.down_proj.weight"
    master = numbers["optimiser"]["masters"][name]
    kept = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()[name]
    assert master.dtype == torch.float32
    assert kept.dtype == torch.bfloat16
    assert torch.equal(master.bfloat16(), kept)
    start = weights_of(model)[name].bfloat16().float()
    moved = (master - start).abs().max()
    assert 0.0 < moved < 1e-5


@pytest.mark.parametrize(
    ("settings", "trouble", "words"),
    [
        ({}, {"tau_off": 2.0}, "trainer and server disagree"),
        ({}, {"enable_rl": False}, "--enable-rl"),
        ({}, {"modes": ("hard",)}, "no mode 'soft'"),
        ({"reward.function": "nonsense"}, {}, "unknown reward"),
        ({"reward.function": "reward_functions:absent"}, {}, "absent"),
        ({"model.path": "/nowhere"}, {}, "/nowhere"),
        ({"prompt.max-tokens": 2}, {}, "limit prompt.max_tokens"),
        ({"micro-batch-tokens": 8}, {}, "micro_batch_tokens"),
    ],
)
def test_what_is_wrong_at_the_start_is_said_before_any_step(
    server: FakeRolloutServer,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    trouble: dict[str, Any],
    words: str,
) -> None:
    for name, value in trouble.items():
        setattr(server.trouble, name, value)
    assert main(arguments(model, tmp_path / "run", server.url, **settings)) == 1
    assert words in capsys.readouterr().err
    assert read_metrics(tmp_path / "run") == []


def test_a_run_is_not_overwritten_nor_continued_with_other_settings(
    server: FakeRolloutServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(model, run, server.url, steps=1)
    assert main(arguments(model, run, server.url, steps=1)) == 1
    assert "--resume" in capsys.readouterr().err
    again = arguments(model, run, server.url, steps=2, resume=True, **{"optim.lr": "1"})
    assert main(again) == 1
    assert "optim.lr: 0.001 -> 1.0" in capsys.readouterr().err


def test_two_processes_do_not_train_one_run(
    server: FakeRolloutServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(model, tmp_path / "run", server.url, steps=1)
    with alone(tmp_path / "run"):
        assert main(given) == 1
    assert "another process is writing" in capsys.readouterr().err
    assert not server.calls
    assert main(given) == 0


def test_failing_rewards_stop_the_run(
    server: FakeRolloutServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"reward.function": "reward_functions:fails_on_answers"}
    assert main(arguments(model, tmp_path / "run", server.url, **settings)) == 1
    assert "rewards failed" in capsys.readouterr().err


def test_too_many_samples_of_nan_stop_the_run(
    server: FakeRolloutServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.trouble.fail = {(0, 0): "nan"}
    assert main(arguments(model, tmp_path / "run", server.url)) == 1
    assert "samples failed" in capsys.readouterr().err


def test_a_dry_run_prints_the_resolved_configuration(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--dry-run", "--rollout.mode", "fuzzy", "--run", str(tmp_path / "x")]) == 0
    assert 'mode = "fuzzy"' in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def test_a_dry_run_refuses_what_a_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--rollout.samples", "1"]) == 1
    assert "rollout.samples must be at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_gradient_parts_add_nothing_to_the_step(
    server: FakeRolloutServer, model: Path, tmp_path: Path, mode: str
) -> None:
    tape = tmp_path / "tape"
    settings: dict[str, Any] = {"rollout.mode": mode}
    plain = train(model, tmp_path / "one", server.url, record=tape, **settings)
    settings["log.gradient-parts-every"] = 2
    measured = train(model, tmp_path / "two", None, replay=tape, **settings)
    assert [row["grad/norm"] for row in measured] == [row["grad/norm"] for row in plain]
    first = measured[0]
    thought, absent = ("think", "soft") if mode == "hard" else ("soft", "think")
    assert first[f"grad/norm_{thought}"] > 0 < first["grad/norm_answer"]
    assert first[f"grad/norm_{absent}"] == 0
    assert "grad/norm_soft" not in measured[1]


def test_kl_entropy_and_corrections_are_measured(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    settings = {
        "estimator": "grpo",
        "objective.ratio": "clip",
        "objective.soft-dims": "mean",
        "objective.kl-coef": 0.1,
        "objective.entropy-coef": 0.01,
        "objective.correction": "truncate",
    }
    rows = train(model, tmp_path / "one", server.url, **settings)
    assert rows[0]["policy/kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is the start
    assert rows[-1]["policy/kl"] > 1e-3
    assert rows[0]["policy/correction"] == pytest.approx(1.0, abs=1e-4)
    assert {"policy/entropy", "policy/clipped_hard"} <= rows[0].keys()

    server.restart()
    settings["updates-per-batch"] = 2
    (row,) = train(model, tmp_path / "two", server.url, steps=1, **settings)
    assert row["policy/ratio_hard"] != pytest.approx(1.0, abs=1e-6)


def test_a_step_in_which_no_sample_stands_out_moves_nothing(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (row,) = train(
        model, run, server.url, steps=1, **{"reward.function": "reward_functions:all_alike"}
    )
    assert row["group/zero_advantage"] == 1.0
    assert row["grad/norm"] == 0.0
    assert_same_weights(model, run / "final")


def test_the_trainer_needs_no_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None; import trainer.rl, trainer.sync.folder, "
        "trainer.sync.lora, trainer.sync.nccl; assert not any(n.startswith('vllm.') for n in "
        "sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=Path(__file__).parent.parent,
    )
