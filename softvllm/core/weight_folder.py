"""Checking and reading a folder of weights; the format is told in `checkpoint.py`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

MARKER = "STABLE"
SUFFIX = ".safetensors"
FORMAT = 1
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 100_000_000  # the safetensors format's own limit
_MAX_MARKER = 64_000_000


class WeightFolderError(ValueError):
    """The folder cannot be used; the message says why and how to mend it."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: str
    """Name of the file inside the folder."""
    dtype: str
    """safetensors' name of the dtype, a key of `DTYPES`."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int


class WeightFolder:
    """A checked folder, held open: renaming or deleting it later takes nothing away.

    Tensors are read with plain reads, not mapped: a file that is cut short after the check gives
    an error here, where a mapping would kill the process.
    """

    def __init__(
        self,
        path: Path,
        files: dict[str, FileIO],
        entries: dict[str, TensorEntry],
        metadata: dict[str, Any],
    ) -> None:
        self.path, self.entries, self.metadata = path, entries, metadata
        self._files = files
        self._seen = {name: _identity(file) for name, file in files.items()}

    def check_unchanged(self) -> None:
        """Raise `WeightFolderError` if a file was written to since the check."""
        for name, file in self._files.items():
            if _identity(file) != self._seen[name]:
                raise WeightFolderError(
                    f"{self.path / name} changed after it was checked; write every version to a "
                    "new folder and leave it alone until the update is finished"
                )

    def read(self, name: str) -> torch.Tensor:
        """One tensor in memory of its own, on the CPU.

        Raises:
            WeightFolderError: the file has become shorter or cannot be read.
        """
        entry = self.entries[name]
        raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        view = raw.numpy()
        file, done = self._files[entry.file], 0
        try:
            file.seek(entry.start)
            while done < len(view):
                count = file.readinto(view[done:].data)
                if not count:
                    raise WeightFolderError(f"{self.path / entry.file} was cut short while read")
                done += count
        except OSError as error:
            raise WeightFolderError(f"cannot read {self.path / entry.file}: {error}") from None
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, one at a time."""
        return ((name, self.read(name)) for name in self.entries)

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold NaN or infinity; reads every file once."""
        floats = (
            (name, tensor.float() if tensor.itemsize == 1 else tensor)
            for name, tensor in self.tensors()
            if tensor.is_floating_point()
        )
        # A sum is one pass without a mask in memory, and NaN or infinity stay in it.
        return [name for name, t in floats if not torch.isfinite(t.sum(dtype=torch.float32))]

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check_weights(folder: str | Path, checksums: Mapping[str, str] | None = None) -> WeightFolder:
    """Open a folder after checking that it is complete and every file readable.

    Args:
        folder: absolute path.
        checksums: SHA-256 in hexadecimal by file name, on top of those in the marker.

    Raises:
        WeightFolderError: not absolute, not a folder, no or a broken marker, a file missing,
            extra, of another size or content than declared, no safetensors file, or a tensor
            twice.
    """
    path = Path(folder)
    if not path.is_absolute():
        raise WeightFolderError(f"{path} is a relative path; give the absolute path of the folder")
    if not path.is_dir():
        raise WeightFolderError(f"{path} is no folder that this server can see; is it mounted?")
    declared, metadata = _read_marker(path)
    extra = sorted(p.name for p in path.glob(f"*{SUFFIX}") if p.name not in declared)
    if extra:
        raise WeightFolderError(
            f"{path} holds {', '.join(extra[:5])}, which its marker {MARKER} does not list; write "
            "every version to a new folder"
        )
    unknown = sorted(set(checksums or {}) - set(declared))
    if unknown:
        raise WeightFolderError(f"checksums name {', '.join(unknown[:5])}, not a file of {path}")
    files: dict[str, FileIO] = {}
    entries: dict[str, TensorEntry] = {}
    try:
        for name, facts in declared.items():
            files[name] = file = open_file(path / name)
            size = os.fstat(file.fileno()).st_size
            if size != facts["size"]:
                raise WeightFolderError(
                    f"{path / name} has {size} bytes, its marker says {facts['size']}: it is half "
                    "copied; copy it again, the marker last"
                )
            for tensor, entry in read_header(file, name).items():
                if tensor in entries:
                    raise WeightFolderError(f"{path} holds tensor {tensor} twice; give it once")
                entries[tensor] = entry
            for wanted in (facts.get("sha256"), (checksums or {}).get(name)):
                if wanted is not None and sha256(file) != wanted.lower():
                    raise WeightFolderError(
                        f"{path / name} does not have the declared SHA-256: its content is "
                        "damaged; write or copy it again"
                    )
        return WeightFolder(path, files, entries, metadata)
    except BaseException:
        for file in files.values():
            file.close()
        raise


def read_header(file: FileIO, name: str) -> dict[str, TensorEntry]:
    """Tensors of one safetensors file, checked to fill it exactly.

    Raises:
        WeightFolderError: it is no complete safetensors file.
    """

    def broken(what: str) -> WeightFolderError:
        return WeightFolderError(f"{name} is no complete safetensors file ({what}); write it again")

    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise broken("no header")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {
            str(tensor): TensorEntry(
                name,
                str(facts["dtype"]),
                tuple(int(n) for n in facts["shape"]),
                8 + length + int(facts["data_offsets"][0]),
                8 + length + int(facts["data_offsets"][1]),
            )
            for tensor, facts in header.items()
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise broken("unreadable header") from None
    position = 8 + length
    for tensor, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.dtype not in DTYPES:
            raise broken(f"tensor {tensor} has unknown dtype {entry.dtype}")
        expected = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if min(entry.shape, default=0) < 0 or entry.start != position:
            raise broken(f"tensor {tensor} is out of place")
        if entry.stop - entry.start != expected:
            raise broken(f"tensor {tensor} has the wrong number of bytes")
        position = entry.stop
    if position != size:
        raise broken(f"{size} bytes instead of {position}")
    return found


def _read_marker(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    marker = path / MARKER
    if not marker.is_file():
        raise WeightFolderError(
            f"{path} has no marker file {MARKER}: it is not complete; write it with "
            "softvllm.core.checkpoint.write_weights, or write_marker as the last step"
        )
    try:
        with marker.open("rb") as file:
            raw = json.loads(file.read(_MAX_MARKER))
        if raw["format"] != FORMAT:
            raise WeightFolderError(f"{marker} has format {raw['format']}, known is {FORMAT}")
        files, metadata = raw["files"], raw.get("metadata", {})
        valid = isinstance(metadata, dict) and bool(files) and all(map(_is_listed, files.items()))
    except WeightFolderError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise WeightFolderError(
            f"{marker} is broken; it must be JSON as softvllm.core.checkpoint.write_marker "
            "writes it"
        )
    return files, metadata


def _is_listed(item: tuple[Any, Any]) -> bool:
    """Whether a marker's entry is a plain file name with a size and maybe a SHA-256."""
    name, facts = item
    plain = name == os.path.basename(name) and name.endswith(SUFFIX) and name[0] != "."
    checksum = facts.get("sha256", "")
    return plain and type(facts["size"]) is int and isinstance(checksum, str)


def open_file(path: Path) -> FileIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise WeightFolderError(f"{path} is no regular file")
        return FileIO(path)
    except FileNotFoundError:
        raise WeightFolderError(
            f"{path} is listed in the marker but missing; copy it, the marker last"
        ) from None
    except OSError as error:
        raise WeightFolderError(f"cannot read {path}: {error.strerror}") from None


def _identity(file: FileIO) -> tuple[int, int]:
    facts = os.fstat(file.fileno())
    return facts.st_size, facts.st_mtime_ns


def sha256(file: FileIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()
