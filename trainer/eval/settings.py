"""Ways of thinking: the paper's six (section 4.1) and any that a TOML file names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from softvllm.core.params import CoTParams
from trainer.collect import GREEDY_TAU
from trainer.config_file import from_mapping
from trainer.eval.config import SettingConfig
from trainer.eval.names import require_file_name

SAMPLED: dict[str, dict[str, Any]] = {
    "hard": {"temperature": 1.0},
    "soft": {"temperature": 0.5, "noise": "gaussian", "noise_scale": 0.33},
    "fuzzy": {"temperature": 1e-4, "noise": "gaussian", "noise_scale": 0.33},
}
"""Fields of each mode with chance, written out: a server's own defaults must not matter."""
NEUTRAL: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "min_think_tokens": 0,
    "cold_stop_steps": 2**31 - 1,
    "answer_greedy": False,
}
"""Fields that change nothing, sent for the same reason. JSON has no word for "no cold stop" (an
absent entropy is the server's), but one after so many steps never comes."""
GREEDY: dict[str, dict[str, Any]] = {
    "hard": {"temperature": GREEDY_TAU},
    "soft": {"temperature": 0.5, "noise": "none", "noise_scale": 0.0},
    "fuzzy": {"temperature": 1e-4, "noise": "none", "noise_scale": 0.0},
}
RESERVED = ("mode", "seed", "record", "record_top", "max_think_tokens", "answer_max_tokens")
"""Fields of `cot` that the evaluation sets."""
RESERVED_SAMPLING = ("max_tokens", "stop", "include_stop_str_in_output")


class AnswerSampling(msgspec.Struct, forbid_unknown_fields=True):
    """What the server takes as `sampling` (docs/server.md), less what the evaluation sets; here so
    that a slip is found before the first sample and not when its setting's turn comes."""

    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=-1)] = 0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    skip_special_tokens: bool = True


@dataclass(frozen=True)
class Setting:
    """How thoughts and answers of a cell are made."""

    name: str
    mode: str
    greedy: bool
    """Nothing is left to chance: one sample a problem."""
    cot: Mapping[str, Any]
    sampling: Mapping[str, Any]


def named(names: Sequence[str], defined: Mapping[str, Mapping[str, Any]]) -> list[Setting]:
    """The settings of these names.

    Raises:
        ValueError: an unknown name, or fields that contradict each other.
    """
    known = {**_six(), **{name: _from_toml(name, raw) for name, raw in defined.items()}}
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown setting {name!r}; known: {', '.join(known)}. A TOML table "
                f"[setting.{name}] defines a new one"
            )
    return [known[name] for name in names]


def _six() -> dict[str, Setting]:
    out = {}
    kinds = {"greedy": GREEDY, "sample": SAMPLED}
    for mode in SAMPLED:
        for kind, fields in kinds.items():
            name = f"{mode}-{kind}"
            cot = {**NEUTRAL, **fields[mode]}
            out[name] = Setting(name, mode, kind == "greedy", cot, {"temperature": 0.0})
    return out


def _from_toml(name: str, raw: Mapping[str, Any]) -> Setting:
    require_file_name(name, f"[setting.{name!r}]", "Choose another")
    if name in _six():
        raise ValueError(f"[setting.{name}]: the name is taken; choose another")
    place = f"setting.{name}."
    config: SettingConfig = from_mapping(raw, SettingConfig, place)
    for reserved, given, where in (
        (RESERVED, config.cot, "cot"),
        (RESERVED_SAMPLING, config.sampling, "sampling"),
    ):
        for field in reserved:
            if field in given:
                raise ValueError(f"{place}{where}.{field} is set by the evaluation; leave it out")
    try:
        params = CoTParams.from_dict({"mode": config.mode, **config.cot})
    except (TypeError, ValueError) as error:
        raise ValueError(f"[setting.{name}]: {error}") from None
    try:
        answers = msgspec.convert(config.sampling, AnswerSampling)
    except msgspec.ValidationError as error:
        raise ValueError(f"[setting.{name}] sampling: {error} (docs/server.md)") from None
    if wrong := [key for key in answers.logit_bias or () if not key.isdecimal()]:
        raise ValueError(
            f"[setting.{name}] sampling.logit_bias: keys are token ids, got {wrong[0]!r}"
        )
    sampling = {"temperature": 0.0, **config.sampling}
    chance = params.gamma > 0 or (config.mode == "hard" and params.tau > GREEDY_TAU)
    chance |= sampling["temperature"] > 0 or config.mode == "mixed"
    if config.greedy and chance:
        raise ValueError(
            f'[setting.{name}] says greedy but draws: set noise = "none" (hard: temperature = '
            f"{GREEDY_TAU:g}) and leave sampling.temperature at 0, or drop greedy"
        )
    cot = {**_explicit(params, config.cot), **config.cot}
    return Setting(name, config.mode, config.greedy or not chance, cot, sampling)


def _explicit(params: CoTParams, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a setting leaves open, written out."""
    out = {**NEUTRAL, "temperature": params.tau}
    if "cold_stop_entropy" in given:
        out["cold_stop_steps"] = params.cold_stop_steps
    if params.mode != "hard":
        out |= {"noise": "gaussian" if params.gamma else "none", "noise_scale": params.gamma}
    return out
