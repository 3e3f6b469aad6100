"""Whole evaluations against an oracle behind the real wire: numbers, resume, checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_runs import EvalServer, command, eval_server, results_of, rows_of
from eval_scorers import by_hash
from fake_rollout_server import FakeRolloutServer
from rl_fixtures import other_model, surroundings, tiny_model
from trainer_rollouts import single_thread
from transformers import AutoModelForCausalLM

from softvllm.core.phases import Phase
from softvllm.core.trace import STEP, Kind, Trace
from trainer.eval import generate, window
from trainer.eval.__main__ import main

REPOSITORY = Path(__file__).parent.parent
threads = pytest.fixture(single_thread, autouse=True, scope="module")
model = pytest.fixture(tiny_model, scope="module")
other = pytest.fixture(other_model, scope="module")
server = pytest.fixture(eval_server)
around = pytest.fixture(surroundings, autouse=True)


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


def test_every_number_is_that_of_the_verdicts_on_its_own_samples(
    server: FakeRolloutServer, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    assert main(command(server.url, model, out)) == 0
    golds = {f"test-{i}": str(2 * i) for i in range(6)}
    for cell, samples in (("hard-greedy", 1), ("soft-sample", 3)):
        rows = rows_of(out, f"none/sums/{cell}")
        verdicts = [by_hash(row["answer"], golds[row["problem"]], {}) for row in rows]
        assert [row.get("correct", False) for row in rows] == [v.correct for v in verdicts]
        assert [row.get("extracted") for row in rows] == [v.extracted for v in verdicts]
        numbers = next(c for c in results_of(out)["cells"] if c["setting"] == cell)
        right = {
            p: [row.get("correct", False) for row in rows if row["problem"] == p] for p in golds
        }
        assert all(len(part) == samples for part in right.values())
        single = np.mean([np.mean(part) for part in right.values()])
        assert numbers["pass"]["1"][0] == pytest.approx(single)
        assert numbers["pass"][str(samples)][0] == pytest.approx(
            np.mean(list(map(any, right.values())))
        )
        cut = np.mean([row["seed"] % 3 == 0 for row in rows])
        assert numbers["answer_cut"] == pytest.approx(cut)
    assert 0 < single < 1 and 0 < cut < 1  # else the above could not fail
    read = {p: [row.get("extracted") for row in rows if row["problem"] == p] for p in golds}
    votes = [_vote(read[p], right[p]) for p in golds]
    assert numbers["majority"]["3"][0] == pytest.approx(np.mean(votes))
    assert numbers["pass"]["3"][0] != numbers["majority"]["3"][0] != numbers["pass"]["1"][0]


def _vote(read: list[str | None], right: list[bool]) -> float:
    """Chance that the most frequent readable answer of all is right."""
    counts = Counter(answer for answer in read if answer is not None)
    if not counts:
        return 0.0
    best = [answer for answer, count in counts.items() if count == max(counts.values())]
    return sum(any(r and a == answer for a, r in zip(read, right)) for answer in best) / len(best)


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
    sessions = (cut / "sessions.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in sessions] == ["begin"]
    before = len(server.samples_sent)
    assert main(arguments) == 0
    assert (cut / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    values = [cell["pass"]["1"][0] for cell in results_of(cut)["cells"]]
    assert len(set(values)) > 1 and 0 < max(values) < 1
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
    monkeypatch.setattr(window, "MOST_REQUESTS", 1)
    points = ("--checkpoints", f"soft={other}")
    assert main(command(server.url, model, tmp_path / "calm", *points)) == 0
    server.trouble.restart, server.trouble.cut = 1, [4, 2]
    server.trouble.unavailable = 1
    assert main(command(server.url, model, tmp_path / "storm", *points)) == 0
    calm, storm = (tmp_path / n / "results.json" for n in ("calm", "storm"))
    assert calm.read_bytes() == storm.read_bytes()


@pytest.mark.parametrize(
    ("trouble", "more", "words"),
    [
        ({"enable_rl": False}, ("--checkpoints", "soft={other}"), "--enable-rl"),
        ({"modes": ("hard",)}, (), "has no mode 'soft'"),
        ({"refuse_weights": "bad shape"}, ("--checkpoints", "soft={other}"), "bad shape"),
        ({}, ("--seed", "1", "--again"), "seed: 0 -> 1"),
        ({}, ("--restore", "/nowhere"), "is no folder"),
        ({}, ("--restore", "served"), "restore needs a folder"),
        ({"enable_rl": False}, ("--restore", "{other}"), "--enable-rl"),
    ],
    ids=["rl", "mode", "refused", "settings", "restore", "restore-served", "restore-rl"],
)
def test_what_cannot_work_is_said_with_the_remedy(
    model: Path, other: Path, tmp_path: Path, capsys: Any, trouble: Any, more: Any, words: str
) -> None:
    with EvalServer(model, **trouble) as server:
        out = tmp_path / "eval"
        given = [word.format(other=other) for word in more]
        if "--again" in given:
            given.remove("--again")
            assert main(command(server.url, model, out)) == 0
        assert main(command(server.url, model, out, *given)) == 1
        assert words in capsys.readouterr().err
        assert not server.paused
        if "--restore" in given:
            assert not server.samples_sent


def test_the_servers_slots_bound_what_is_asked_and_every_sample_is_counted_off(
    model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    made: list[window.Window] = []

    def noted(slots: int) -> window.Window:
        made.append(window.Window(slots))
        return made[-1]

    monkeypatch.setattr(generate, "Window", noted)
    with EvalServer(model, limits={"max_num_seqs": 5}) as server:
        server.trouble.fail = {(0, 0): "nan"}
        more = ("--max-failure-rate", "0.9")
        assert main(command(server.url, model, tmp_path / "eval", *more)) == 0
    (room,) = made
    assert room._slots == 5
    assert (room._requests, room._sampling, room._awaited, room._unjudged) == (0, 0, 0, 0)


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
