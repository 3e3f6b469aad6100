"""The trainer, killed at one chosen point: `python rl_dies.py MODULE.FUNCTION NTH ARGUMENTS...`.

The process ends without a word, as under SIGKILL, when the function is called for the Nth time.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from trainer import rl

CODE = 86


def die_at(place: str, nth: int) -> None:
    """Replace the function at `place` (package.module:attribute.attribute)."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os._exit(CODE)
        return original(*given, **named)

    setattr(owner, name, counted)


if __name__ == "__main__":
    die_at(sys.argv[1], int(sys.argv[2]))
    sys.exit(rl.main(sys.argv[3:]))
