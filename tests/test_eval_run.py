"""Whole evaluations against an oracle behind the real wire: resume, checkpoints, likelihoods."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_rollout_server import FakeRolloutServer
from tiny_models import tiny_llama
from trainer_rollouts import single_thread
from transformers import AutoModelForCausalLM, AutoTokenizer

from softvllm.core.phases import Phase
from softvllm.core.trace import STEP, Kind, Trace
from trainer import rollout_client
from trainer.eval import generate, likelihood
from trainer.eval.__main__ import main
from trainer.eval.choice import Item
from trainer.eval.config import ModelConfig

REPOSITORY = Path(__file__).parent.parent
threads = pytest.fixture(single_thread, autouse=True, scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def server(model: Path) -> Iterator[FakeRolloutServer]:
    with FakeRolloutServer(model) as server:
        yield server


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_client, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the verifier's workers


def command(url: str, model: Path, out: Path, *more: str) -> list[str]:
    """Six problems, three samples, two settings; an answer is right if it is not empty."""
    problems = out.parent / "problems.jsonl"
    if not problems.exists():
        lines = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(6)]
        problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {
        "rollout-url": url,
        "out": out,
        "model.path": model,
        "samples": 3,
        "max-think-tokens": 6,
        "answer-max-tokens": 4,
        "retry-for": 20,
        "workers": 1,
        "prompt.template": "raw",
        "report.replicates": 50,
        "report.transcripts": 1,
    }
    out_arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    out_arguments += ["--tasks", f"sums={problems}"]
    if "--settings" not in more:
        out_arguments += ["--settings", "hard-greedy", "soft-sample"]
    return [*out_arguments, "--report.no-plots", *more]


def rows_of(out: Path, cell: str) -> list[dict[str, Any]]:
    lines = (out / "samples" / f"{cell}.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines]


def test_an_evaluation_leaves_samples_numbers_tables_and_a_report(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    assert main(command(server.url, model, out)) == 0
    results = json.loads((out / "results.json").read_text())
    assert [(c["setting"], c["problems"], c["samples"]) for c in results["cells"]] == [
        ("hard-greedy", 6, 1),
        ("soft-sample", 6, 3),
    ]
    rows = rows_of(out, "none/sums/soft-sample")
    assert len(rows) == 18
    assert all(len(row["entropy"]) == row["think_tokens"] <= 6 for row in rows)
    shown = [row for row in rows if "steps" in row]
    assert len(shown) == 1
    assert "".join(step[0] for step in shown[0]["steps"]) == shown[0]["think"]
    assert all(step[1] and step[2] > 0 for step in shown[0]["steps"])  # soft; entropy
    assert "grid-sums" in (out / "tables.tex").read_text()
    assert "SS@3" in (out / "tables.md").read_text()
    assert "Think steps" in (out / "report.html").read_text()
    # The same command again asks for nothing and says the same.
    calls, before = server.calls.count("/v1/rollouts"), (out / "results.json").read_bytes()
    assert main(command(server.url, model, out)) == 0
    assert server.calls.count("/v1/rollouts") == calls
    assert (out / "results.json").read_bytes() == before


def test_a_killed_evaluation_goes_on_to_the_numbers_of_an_undisturbed_one(
    server: FakeRolloutServer, model: Path, other: Path, tmp_path: Path
) -> None:
    points = ("--checkpoints", f"none={model}", f"soft={other}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(server.url, model, whole, *points)) == 0
    sent = len(server.samples_sent)
    arguments = command(server.url, model, cut, *points)
    path = os.pathsep.join((str(Path(__file__).parent), str(REPOSITORY)))
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.eval", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Deep in the second checkpoint's samples.
    target = cut / "samples" / "soft" / "sums" / "soft-sample.jsonl"
    while not target.exists() or len(target.read_text().splitlines()) < 6:
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "results.json").exists()
    before = len(server.samples_sent)
    assert main(arguments) == 0
    assert (cut / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert (cut / "tables.md").read_bytes() == (whole / "tables.md").read_bytes()
    assert len(server.samples_sent) - before < sent - 24  # the first checkpoint was not asked again


def test_more_samples_extend_what_is_there(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    assert main(command(server.url, model, out, "--settings", "soft-sample")) == 0
    before = {(r["problem"], r["sample"]): r for r in rows_of(out, "none/sums/soft-sample")}
    sent = len(server.samples_sent)
    more = ("--settings", "soft-sample", "--samples", "5")
    assert main(command(server.url, model, out, *more)) == 0
    after = {(r["problem"], r["sample"]): r for r in rows_of(out, "none/sums/soft-sample")}
    assert len(server.samples_sent) == sent + 12
    assert before.items() <= after.items()


def test_every_checkpoints_samples_come_from_its_weights(
    server: FakeRolloutServer, model: Path, other: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "eval"
    points = ("--checkpoints", "none=served", f"soft:0={other}", "--restore", str(model))
    assert main(command(server.url, model, out, *points)) == 0
    versions = [version for _, version in server.samples_sent]
    assert versions == sorted(versions, key=lambda v: v != "default")
    assert [v.split("-")[1] for v in server.versions] == ["soft", "restore"]
    table = server.oracle.model.get_input_embeddings().weight
    base = AutoModelForCausalLM.from_pretrained(model)
    assert torch.equal(table, base.get_input_embeddings().weight)
    assert "now serves weights 'eval-restore" in "".join(capsys.readouterr())
    assert not (out / "weights").exists()
    assert not (other / "STABLE").exists()


def test_served_weights_must_still_be_the_first_ones(
    server: FakeRolloutServer, model: Path, other: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "eval"
    points = ("--checkpoints", "none=served", f"soft={other}")
    assert main(command(server.url, model, out, *points)) == 0
    assert main(command(server.url, model, out, *points)) == 0  # nothing is missing: fine
    assert main(command(server.url, model, out, *points, "--samples", "4")) == 1
    assert "start the server again" in capsys.readouterr().err


def test_a_server_that_restarts_or_cuts_streams_changes_no_number(
    server: FakeRolloutServer, model: Path, other: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    # The fake swaps weights under a running sample, which a real server does not.
    monkeypatch.setattr(generate, "IN_FLIGHT", 1)
    points = ("--checkpoints", f"soft={other}")
    assert main(command(server.url, model, tmp_path / "calm", *points)) == 0
    server.trouble.restart, server.trouble.cut = 1, [4, 2]
    server.trouble.unavailable = 1
    assert main(command(server.url, model, tmp_path / "storm", *points)) == 0
    calm, storm = (tmp_path / n / "results.json" for n in ("calm", "storm"))
    assert calm.read_bytes() == storm.read_bytes()


def test_too_many_failed_samples_stop_the_evaluation(
    server: FakeRolloutServer, model: Path, tmp_path: Path, capsys: Any
) -> None:
    server.trouble.fail = {(0, 0): "nan"}
    assert main(command(server.url, model, tmp_path / "eval")) == 1
    assert "max_failure_rate" in capsys.readouterr().err
    assert main(command(server.url, model, tmp_path / "eval")) == 1  # not forgotten
    more = ("--max-failure-rate", "0.9")
    assert main(command(server.url, model, tmp_path / "eval", *more)) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert sum(cell["failed_samples"] for cell in results["cells"]) >= 1


@pytest.mark.parametrize(
    ("trouble", "more", "words"),
    [
        ({"enable_rl": False}, ("--checkpoints", "soft={other}"), "--enable-rl"),
        ({"modes": ("hard",)}, (), "has no mode 'soft'"),
        ({"refuse_weights": "bad shape"}, ("--checkpoints", "soft={other}"), "bad shape"),
        ({}, ("--seed", "1", "--again"), "seed: 0 -> 1"),
        ({}, ("--restore", "/nowhere"), "is no folder"),
    ],
    ids=["rl", "mode", "refused", "settings", "restore"],
)
def test_what_cannot_work_is_said_with_the_remedy(
    model: Path, other: Path, tmp_path: Path, capsys: Any, trouble: Any, more: Any, words: str
) -> None:
    with FakeRolloutServer(model, **trouble) as server:
        out = tmp_path / "eval"
        given = [word.format(other=other) for word in more]
        if "--again" in given:
            given.remove("--again")
            assert main(command(server.url, model, out)) == 0
        assert main(command(server.url, model, out, *given)) == 1
        assert words in capsys.readouterr().err
        assert not server.paused


def test_a_changed_problem_is_noticed(
    server: FakeRolloutServer, model: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "eval"
    assert main(command(server.url, model, out)) == 0
    problems = tmp_path / "problems.jsonl"
    problems.write_text(problems.read_text().replace("What is 1", "How much is 1"))
    assert main(command(server.url, model, out)) == 1
    assert "had another prompt" in capsys.readouterr().err


def test_think_steps_keep_the_likely_tokens_of_the_think_phase_only() -> None:
    steps = np.zeros(4, STEP)
    steps["phase"] = [Phase.THINK, Phase.THINK, Phase.FORCED, Phase.ANSWER]
    steps["kind"] = [Kind.SOFT, Kind.SAMPLED, Kind.FORCED, Kind.SAMPLED]
    steps["token"], steps["entropy"] = [5, 6, 7, 8], [1.5, 0.25, 0, 0]
    top_ids = np.array([[5, 9], [6, 9]], np.int32)
    weights = np.array([[0.75, 0.25], [1.0, 1e-5]], np.float32)
    trace = Trace({}, steps, top_ids, weights)
    anything: Any = None
    made = generate.Generator(anything, anything, anything, lambda i: f"t{i}", anything)
    found = made._steps(trace, steps["phase"] == Phase.THINK)
    assert [(s.token, s.soft, s.entropy, s.top) for s in found] == [
        ("t5", True, 1.5, [("t5", 0.75), ("t9", 0.25)]),
        ("t6", False, 0.25, [("t6", 1.0)]),
    ]


# ---- likelihoods ---------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [[" seven more", " 12", " the answer"], ["x", "y"]])
def test_choices_have_the_likelihood_of_a_plain_forward_pass(
    model: Path, choices: list[str]
) -> None:
    loaded = likelihood.load_model(str(model), ModelConfig(device="cpu"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    item = Item("a", "Question: how many apples?\nAnswer:", choices, 0)
    row = likelihood.choice_row(loaded, tokenizer, item)
    for choice, found, tokens in zip(item.choices, row.log_likelihood, row.tokens):
        context = tokenizer(item.context)["input_ids"]
        ids = tokenizer(item.context + choice)["input_ids"]
        assert ids[: len(context)] == context
        with torch.no_grad():
            logits = loaded(torch.tensor([ids])).logits[0]
        logp = logits.log_softmax(-1)
        expected = sum(float(logp[t - 1, ids[t]]) for t in range(len(context), len(ids)))
        assert found == pytest.approx(expected, rel=1e-5)
        assert tokens == len(ids) - len(context)


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


def test_likelihoods_need_no_server_and_are_not_made_twice(
    model: Path, other: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    items = [{"question": f"q{i}", "choices": ["a b", "c", "d e f"], "answer": 1} for i in range(5)]
    (tmp_path / "mc.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "text.txt").write_text("One text, long enough.\n\nAnother text.\n")
    arguments = ["--out", str(tmp_path / "out"), "--model.path", str(model)]
    arguments += ["--checkpoints", "none=served", f"soft={other}", "--model.device", "cpu"]
    arguments += ["--choice.sets", f"own={tmp_path / 'mc.jsonl'}", "--report.replicates", "50"]
    arguments += ["--kl.texts", str(tmp_path / "text.txt")]
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
