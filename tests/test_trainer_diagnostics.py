"""The diagnostics give the number their docstrings promise on data with a known answer."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from trainer_rollouts import SIGMA, D, bare_batch, densities

from softvllm.core.noise import gaussian
from trainer import diagnostics

N = 4000


def drawn(dtype: torch.dtype = torch.float32):
    """A batch whose h~ is mu + sigma z with the noise of (seed, position), and mu."""
    seed, position = torch.arange(N) % 7, torch.arange(N) // 7
    mean = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    value = (mean + SIGMA * gaussian(seed, position, D)).to(dtype)
    batch = bare_batch(value, None, 4)
    soft = dataclasses.replace(batch.soft, seed=seed, position=position, row=torch.arange(N))
    return dataclasses.replace(batch, soft=soft), mean


def test_the_gaussian_distance_is_1_on_policy_and_shows_a_wrong_sigma():
    batch, mean = drawn()
    distance = diagnostics.gaussian_distance(densities(batch, mean))
    assert distance.shape == (N,)
    assert float(distance.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / (D * N)))
    assert float(distance.std()) == pytest.approx(math.sqrt(2 / D), rel=0.1)
    wrong = dataclasses.replace(
        batch, soft=dataclasses.replace(batch.soft, sigma=batch.soft.sigma * 2)
    )
    assert float(diagnostics.gaussian_distance(densities(wrong, mean)).mean()) == pytest.approx(
        0.25, rel=0.1
    )


def test_the_mean_gap_is_the_shift_of_the_mean_in_sigmas():
    batch, mean = drawn()
    assert float(diagnostics.mean_gap(batch, densities(batch, mean)).max()) < 1e-5
    shifted = densities(batch, mean + 0.1 * SIGMA)
    gap = diagnostics.mean_gap(batch, shifted)
    torch.testing.assert_close(gap, torch.full((N,), 0.1 * math.sqrt(D)), rtol=1e-4, atol=1e-5)
    some = diagnostics.mean_gap(batch, shifted, limit=50)
    assert len(some) == 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_floor_is_what_rounding_costs(dtype):
    batch, mean = drawn(dtype)
    gap = diagnostics.mean_gap(batch, densities(batch, mean))
    floor = diagnostics.rounding_floor(batch)
    assert float(floor.square().mean().sqrt()) == pytest.approx(
        float(gap.square().mean().sqrt()), rel=0.1
    )
    exact, _ = drawn()
    assert float(diagnostics.rounding_floor(exact).max()) < 1e-5


def test_the_mismatch_skips_tokens_without_a_rollout_log_prob():
    batch = bare_batch(None, torch.arange(3), 3)
    hard = torch.tensor([-1.0, -2.0, -3.0])
    rollout = torch.tensor([-1.0, -2.1, torch.nan])
    batch = dataclasses.replace(
        batch, hard=dataclasses.replace(batch.hard, rollout_log_prob=rollout)
    )
    got = diagnostics.hard_mismatch(batch, densities(batch, torch.zeros(0, D), hard))
    torch.testing.assert_close(got, torch.tensor([0.0, math.exp(0.1) - 1 - 0.1]))


def test_entropy_by_position_averages_what_each_position_has():
    mean, count = diagnostics.entropy_by_position(
        [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0]), torch.zeros(0)]
    )
    assert mean.tolist() == [2.0, 2.0, 3.0] and count.tolist() == [2, 1, 1]
    assert diagnostics.entropy_by_position([])[0].shape == (0,)


def test_the_summary_of_nothing_is_zero():
    nothing = {"mean": 0.0, "median": 0.0, "p99": 0.0, "max": 0.0}
    assert diagnostics.summary(torch.zeros(0)) == nothing
    assert diagnostics.summary(torch.tensor([1.0, 9.0, 2.0]))["median"] == 2.0
    got = diagnostics.summary(torch.arange(1000.0))
    assert got == {"mean": 499.5, "median": 499.0, "p99": 990.0, "max": 999.0}
