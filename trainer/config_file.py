"""Configurations from command line and TOML, and back.

    python -m trainer.rl --config configs/smollm2_cpu.toml --rollout-url URL --optim.lr 1e-5

The command line lies over the TOML file, the file over the defaults. A resolved copy is saved
beside the run; `--dry-run` prints it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec
import tyro

from trainer.config import Config
from trainer.server_address import shown

Settings = TypeVar("Settings")
"""A dataclass of settings: of a training run, of an evaluation."""
FREE_ON_RESUME = frozenset(
    {"config", "rollout_url", "resume", "dry_run", "record", "steps", "threads", "run"}
    | {"log", "checkpoint", "sync", "probe", "micro_batch_tokens"}
    | {"reward.workers", "reward.timeout", "reward.max_failure_rate", "model.checkpointing"}
    | {"rollout.timeout", "rollout.retry_for", "rollout.max_failure_rate"}
)
"""Settings that may change when a run goes on: they cost time or patience, not the result (but for
rounding). `steps` bends the learning-rate schedule. Error messages send users to some of these."""


def from_mapping(raw: Mapping[str, Any], cls: type = Config, where: str = "") -> Any:
    """A configuration from plain data (TOML, JSON).

    Raises:
        ValueError: an unknown key or a value of the wrong type; the message names the place.
    """
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        place = f"{where}{key}"
        if key not in hints:
            raise ValueError(f"unknown setting {place}; known here: {', '.join(sorted(hints))}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if not isinstance(value, Mapping):
                raise ValueError(f"{place} is a table of settings, got {value!r}")
            values[key] = from_mapping(value, kind, f"{place}.")
            continue
        try:
            values[key] = msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise ValueError(f"{place}: {error}") from None
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where.rstrip('.')}: {error}" if where else str(error)) from None


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Command line over TOML over defaults. Exits with usage on a wrong command line.

    Raises:
        ValueError: the file is missing or wrong, or settings contradict each other.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--"]:  # sets the script's arguments apart from torchrun's
        del arguments[0]
    base = base_of(arguments, Config)
    config = tyro.cli(
        Config, args=arguments, default=base, prog="python -m trainer.rl", description=__doc__
    )
    config.check()
    return config


def base_of(arguments: Sequence[str], kind: type[Settings]) -> Settings:
    """Where a command line starts from: its `--config` files, each over the ones before it, or
    defaults."""
    base, raw = kind(), dict[str, Any]()
    for at, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--config":
            path = value or (arguments[at + 1] if at + 1 < len(arguments) else "")
            raw = _over(raw, _raw(path))
            base = from_mapping(raw, kind)
    return base


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged, values replaced."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _over(out[key], value) if both else value
    return out


def read(path: str, kind: type[Settings]) -> Settings:
    """The settings in a TOML file, checked field by field."""
    settings: Settings = from_mapping(_raw(path), kind)
    return settings


def _raw(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path!r}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def load(path: str) -> Config:
    """The training run that a TOML file describes."""
    return read(path, Config)


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain data; absent values, the API key and a password in the URL are left out."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value is None or f.name == "api_key":
            continue
        if f.name == "rollout_url":
            value = shown(value)
        out[f.name] = to_mapping(value) if dataclasses.is_dataclass(value) else value
    return out


def to_toml(config: Config) -> str:
    """TOML that `load` reads back to the same configuration (but for the API key)."""
    return "\n".join(_toml(to_mapping(config), "")).lstrip("\n") + "\n"


def differences(before: Config, now: Config) -> list[str]:
    """Settings that differ and must not on resume: `name: old -> new`."""
    old, new = (_flat(to_mapping(c)) for c in (before, now))
    keys = [k for k in sorted(old | new) if not {k, k.split(".")[0]} & FREE_ON_RESUME]
    return [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)]


def _flat(raw: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{where}{key}.")
        else:
            out[f"{where}{key}"] = list(value) if isinstance(value, tuple) else value
    return out


def _toml(raw: Mapping[str, Any], where: str) -> list[str]:
    lines = [f"{_key(k)} = {_value(v)}" for k, v in raw.items() if not isinstance(v, Mapping)]
    for key, value in raw.items():
        if isinstance(value, Mapping):
            name = f"{where}{_key(key)}"
            inner = _toml(value, f"{name}.")
            if inner:
                lines += ["", f"[{name}]", *inner]
    return lines


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, (bool, str, int)):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value)
    raise ValueError(f"{value!r} has no TOML form")
