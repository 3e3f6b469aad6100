"""Step policies: what a think step feeds next. Pluggable, without touching the runners.

A policy sees one step of a batch of rows and answers with a `Decision`: a visible token and
the next input as a convex combination

    h = mix_weight * p E + sum_j extra_weights_j * E[extra_ids_j]

(noise is added afterwards by the engine). That form holds the two pure modes, the mixed ones
here, and what follows later: Gumbel-softmax or Dirichlet top-k and nearest neighbours
(mix_weight 0, re-weighted extras), Mixture of Inputs (mixture plus sampled token), K-sample
merges (K drawn extras). `register` adds one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch

from softvllm.core.mixture import Distribution

NUM_PARAMS = 4
"""Numbers a policy may take per request."""
NUM_STATES = 2
"""Floats a policy may carry from step to step; zeros at the start of a request."""


@dataclass(slots=True)
class StepContext:
    """One think step of B rows that share a policy."""

    dist: Distribution
    """The CoT distribution at tau on its support."""
    shadow: torch.Tensor
    """argmax of the unscaled distribution, int64 [B]."""
    entropy: torch.Tensor
    """Entropy of the unscaled distribution in nats, float32 [B]."""
    params: torch.Tensor
    """The policy's numbers in declared order, float32 [B, NUM_PARAMS]."""
    state: torch.Tensor
    """What the last step left, float32 [B, NUM_STATES]."""
    uniform: Callable[[int], torch.Tensor]
    """uniform(i): i-th float64 [B] draw of this step for the policy's own choices."""
    sample_uniform: Callable[[], torch.Tensor]
    """The float64 [B] draw that picks sampled tokens."""


@dataclass(slots=True)
class Decision:
    """What the rows show and feed."""

    token: torch.Tensor
    """Visible token, int64 [B]."""
    soft: torch.Tensor
    """True where the combination below is fed instead of the token's embedding, bool [B]."""
    sampled: torch.Tensor
    """True where the token was drawn at random, so that its log-prob counts, bool [B]."""
    mix_weight: torch.Tensor
    """Weight of p E, float32 [B]."""
    extra_ids: torch.Tensor | None = None
    """Further tokens, int64 [B, K]."""
    extra_weights: torch.Tensor | None = None
    """Their weights, float32 [B, K]."""
    state: torch.Tensor | None = None
    """State for the next step, float32 [B, NUM_STATES]; None: unchanged."""


class Policy(Protocol):
    """A step policy; `params` maps each parameter to (low, high, default), None = required."""

    @property
    def params(self) -> Mapping[str, tuple[float, float, float | None]]: ...

    @property
    def num_extra(self) -> int:
        """Columns of `Decision.extra_ids`, so that a record knows its width."""

    def decide(self, ctx: StepContext) -> Decision: ...


def _flags(like: torch.Tensor, value: bool) -> torch.Tensor:
    return torch.full_like(like, value, dtype=torch.bool)


@dataclass(frozen=True)
class Hard:
    """Ordinary CoT: the token is sampled from p at tau and fed (paper: tau = 1)."""

    params: Mapping[str, tuple[float, float, float | None]] = field(default_factory=dict)
    num_extra: int = 0

    def decide(self, ctx: StepContext) -> Decision:
        token = ctx.dist.sample(ctx.sample_uniform())
        off = _flags(token, False)
        return Decision(token, off, _flags(token, True), torch.zeros_like(ctx.entropy))


@dataclass(frozen=True)
class Soft:
    """The mixture alone (soft and fuzzy): the token shown is the shadow."""

    params: Mapping[str, tuple[float, float, float | None]] = field(default_factory=dict)
    num_extra: int = 0

    def decide(self, ctx: StepContext) -> Decision:
        on = _flags(ctx.shadow, True)
        return Decision(ctx.shadow, on, ~on, torch.ones_like(ctx.entropy))


@dataclass(frozen=True)
class Blend:
    """h = weight * p E + (1 - weight) * E[y] with a sampled token y."""

    params: Mapping[str, tuple[float, float, float | None]] = field(
        default_factory=lambda: {"weight": (0.0, 1.0, 0.5)}
    )
    num_extra: int = 1

    def decide(self, ctx: StepContext) -> Decision:
        token = ctx.dist.sample(ctx.sample_uniform())
        weight = ctx.params[:, 0]
        on = _flags(token, True)
        return Decision(token, on, on, weight, token[:, None], (1.0 - weight)[:, None])


@dataclass(frozen=True)
class Interleave:
    """Each step is soft with probability p, else hard."""

    params: Mapping[str, tuple[float, float, float | None]] = field(
        default_factory=lambda: {"p": (0.0, 1.0, 0.5)}
    )
    num_extra: int = 0

    def decide(self, ctx: StepContext) -> Decision:
        soft = ctx.uniform(0) < ctx.params[:, 0].to(torch.float64)
        return _switch(ctx, soft, None)


@dataclass(frozen=True)
class EntropySwitch:
    """Soft where the entropy is high, hard where it is low, with hysteresis.

    Turns soft at entropy >= `high` and hard at entropy < `low`; between the two the last
    choice stays. `soft_above` 0 exchanges the roles: soft where the model is sure. The first
    step starts soft.
    """

    params: Mapping[str, tuple[float, float, float | None]] = field(
        default_factory=lambda: {
            "low": (0.0, 1e3, None),
            "high": (0.0, 1e3, None),
            "soft_above": (0.0, 1.0, 1.0),
        }
    )
    num_extra: int = 0

    def decide(self, ctx: StepContext) -> Decision:
        low, high, above = ctx.params[:, 0], ctx.params[:, 1], ctx.params[:, 2] >= 0.5
        # state[:, 0]: 0 not yet decided, 1 entropy side "high", 2 side "low".
        side = ctx.state[:, 0]
        start = torch.where(above, 1.0, 2.0)
        side = torch.where(side == 0, start, side)
        side = torch.where(ctx.entropy >= high, 1.0, torch.where(ctx.entropy < low, 2.0, side))
        state = ctx.state.clone()
        state[:, 0] = side
        return _switch(ctx, (side == 1.0) == above, state)


def _switch(ctx: StepContext, soft: torch.Tensor, state: torch.Tensor | None) -> Decision:
    """Soft rows show the shadow, the others a sampled token."""
    drawn = ctx.dist.sample(ctx.sample_uniform())
    return Decision(
        torch.where(soft, ctx.shadow, drawn), soft, ~soft, soft.to(torch.float32), state=state
    )


_REGISTRY: dict[str, Policy] = {
    "hard": Hard(),
    "soft": Soft(),
    "blend": Blend(),
    "interleave": Interleave(),
    "entropy": EntropySwitch(),
}
_PURE = ("hard", "soft")


_everywhere: set[str] = set(_REGISTRY)
"""Policies that every process of an engine knows: the built-in ones and those of entry points."""
ENTRY_POINTS = "softvllm.policies"
"""Entry-point group; each entry is a `Policy` object, its name the policy's name."""


def load_entry_points() -> None:
    """Register the installed packages' policies; each of vLLM's processes does this."""
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name not in _REGISTRY:
            register(entry.name, entry.load())
        _everywhere.add(entry.name)


def known_everywhere(name: str) -> bool:
    """Whether the engine's other processes know the policy, too."""
    return name in _everywhere


def register(name: str, policy: Policy) -> None:
    """Add a policy for mode mixed in this process.

    An engine has several processes, so it only admits policies that a package offers as an
    entry point of the group `softvllm.policies`, loaded in each of them.
    """
    if name in _REGISTRY:
        raise ValueError(f"policy {name!r} exists already")
    if len(policy.params) > NUM_PARAMS:
        raise ValueError(f"policy {name!r} has {len(policy.params)} parameters, {NUM_PARAMS} fit")
    _REGISTRY[name] = policy


def names() -> tuple[str, ...]:
    """Policies that mode mixed may name."""
    return tuple(n for n in _REGISTRY if n not in _PURE)


def get(name: str) -> Policy:
    return _REGISTRY[name]


def validate(
    name: object, given: Mapping[str, Any], error: Callable[[str, str], Exception]
) -> None:
    """Refuse an unknown policy, unknown or missing parameters and values out of range."""
    if name not in names():
        raise error("policy", f"mode mixed needs one of {', '.join(names())}, got {name!r}")
    spec = _REGISTRY[str(name)].params
    for key, value in given.items():
        if key not in spec:
            takes = ", ".join(spec) or "no parameters"
            raise error("policy_params", f"{name} takes {takes}, got {key!r}")
        low, high, _ = spec[key]
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not low <= value <= high or not math.isfinite(value):
            raise error(
                "policy_params", f"{key} must be a number in [{low:g}, {high:g}], got {value!r}"
            )
    for key, (_, _, default) in spec.items():
        if default is None and key not in given:
            raise error("policy_params", f"{name} needs {key!r}")
    if name == "entropy" and given["low"] > given["high"]:
        raise error("policy_params", f"low must not exceed high, got {dict(given)}")


def values(name: str, given: Mapping[str, float]) -> list[float]:
    """The policy's numbers in declared order with defaults, padded to NUM_PARAMS."""
    spec = _REGISTRY[name].params
    out = [float(given.get(key, default or 0.0)) for key, (_, _, default) in spec.items()]
    return out + [0.0] * (NUM_PARAMS - len(out))
