"""What settings may be, for the `check` of a configuration; each error names setting and remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

LONGEST = 1e6
"""Seconds; operating systems count a wait in milliseconds, with 31 bits."""


def at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def rate(name: str, value: float) -> None:
    """A share, which NaN is not."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a share, between 0 and 1, got {value}")


def seconds(name: str, value: float, zero: bool = False) -> None:
    """A time to wait; 0 only where it means not to."""
    if not 0 <= value <= LONGEST or (value == 0 and not zero):
        least = "from 0" if zero else "above 0 and"
        raise ValueError(f"{name} is in seconds, {least} up to {LONGEST:,.0f}, got {value}")


def plain(value: Any, name: str = "") -> None:
    """What JSON can hold, since requests and results are JSON: TOML also has dates and inf."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            plain(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, (list, tuple)):
        for at, inner in enumerate(value):
            plain(inner, f"{name}[{at}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}; leave it out for no limit")
    elif not (value is None or isinstance(value, (str, int, float))):
        raise ValueError(
            f"{name} = {value} is a {type(value).__name__}, which requests and results (JSON) "
            f'cannot hold; write it as text, "{value}"'
        )


def device(name: str, value: str, used: bool) -> None:
    """A device as torch names it, or auto.

    Args:
        used: whether it must be there.
    """
    if value == "auto":
        return
    try:
        found = torch.device(value)
    except RuntimeError:
        raise ValueError(
            f"{name} = {value!r} is no device; give cpu, cuda, cuda:1 or auto"
        ) from None
    if used and found.type == "cuda":
        there = torch.cuda.device_count()
        if (found.index or 0) >= there:
            raise ValueError(f"{name} = {value}, but torch sees {there} CUDA devices; give auto")
