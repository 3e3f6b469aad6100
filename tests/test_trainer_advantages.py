"""Advantages against numbers worked out by hand and against their defining properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.advantages import advantages, zero_advantage_groups

GROUPS = torch.tensor([3, 8, 3, 8, 3])
REWARDS = torch.tensor([100.0, 10.0, 0.0, 10.0, 10.0])


def test_rloo_subtracts_the_mean_of_the_others():
    got = advantages(REWARDS, GROUPS)
    want = [100 - 5, 10 - 10, 0 - 55, 10 - 10, 10 - 50]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32))


def test_the_mean_baseline_includes_the_sample_itself():
    got = advantages(REWARDS, GROUPS, "mean")
    want = torch.tensor([100 - 110 / 3, 0.0, -110 / 3, 0.0, 10 - 110 / 3])
    torch.testing.assert_close(got, want)


def test_grpo_divides_by_the_standard_deviation():
    got = advantages(REWARDS, GROUPS, "grpo")
    three = got[GROUPS == 3]
    assert three.std().item() == pytest.approx(1.0, rel=1e-5)
    assert three.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert got[GROUPS == 8].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("estimator", ["rloo", "mean", "grpo"])
def test_a_group_of_one_is_an_error(estimator):
    with pytest.raises(ValueError, match=r"group 4 has one sample.*at least 2"):
        advantages(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 1, 4]), estimator)


def test_an_unknown_estimator_and_a_broken_reward_are_refused():
    with pytest.raises(ValueError, match="rloo, mean, grpo"):
        advantages(REWARDS, GROUPS, "ppo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not finite"):
        advantages(torch.tensor([1.0, torch.nan]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"must be \[N\]"):
        advantages(REWARDS, GROUPS[:3])


def test_groups_without_spread_are_counted():
    assert zero_advantage_groups(REWARDS, GROUPS) == 1
    assert zero_advantage_groups(torch.full((5,), 10.0), GROUPS) == 2


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 10.0, 100.0]), min_size=2, max_size=12), st.randoms())
def test_advantages_sum_to_zero_and_rloo_is_a_scaled_mean_baseline(rewards, random):
    r = torch.tensor(rewards)
    group = torch.zeros(len(r), dtype=torch.int64)
    rloo, mean = advantages(r, group), advantages(r, group, "mean")
    assert rloo.sum().item() == pytest.approx(0.0, abs=1e-3)
    torch.testing.assert_close(mean, rloo * (len(r) - 1) / len(r), rtol=1e-5, atol=1e-4)
    order = list(range(len(r)))
    random.shuffle(order)
    torch.testing.assert_close(advantages(r[order], group), rloo[order])
