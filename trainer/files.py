"""Files that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it."""
    draft = path.with_name(f".{path.name}.part")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(draft, path)
