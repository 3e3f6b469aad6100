"""The step benchmark runs at tiny sizes and reports what it says it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_rollout_server import FakeRolloutServer
from rl_runs import arguments
from tiny_models import tiny_llama
from trainer_rollouts import single_thread

from trainer import bench_step

threads = pytest.fixture(single_thread, autouse=True, scope="module")


def test_every_side_of_the_comparison_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the reward's workers
    model, out = tiny_llama(tmp_path / "model"), tmp_path / "step.json"
    with FakeRolloutServer(model) as server:
        flags = arguments(model, tmp_path / "unused", server.url, **{"probe.samples": 0})
        monkeypatch.setattr("sys.argv", ["bench_step", "--rounds", "1", "--out", str(out), *flags])
        bench_step.main()
    report = json.loads(out.read_text())
    assert set(report["loop"]) == {"hard", "soft", "fuzzy", "plain_hard", "plain_soft"}
    for side in report["loop"].values():
        assert side["tokens_per_second"] > 0
        assert side["step_seconds"] >= side["rollout_seconds"]
    assert report["same_tokens"]["soft_terms"] == 2 * 3 * 6  # prompts, samples, think tokens
    assert report["same_tokens"]["soft_over_hard"] > 0
    assert report["head"]["plain"]["peak_mib"] > 100 < report["head"]["fused"]["peak_mib"]
