"""Names that become names of files: of tasks, settings and multiple-choice sets."""

from __future__ import annotations

import unicodedata

LONGEST = 100
"""Bytes; file systems take 255, and there are endings to come."""
_UNPRINTED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, halves of pairs, separators of lines and paragraphs."""


def require_file_name(name: str, what: str, remedy: str) -> None:
    """Raise ValueError for a name that cannot be a file's or folder's.

    Args:
        what: the setting that gives it, for the message.
        remedy: how to give another.
    """
    wrong = ""
    if name in ("", ".", ".."):
        wrong = f"{name!r} is no name" if name else "the name is empty"
    elif "/" in name:
        wrong = f"{name!r} holds a slash"
    elif any(unicodedata.category(letter) in _UNPRINTED for letter in name):
        wrong = f"{name!r} holds characters that cannot be printed"
    elif len(name.encode()) > LONGEST:
        wrong = f"{name[:20]!r}... has {len(name.encode())} bytes, more than {LONGEST}"
    if wrong:
        raise ValueError(f"{what}: {wrong}; files are named by it. {remedy}")
