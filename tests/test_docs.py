"""What the manuals promise to list is listed, and their links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client import Counter

from server.metrics import METRICS
from server.rollout_request import RolloutSampling
from softvllm.core.params import CoTParams

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def listed(page: str) -> set[str]:
    """Names in code marks, in which `/x` and `_x` go on from the name before."""
    names: set[str] = set()
    for line in page.splitlines():
        last = ""
        for name in re.findall(r"`([^`\s]+)`", line):
            if name.startswith("/") and last:
                name = last.rpartition("/")[0] + name
            elif name.startswith("_") and last:
                names |= {last.rpartition("_")[0] + name, last + name}
                continue
            names.add(name)
            last = name if "/" in name else last
    return names


def test_the_servers_manual_lists_every_field_of_sampling_and_every_metric() -> None:
    page = text("server.md")
    assert [f for f in RolloutSampling.model_fields if f"`{f}`" not in page] == []
    metrics = [m for m in vars(METRICS).values() if hasattr(m, "describe")]
    assert len(metrics) >= 10
    names = [m._name + ("_total" if isinstance(m, Counter) else "") for m in metrics]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_the_parameters_manual_lists_every_field() -> None:
    page = text("parameters.md")
    assert [name for name in CoTParams.__dataclass_fields__ if f"`{name}`" not in page] == []


def test_the_trainers_manual_lists_every_metric_of_real_runs() -> None:
    names = listed(text("trainer.md"))
    logged: set[str] = set()
    for journal in (ROOT / "docs" / "results").glob("learning_*.jsonl"):
        logged |= {key for line in journal.open() for key in json.loads(line)}
    assert len(logged) > 60
    ends = re.compile(r"rollout/ended_|rollout/entropy_q")  # named by a pattern
    assert [n for n in sorted(logged - names - {"step"}) if not ends.match(n)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in slugs, target
