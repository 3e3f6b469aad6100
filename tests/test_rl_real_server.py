"""The trainer against a real `softvllm serve --enable-rl`: weights arrive, agreement holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rl_runs import train
from safetensors.torch import load_file
from server_host import KEY, Server, environment, plain_model, running
from trainer_rollouts import single_thread

pytestmark = pytest.mark.engine

threads = pytest.fixture(single_thread, autouse=True, scope="module")
LORA = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
SHORT = {"rollout.max-think-tokens": 8, "rollout.answer-max-tokens": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rl_server(model: Path) -> Iterator[Server]:
    """Its weights change from test to test, so it is not the session's."""
    env = environment(VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")
    with running(model, ["--api-key", KEY, "--enable-rl", *LORA], env=env) as made:
        yield made


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTVLLM_API_KEY", KEY)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the reward's workers


def agrees(row: dict[str, Any], *, soft: bool) -> None:
    """What docs/trainer.md calls healthy, in float32."""
    assert row["agree/hard_kl"] < 1e-3
    if soft:
        assert row["agree/mean_gap"] < 0.02
    assert row["rollout/attempts"] == 1
    assert row["rollout/missing"] == row["rollout/unreadable"] == 0


def test_adapters_alone_travel_and_are_the_ones_that_sample(
    rl_server: Server, model: Path, tmp_path: Path
) -> None:
    rows = train(
        model,
        tmp_path / "run",
        rl_server.url,
        **SHORT,
        **{
            "steps": 3,
            "rollout.samples": 8,
            "model.lora-rank": 4,
            "model.table-gradient": "frozen",
            "sync.method": "lora",
            "optim.lr": "2e-2",
        },
    )
    # From the second step on, an engine that still sampled the base would show here.
    for row in rows:
        agrees(row, soft=True)
    moved = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert any(t.abs().max() > 1e-2 for name, t in moved.items() if "lora_B" in name)
    served = {entry["id"] for entry in rl_server.http.get("/v1/models").json()["data"]}
    assert served == {"tiny", next(name for name in served if name.endswith("-000003"))}


def test_soft_chains_are_learned_and_new_weights_arrive(
    rl_server: Server, model: Path, tmp_path: Path
) -> None:
    rows = train(
        model,
        tmp_path / "run",
        rl_server.url,
        **SHORT,
        **{
            "steps": 10,
            "rollout.samples": 32,
            "objective.soft-dims": "mean",
            "optim.lr": "6e-3",
            "checkpoint.every": 0,
            "validation.every": 5,
            "validation.problems": 2,
        },
    )
    steps = [row for row in rows if "grad/norm" in row]
    agreed = [row for row in steps if row["group/zero_advantage"] < 1]  # else none is computed
    assert len(agreed) >= 5
    for row in agreed:
        agrees(row, soft=True)
    distance = sum(row["agree/gaussian_distance"] for row in agreed[:5]) / 5
    assert distance == pytest.approx(1.0, abs=0.02)  # 2,560 steps of 64 coordinates
    rewards = [row["reward/mean"] for row in steps]
    assert sum(rewards[-4:]) > 2.0 * sum(rewards[:4])
    served = rl_server.http.get("/weight_info").json()["weight_version"]
    assert served.endswith("-000010")
    assert not rl_server.http.get("/is_paused").json()["is_paused"]


@pytest.mark.parametrize("mode", ["hard", "fuzzy"])
def test_the_other_modes_agree_with_the_server_too(
    rl_server: Server, model: Path, tmp_path: Path, mode: str
) -> None:
    rows = train(
        model, tmp_path / "run", rl_server.url, **SHORT, **{"rollout.mode": mode, "steps": 2}
    )
    for row in rows:
        agrees(row, soft=False)
