"""Files of rows on a disk that fills up, and how many of them are open."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from trainer.eval.store import Row, Store


def row(number: int, length: int = 10) -> Row:
    return Row(problem=f"p{number}", sample=0, seed=number, prompt="x", think="t" * length)


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """As on a full disk, the system writes the part that fits and then refuses."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("length", [100, 20_000], ids=["short", "long"])
def test_a_row_that_did_not_fit_is_as_if_it_had_never_come(tmp_path: Path, length: int) -> None:
    path = tmp_path / "s.jsonl"
    store = Store(path, {"a": 1}, Row)
    store.append(row(0, 9000))
    whole = path.read_bytes()
    with no_room_beyond(len(whole) + length // 2), pytest.raises(OSError) as raised:
        store.append(row(1, length))
    assert raised.value.errno == errno.EFBIG
    assert path.read_bytes() == whole and store.missing([("p1", 0)])
    store.append(row(2, length))  # there is room again
    store.append(row(1, length))
    store.close()
    again = Store(path, {"a": 1}, Row)
    assert [r.key for r in again.rows()] == [("p0", 0), ("p2", 0), ("p1", 0)]


def test_half_a_row_that_could_not_be_removed_at_once_is_removed_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.jsonl"
    store = Store(path, {"a": 1}, Row)
    store.append(row(0))

    def broken(*given: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        # A subclass, as methods of built-in classes cannot be replaced.
        patch.setattr("trainer.eval.store.FileIO", type("Stuck", (FileIO,), {"truncate": broken}))
        store.close()
        with no_room_beyond(path.stat().st_size + 50), pytest.raises(OSError):
            store.append(row(1, 100))
        assert not path.read_bytes().endswith(b"\n")
        with pytest.raises(OSError):
            store.append(row(2))
    store.close()
    store.append(row(3))
    assert [r.key for r in Store(path, {"a": 1}, Row).rows()] == [("p0", 0), ("p3", 0)]


def test_a_file_without_rows_takes_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    Store(path, {"seed": 1}, Row)
    store = Store(path, {"seed": 2}, Row)
    store.append(row(0))
    store.close()
    assert [r.key for r in Store(path, {"seed": 2}, Row).rows()] == [("p0", 0)]
    with pytest.raises(ValueError, match="seed: 2 -> 3"):
        Store(path, {"seed": 3}, Row)


def test_files_are_open_only_while_rows_are_written(tmp_path: Path) -> None:
    def held() -> list[str]:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return [f for f in map(os.path.realpath, links) if f.startswith(str(tmp_path))]

    stores = [Store(tmp_path / f"{i}.jsonl", {}, Row) for i in range(3)]
    assert held() == []
    stores[1].append(row(0))
    assert held() == [str(tmp_path / "1.jsonl")]
    stores[1].close()
    stores[2].replace(row(0))
    assert held() == []
    stores[1].append(row(1))
    stores[1].close()
    assert len(list(stores[1].rows())) == 2
