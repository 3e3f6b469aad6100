"""Data sets through `datasets`: what presets name can be loaded after the documented install."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from trainer import data
from trainer.config import DataConfig
from trainer.eval.choice import item_of

ROOT = Path(__file__).parent.parent
ROWS = [{"question": f"{i} plus 1?", "answer": f"So\n#### {i + 1}"} for i in range(3)]


def hub(path: Any, **more: Any) -> DataConfig:
    return DataConfig(source="hub", path=str(path), style="gsm8k", **more)


def test_rows_come_through_datasets_as_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = data.load(hub(tmp_path), None, 0)
    assert {(p.question, p.gold) for p in found.train} == {
        ("0 plus 1?", "1"),
        ("1 plus 1?", "2"),
        ("2 plus 1?", "3"),
    }
    same = data.load(DataConfig(path=str(tmp_path / "train.jsonl"), style="gsm8k"), None, 0)
    assert same.train == found.train


def test_parquet_files_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    found = data.load(DataConfig(path=str(tmp_path), style="gsm8k"), None, 0)
    assert sorted(p.gold for p in found.train) == ["1", "2", "3"]


def test_without_the_package_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        data.load(hub("openai/gsm8k"), None, 0)


def test_what_the_hub_does_not_give_is_told_with_the_way_around_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"openai/gsm8k.*no route.*data.source = file"):
        data.load(hub("openai/gsm8k"), None, 0)


def test_the_trainers_extra_has_what_its_presets_read_from() -> None:
    sources = {
        tomllib.loads(path.read_text()).get("data", {}).get("source")
        for path in (ROOT / "configs").glob("*.toml")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = " ".join(project["optional-dependencies"]["trainer"])
    for source, package in {"hub": "datasets", "reasoning_gym": "reasoning-gym"}.items():
        assert source in sources
        assert package in extra


def test_hellaswag_reads_the_same_with_its_parts_as_in_the_usual_harnesses() -> None:
    row = {"endings": ["sits.", "runs."], "label": "1", "activity_label": "Roof"}
    parts = {"ctx_a": "A man climbs.", "ctx_b": "then he"}
    whole = {"ctx": "A man climbs. then he"}
    hub_row = item_of({**row, **parts, **whole}, 0)  # as Rowan/hellaswag has it: all three
    assert hub_row.context == "Roof: A man climbs. Then he"
    assert item_of({**row, **parts}, 0) == hub_row
    wiki = item_of({**row, "ctx_a": "Go [title] now.", "ctx_b": "", "ctx": "Go [title] now."}, 0)
    assert wiki.context == "Roof: Go. now."
    assert item_of({**row, **whole}, 0).context == "Roof: A man climbs. then he"
