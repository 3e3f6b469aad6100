"""Folders of weights: written whole or not at all, and refused unless they are exactly right."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from softvllm.core.checkpoint import (
    WeightFolderError,
    check_weights,
    write_marker,
    write_weights,
)
from softvllm.core.weight_folder import DTYPES, MARKER

FILE = "model.safetensors"


def some_tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "v1", some_tensors(), {"weight_version": "1"})


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


# ---- writing --------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    shard_bytes=st.sampled_from([1, 64, 1 << 20]),
    checksums=st.booleans(),
)
def test_what_is_written_is_what_is_read(
    shapes: list[tuple[torch.dtype, list[int]]], shard_bytes: int, checksums: bool
) -> None:
    tensors = {
        f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(shapes)
    }
    with tempfile.TemporaryDirectory() as place:
        folder = write_weights(
            Path(place) / "w", iter(tensors.items()), checksums=checksums, shard_bytes=shard_bytes
        )
        with check_weights(folder) as found:
            read = dict(found.tensors())
        # The files are ordinary safetensors files too.
        plain = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert read.keys() == plain.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(read[name], tensor)
        assert same(plain[name], tensor)


def test_views_and_tied_tensors_are_written_in_full(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(table)
    written = {"embed": parameter, "tied": table, "row": table[1], "turned": table.t()}
    with check_weights(write_weights(tmp_path / "w", written)) as found:
        for name, tensor in found.tensors():
            assert same(tensor, written[name].detach().contiguous())


def test_several_files_come_with_the_index_that_other_libraries_want(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "w", some_tensors(), shard_bytes=8)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == 30


def test_metadata_travels(folder: Path) -> None:
    with check_weights(folder) as found:
        assert found.metadata == {"weight_version": "1"}


def failing_tensors() -> Iterator[tuple[str, torch.Tensor]]:
    yield "a", torch.ones(2)
    raise RuntimeError("out of memory")


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        write_weights(tmp_path / "w", failing_tensors(), shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_version_is_never_overwritten(folder: Path) -> None:
    before = (folder / FILE).read_bytes()
    with pytest.raises(WeightFolderError, match="new folder"):
        write_weights(folder, {"a": torch.zeros(1)})
    assert (folder / FILE).read_bytes() == before
    empty = folder.parent / "empty"
    empty.mkdir()
    assert check_weights(write_weights(empty, some_tensors())).entries.keys() == {"a", "b"}


def test_names_that_come_twice_and_empty_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightFolderError, match="comes twice"):
        write_weights(tmp_path / "w", [("a", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(WeightFolderError, match="no tensors"):
        write_weights(tmp_path / "w", {})
    with pytest.raises(WeightFolderError, match="file to declare"):
        write_marker(tmp_path)


def test_a_folder_of_another_writer_needs_only_the_marker(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / FILE)
    with pytest.raises(WeightFolderError, match=MARKER):
        check_weights(tmp_path)
    write_marker(tmp_path, {"step": 3}, checksums=True)
    with check_weights(tmp_path) as found:
        assert found.metadata == {"step": 3}


# ---- refusing -------------------------------------------------------------------------------


def marker_with(folder: Path, **change: object) -> None:
    path = folder / MARKER
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def truncated(folder: Path) -> None:
    os.truncate(folder / FILE, (folder / FILE).stat().st_size - 1)


def consistently_truncated(folder: Path) -> None:
    """The marker was written for the short file."""
    truncated(folder)
    marker_with(folder, files={FILE: {"size": (folder / FILE).stat().st_size}})


def no_safetensors(folder: Path) -> None:
    (folder / FILE).write_bytes(b"\xff" * 100)
    marker_with(folder, files={FILE: {"size": 100}})


def huge_header(folder: Path) -> None:
    (folder / FILE).write_bytes((1 << 62).to_bytes(8, "little") + b"{}" * 10)
    marker_with(folder, files={FILE: {"size": 28}})


def header_of(header: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + b"\0" * 8
        (folder / FILE).write_bytes(data)
        marker_with(folder, files={FILE: {"size": len(data)}})

    return damage


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def a_pipe_instead(folder: Path) -> None:
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)


def second_file_with_same_tensor(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / "more.safetensors")
    write_marker(folder)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no marker": (lambda f: (f / MARKER).unlink(), "no marker file STABLE"),
    "half a marker": (lambda f: os.truncate(f / MARKER, 20), "is broken"),
    "marker of a list": (lambda f: (f / MARKER).write_text("[1]"), "is broken"),
    "marker of another format": (lambda f: marker_with(f, format=2), "format 2"),
    "marker without files": (lambda f: marker_with(f, files={}), "is broken"),
    "marker that climbs": (
        lambda f: marker_with(f, files={"../x.safetensors": {"size": 1}}),
        "is broken",
    ),
    "marker without sizes": (lambda f: marker_with(f, files={FILE: {}}), "is broken"),
    "file missing": (lambda f: (f / FILE).unlink(), "missing; copy it"),
    "file not listed": (
        lambda f: save_file({"z": torch.ones(1)}, f / "z.safetensors"),
        "does not list",
    ),
    "cut short": (truncated, "half copied"),
    "cut short before the marker": (consistently_truncated, "no complete safetensors file"),
    "not safetensors": (no_safetensors, "no header"),
    "huge header": (huge_header, "no header"),
    "header is a list": (header_of([1]), "unreadable header"),
    "unknown dtype": (header_of({"a": entry("F4")}), "unknown dtype"),
    "odd dtype": (header_of({"a": entry(["F32"])}), "unknown dtype"),
    "gap": (header_of({"a": entry("F32", [1], [4, 8])}), "out of place"),
    "negative shape": (header_of({"a": entry("F32", [-1, -2], [0, 8])}), "out of place"),
    "too few bytes": (header_of({"a": entry("F32", [3], [0, 8])}), "wrong number of bytes"),
    "spare bytes": (header_of({"a": entry("F32", [1], [0, 4])}), "instead of"),
    "no offsets": (header_of({"a": {"dtype": "F32", "shape": [2]}}), "unreadable header"),
    "a pipe": (a_pipe_instead, "no regular file"),
    "tensor twice": (second_file_with_same_tensor, "twice"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_the_reason(folder: Path, damage: str) -> None:
    change, reason = DAMAGES[damage]
    check_weights(folder).close()
    change(folder)
    with pytest.raises(WeightFolderError, match=reason):
        check_weights(folder)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000), file=st.sampled_from([FILE, MARKER]))
def test_no_prefix_of_a_file_passes_for_the_whole(cut: int, file: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = write_weights(Path(place) / "w", some_tensors())
        size = (folder / file).stat().st_size
        os.truncate(folder / file, cut % size)
        with pytest.raises(WeightFolderError):
            check_weights(folder)


def test_paths_that_are_no_absolute_folder_are_refused(folder: Path) -> None:
    for path, reason in (
        (os.path.relpath(folder), "relative path"),
        (folder / "nothing", "no folder"),
        (folder / FILE, "no folder"),
    ):
        with pytest.raises(WeightFolderError, match=reason):
            check_weights(path)


def test_checksums_find_what_sizes_cannot(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "w", some_tensors(), checksums=True)
    declared = json.loads((folder / MARKER).read_text())["files"][FILE]["sha256"]
    check_weights(folder, {FILE: declared.upper()}).close()
    with pytest.raises(WeightFolderError, match="not a file of"):
        check_weights(folder, {"other": declared})
    with pytest.raises(WeightFolderError, match="SHA-256"):
        check_weights(folder, {FILE: "0" * 64})
    data = bytearray((folder / FILE).read_bytes())
    data[-1] ^= 1
    (folder / FILE).write_bytes(data)
    with pytest.raises(WeightFolderError, match="SHA-256"):
        check_weights(folder)


def test_a_file_cut_short_while_read_is_an_error_and_not_a_crash(folder: Path) -> None:
    with check_weights(folder) as found:
        os.truncate(folder / FILE, 100)
        with pytest.raises(WeightFolderError, match="changed after it was checked"):
            found.check_unchanged()
        with pytest.raises(WeightFolderError, match="cut short"):
            dict(found.tensors())


def test_a_folder_deleted_after_the_check_can_still_be_read(folder: Path) -> None:
    with check_weights(folder) as found:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        found.check_unchanged()
        assert same(found.read("a"), some_tensors()["a"])
