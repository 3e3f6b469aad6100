"""Problems of reasoning-gym: the same in every process, and mistakes that name what is possible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from trainer import data
from trainer.config import DataConfig

ROOT = Path(__file__).parent.parent
FINGERPRINT = """
from trainer import data
from trainer.config import DataConfig
config = DataConfig(source="reasoning_gym", task="ransom_note", size=5)
print(data.load(config, None, 0).fingerprint)
"""


def gym(**given: Any) -> DataConfig:
    return DataConfig(source="reasoning_gym", **{"size": 5, **given})


def test_a_task_that_walks_through_sets_is_the_same_in_every_process() -> None:
    def found(hashes: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            env={**os.environ, "PYTHONHASHSEED": hashes},
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert found("1") == found("2") != ""


def test_a_task_that_draws_from_the_shared_generator_is_the_same_each_time() -> None:
    config = gym(task="list_functions")
    first = data.load(config, None, 0).fingerprint
    data.gym._lines.cache_clear()
    assert data.load(config, None, 0).fingerprint == first


def test_sums_are_those_of_the_package_itself() -> None:
    """Results and runs that exist were made of them."""
    from reasoning_gym import create_dataset

    preset = tomllib.loads((ROOT / "configs" / "eval" / "smollm2_cpu.toml").read_text())
    for task in preset["task"].values():
        config = DataConfig(**{**task["data"], "split": "test", "limit": None, "repeated": "keep"})
        assert (config.source, config.task) == ("reasoning_gym", "chain_sum")
        found = data.load(config, None, 0).train
        seed = config.seed + 1_000_003
        made = create_dataset("chain_sum", size=config.size, seed=seed, **config.task_parameters)
        theirs = {f"chain_sum-test-{i}": entry for i, entry in enumerate(made)}
        assert {p.id: p.metadata["entry"] for p in found} == json.loads(json.dumps(theirs))
        assert {p.id: (p.question, p.gold) for p in found} == {
            name: (entry["question"], entry["answer"]) for name, entry in theirs.items()
        }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"task_parameters": {"min_term": 2}},
            r"chain_sum has no parameter 'min_term'.*min_terms = 2, max_terms = 6",
        ),
        (
            {"task_parameters": {"min_terms": 9, "max_terms": 2}},
            r"chain_sum refuses its parameters \(min_terms = 9, max_terms = 2\).*it has min_terms",
        ),
        (
            {"task_parameters": {"min_terms": "two"}},
            r"chain_sum refuses its parameters \(min_terms = 'two'\)",
        ),
        ({"task": "chain_sums"}, r"no task 'chain_sums'; did you mean chain_sum"),
        ({"task": "?"}, r"no task '\?'; it has .*chain_sum"),
        ({"size": 0}, "data.size must be at least 1"),
        ({"task_parameters": {"seed": 3}}, r"task_parameters.seed is not taken; set data\.seed"),
        (
            {"task_parameters": tomllib.loads("min_terms = 2024-07-26")},
            "task_parameters: .*date.*; give numbers",
        ),
    ],
)
def test_a_task_that_cannot_be_made_is_refused_with_what_is_possible(
    given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        data.load(gym(**given), None, 0)


def test_the_process_starts_without_torch() -> None:
    code = "import sys, trainer.gym as g; next(g._made('chain_sum', 1, 0, {})); "
    code += "sys.exit(not {'torch', 'transformers', 'vllm'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_process_that_dies_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.gym.FIXED, "PYTHONPATH", "")
    monkeypatch.setitem(data.gym.FIXED, "PYTHONHOME", "/nowhere")
    with pytest.raises(ValueError, match="chain_sum: its process ended with status"):
        data.load(gym(size=6), None, 0)
