"""Pictures of several runs together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.plots import draw_together, main, running_mean


def _run(folder: Path, steps: int, reward: float) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"step": s, "reward/mean": reward + s, "grad/norm": 1.0, "validation/accuracy": 0.1}
        for s in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_running_mean_uses_what_there_is_at_the_start() -> None:
    assert running_mean([2.0, 4.0, 6.0, 8.0], 3) == [2.0, 3.0, 4.0, 6.0]
    assert running_mean([], 3) == []


def test_runs_are_drawn_into_one_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [_run(tmp_path / "hard", 8, 1.0), _run(tmp_path / "soft", 5, 2.0)]
    out = tmp_path / "both.png"
    assert main(["--together", str(out), *map(str, runs)]) == 0
    assert out.stat().st_size > 10_000
    assert str(out) in capsys.readouterr().out


def test_runs_of_one_name_are_not_confused(tmp_path: Path) -> None:
    runs = [_run(tmp_path / "a" / "soft", 3, 1.0), _run(tmp_path / "b" / "soft", 3, 2.0)]
    with pytest.raises(ValueError, match="same name"):
        draw_together(runs, tmp_path / "x.png")


def test_a_folder_that_is_no_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "metrics.jsonl" in capsys.readouterr().err
