"""Rows of data sets, from files and from the hub, each with the place it came from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

Row = tuple[str, Mapping[str, Any]]
"""Where it stands, for messages, and its fields."""


def of_file(path: str, split: str) -> Iterator[Row]:
    """Rows of a JSONL or parquet file, or of the split's file in a folder.

    Raises:
        ValueError: it does not exist or cannot be read; the message names file and line.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        found = [f for f in (file / f"{split}.jsonl", file / f"{split}.parquet") if f.exists()]
        if not found:
            raise ValueError(f"{file} holds neither {split}.jsonl nor {split}.parquet")
        file = found[0]
    if not file.is_file():
        raise ValueError(f"data file {file} does not exist")
    return _parquet(file) if file.suffix == ".parquet" else _jsonl(file)


def of_hub(path: str, configuration: str | None, split: str) -> Iterator[Row]:
    """Rows of a data set through `datasets`.

    Raises:
        ValueError: the package is missing, or the hub does not give the data set.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "data.source = hub needs the package datasets: pip install datasets; or download the "
            "data and give it as JSONL"
        ) from None
    try:
        found = datasets.load_dataset(path, configuration, split=split)
    except Exception as error:  # its errors without a network, name, configuration or split vary
        raise ValueError(
            f"the hub does not give {path}, split {split}: {error}. Correct data.path, "
            "data.hub_config and data.split, or download the data elsewhere and give the file: "
            "data.source = file, data.path = FILE.jsonl (or .parquet)"
        ) from None
    return ((f"{path}, split {split}, item {number}", row) for number, row in enumerate(found))


def text(value: Any, name: str) -> str:
    """A field that is a text, or a number as text. Everything else would become Python's way of
    writing it, which no answer matches.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name!r} holds half a surrogate pair") from None
        return value
    number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        got = "null" if value is None else f"{type(value).__name__} {value!r}"
        raise ValueError(f"{name!r} must be a text or a finite number, got {got[:80]}")
    return str(value)


def text_of(file: Path) -> str:
    """The content of a text file.

    Raises:
        ValueError: it is not UTF-8; the message names the line.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}, line {line}: byte {error.start} ({error.object[error.start]:#04x}) is not "
            f"UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8 {file.name}"
        ) from None


def _jsonl(file: Path) -> Iterator[Row]:
    # Not `splitlines`, which also ends a line at separators that may stand in a text.
    for number, line in enumerate(text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object")
        yield where, row


def _parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "parquet files need the package pyarrow: pip install datasets; or give JSONL"
        ) from None
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from None
    return ((f"{file}, item {number}", row) for number, row in enumerate(rows))
