"""Rewards to advantages: who did better than the other samples of the same prompt.

All three estimators subtract a baseline made of the group's own rewards, so none of them can
work with one sample per prompt; that is an error, never a silent baseline of 0.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

Estimator = Literal["rloo", "mean", "grpo"]
STD_FLOOR = 1e-6
"""Added to GRPO's standard deviation: a group without spread has advantage 0 all the same."""


def advantages(
    rewards: torch.Tensor, group: torch.Tensor, estimator: Estimator = "rloo"
) -> torch.Tensor:
    """Advantage of every sample, float32 [N]; constants as far as gradients go.

    - rloo (default, paper eq. 7-15): reward minus the mean of the *other* rewards of the group.
      Unbiased.
    - mean: REINFORCE with the group's mean, the sample itself included, as baseline. That is
      (G - 1) / G of RLOO.
    - grpo: `mean` divided by the group's standard deviation (unbiased, G - 1). The clipping that
      goes with GRPO is the objective's (`ratio="clip"`).

    Args:
        rewards: float [N].
        group: which samples belong together (same prompt), int [N]; groups may differ in size,
            as rollouts fail.

    Raises:
        ValueError: a group of one sample, a reward that is not finite, an unknown estimator.
    """
    if estimator not in get_args(Estimator):
        known = ", ".join(get_args(Estimator))
        raise ValueError(f"estimator must be one of {known}, got {estimator!r}")
    rewards, index, count = _grouped(rewards, group)
    if (count < 2).any():
        alone = int(group[(count[index] < 2).nonzero()[0, 0]])
        raise ValueError(
            f"group {alone} has one sample, so it has no baseline: sample at least 2 per prompt, "
            "and drop groups of which failures left one"
        )
    size = count[index]
    total = rewards.new_zeros(len(count)).index_add(0, index, rewards)[index]
    if estimator == "rloo":
        return (rewards - (total - rewards) / (size - 1)).float()
    centred = rewards - total / size
    if estimator == "grpo":
        square = rewards.new_zeros(len(count)).index_add(0, index, centred**2)[index]
        centred = centred / ((square / (size - 1)).sqrt() + STD_FLOOR)
    return centred.float()


def zero_advantage_groups(rewards: torch.Tensor, group: torch.Tensor) -> int:
    """Groups in which all rewards are equal: they teach nothing.

    Healthy: well below the number of groups. Near it, prompts are too easy or too hard (all
    right or all wrong), or the reward is broken.
    """
    rewards, index, count = _grouped(rewards, group)
    low = rewards.new_full((len(count),), torch.inf).scatter_reduce(0, index, rewards, "amin")
    high = rewards.new_full((len(count),), -torch.inf).scatter_reduce(0, index, rewards, "amax")
    return int((low == high).sum())


def _grouped(
    rewards: torch.Tensor, group: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards float64 [N], group index int64 [N] counted from 0, group sizes int64 [groups]."""
    if rewards.shape != group.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {list(rewards.shape)} and group {list(group.shape)} must be [N]")
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not finite; score failed rewards 0 and count them")
    _, index, count = group.unique(return_inverse=True, return_counts=True)
    return rewards.double(), index, count
