"""Files that are whole or absent, whenever the process is killed, and folders of one process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it."""
    draft = path.with_name(f".{path.name}.part")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(draft, path)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, for this process; the system lets go when it dies.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is writing to {folder}; wait for it, stop it, or choose another "
                "folder"
            ) from None
        except OSError:
            pass  # some network file systems have no locks; then nobody is kept out
        yield
