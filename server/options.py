"""What `softvllm serve` knows beyond vLLM's flags, and its way to vLLM's server processes."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from softvllm.core.params import CoTParams, CoTParamsError

ENV = "SOFTVLLM_SERVER"
"""Environment variable that carries the options as JSON: vLLM may start several API processes."""
MODES = ("hard", "soft", "fuzzy", "mixed")


@dataclass(frozen=True)
class ServerOptions:
    """Options of one server."""

    default_mode: str | None = None
    """Mode of requests that name none; None: they stay stock vLLM requests."""
    cot: dict[str, Any] = field(default_factory=dict)
    """Defaults for fields of `CoTParams`, in place of the model's recipe."""
    enable_rl: bool = False
    """Whether vLLM's RL control routes are open."""

    def __post_init__(self) -> None:
        if self.default_mode is not None and self.default_mode not in MODES:
            raise ValueError(
                f"the default mode must be one of {', '.join(MODES)}, got {self.default_mode!r}"
            )
        for name in ("mode", "seed"):
            if name in self.cot:
                remedy = "use default_mode" if name == "mode" else "requests choose their own"
                raise ValueError(f"[cot] must not set {name}; {remedy}")
        try:
            # Mode mixed takes every field there is but needs a policy of its own.
            mode = "mixed" if "policy" in self.cot or "policy_params" in self.cot else "soft"
            CoTParams.from_dict({"mode": mode, **self.cot})
        except (CoTParamsError, TypeError) as error:
            raise ValueError(f"[cot] of the server's configuration: {error}") from None

    def to_env(self) -> dict[str, str]:
        return {ENV: json.dumps(asdict(self))}

    @classmethod
    def from_env(cls) -> ServerOptions:
        raw = os.environ.get(ENV)
        return cls(**json.loads(raw)) if raw else cls()


def load_config(path: str | Path) -> ServerOptions:
    """Read a TOML file: `default_mode`, table `[cot]`.

    Raises:
        ValueError: unreadable, not TOML, unknown keys or values out of range.
    """
    try:
        raw = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read --cot-config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--cot-config {path} is not TOML: {error}") from None
    unknown = set(raw) - {"default_mode", "cot"}
    if unknown or not isinstance(raw.get("cot", {}), dict):
        raise ValueError(
            f"--cot-config {path} takes default_mode and a table [cot], got "
            f"{', '.join(sorted(unknown)) or 'cot that is no table'}"
        )
    return ServerOptions(default_mode=raw.get("default_mode"), cot=raw.get("cot", {}))


def with_flags(base: ServerOptions, *, default_mode: str | None, enable_rl: bool) -> ServerOptions:
    """Command-line flags win over the file."""
    return replace(base, default_mode=default_mode or base.default_mode, enable_rl=enable_rl)
