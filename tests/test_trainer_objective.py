"""The loss: an unbiased gradient where it is known, the same for any split, and its options."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_llama
from trainer_rollouts import (
    ASKED,
    MODES,
    SIGMA,
    D,
    bare_batch,
    densities,
    episodes_of,
    roll,
    single_thread,
)

from softvllm.core.noise import gaussian
from softvllm.core.oracle import Oracle
from trainer import head
from trainer.forward import Densities, Policy
from trainer.learn import Learner
from trainer.objective import Loss, Normaliser, ObjectiveConfig, kl_terms, loss
from trainer.packing import Batch, group_batches, micro_batches, pack
from trainer.reading import episode_of_trace

V = 5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    yield from single_thread()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> Oracle:
    return Oracle.load(str(tiny_llama(tmp_path_factory.mktemp("llama"))))


@pytest.fixture(scope="module")
def episodes(oracle):
    return episodes_of(oracle, (*MODES, *MODES))


@pytest.fixture(scope="module")
def siblings(oracle):
    """Two prompts with a sample of every mode each, alternating."""
    runs = [
        roll(oracle, length, seed=length, tokens=12 + i, **cot)
        for i, cot in enumerate(MODES.values())
        for length in (7, 5)
    ]
    return [episode_of_trace(ids, trace, ASKED) for ids, trace in runs]


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden state [1, d], tied table [V, d] and reward direction [d], float64."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, D, generator=g, dtype=torch.float64)
    table = torch.randn(V, D, generator=g, dtype=torch.float64)
    return hidden, table, torch.randn(D, generator=g, dtype=torch.float64)


def noise(n: int) -> torch.Tensor:
    return gaussian(torch.full((n,), 11), torch.arange(n), D).double()


@pytest.mark.parametrize("mode", ["soft", "fuzzy"])
def test_the_score_function_estimates_the_known_gradient_of_one_gaussian_step(mode):
    """Reward a.h~ has the expectation a.mu, whose gradient is known."""
    n = 200_000
    hidden, table, a = problem()
    tau = 0.5
    if mode == "fuzzy":
        # Away from ties the gradient at tau 1e-4 is 0; here two tokens are 1e-4 nats apart.
        tau = 1e-4
        order = (hidden @ table.t())[0].argsort(descending=True)
        first, second = table[order[0]], table[order[1]]
        lift = (hidden[0] @ (first - second) - 1e-4) / hidden[0].square().sum()
        table[order[1]] += lift * hidden[0]
    table.requires_grad_()
    taus = torch.full((1,), tau)
    mean, _ = head.soft_mean(hidden, table, table, taus)
    (want,) = torch.autograd.grad(mean[0] @ a, table)

    value = mean.detach() + SIGMA * noise(n)
    batch = bare_batch(value, None, n)
    again, _ = head.soft_mean(hidden, table, table, taus)
    reward = value @ a
    baseline = (mean.detach() @ a)[0]
    share = loss(
        batch, densities(batch, again.expand(n, -1)), reward - baseline, Normaliser(n, n),
        ObjectiveConfig(),
    )  # fmt: skip
    (got,) = torch.autograd.grad(-share.total, table)
    assert float((got - want).norm() / want.norm()) < 0.03
    assert float(want.norm()) > 0.1


def test_the_score_function_estimates_the_gradient_of_two_steps():
    """The second mean depends on the first sample, a constant in the loss. Reference: the
    pathwise derivative through both, on the same draws."""
    n = 100_000
    hidden, table, a = problem(1)
    table.requires_grad_()
    tau, z1, z2 = torch.full((n,), 0.5), noise(n), noise(2 * n)[n:]

    def chain(x1: torch.Tensor) -> torch.Tensor:
        return head.soft_mean(torch.tanh(x1), table, table, tau)[0]

    mean1 = head.soft_mean(hidden, table, table, tau[:1])[0].expand(n, -1)
    x1 = mean1 + SIGMA * z1
    x2 = chain(x1) + SIGMA * z2
    (want,) = torch.autograd.grad((x2 @ a).mean(), table)

    x1, x2 = x1.detach(), x2.detach()
    value = torch.stack((x1, x2), dim=1).flatten(0, 1)
    batch = bare_batch(value, None, n)
    first = head.soft_mean(hidden, table, table, tau[:1])[0].expand(n, -1)
    mean = torch.stack((first, chain(x1)), dim=1).flatten(0, 1)
    reward = x2 @ a
    share = loss(
        batch, densities(batch, mean), reward - reward.mean(), Normaliser(n, 2 * n),
        ObjectiveConfig(),
    )  # fmt: skip
    (got,) = torch.autograd.grad(-share.total, table)
    assert float((got - want).norm() / want.norm()) < 0.05


def test_the_score_function_gives_the_exact_gradient_of_a_hard_step():
    """All tokens once, weighted by their probability: the expectation itself, no sampling."""
    hidden, table, _ = problem(2)
    table.requires_grad_()
    reward = torch.tensor([100.0, 10.0, 0.0, 0.0, 10.0], dtype=torch.float64)
    p = torch.softmax(hidden @ table.t(), -1)[0]
    (want,) = torch.autograd.grad(p @ reward, table)
    tokens, rows = torch.arange(V), hidden.expand(V, -1)
    log_prob, _ = head.token_log_prob(rows, table, tokens, torch.ones(V))
    batch = bare_batch(None, tokens, V)
    now = densities(batch, torch.zeros(0, D, dtype=torch.float64), log_prob)
    weights = p.detach() * reward * V
    share = loss(batch, now, weights, Normaliser(V, V), ObjectiveConfig())
    (got,) = torch.autograd.grad(-share.total, table)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_default_is_the_papers_loss(oracle, episodes):
    """-(1 / BG) sum A sum log pi, think and answer alike, nothing else."""
    batch = pack(episodes)
    with torch.no_grad():
        now = Policy(copy.deepcopy(oracle.model))(batch)
    a = torch.linspace(-50, 90, len(episodes))
    share = loss(batch, now, a, Normaliser.of(episodes), ObjectiveConfig())
    total = 0.0
    for i in range(len(episodes)):
        mine = now.soft[batch.soft.sequence == i].sum() + now.hard[batch.hard.sequence == i].sum()
        total -= float(a[i]) * float(mine) / len(episodes)
    assert float(share.total) == pytest.approx(total, rel=1e-5)
    parts = share.soft + share.think + share.answer
    assert float(parts) == pytest.approx(total, rel=1e-5)
    assert float(share.kl) == 0.0 == float(share.entropy)


def reference_policy(oracle: Oracle) -> Policy:
    other = copy.deepcopy(oracle.model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.01)
    return Policy(other)


CONFIGS = {
    "paper": ObjectiveConfig(),
    "grpo": ObjectiveConfig(ratio="clip", soft_dims="mean", lengths="sequence"),
    "everything": ObjectiveConfig(
        ratio="plain", soft_dims="mean", lengths="batch", correction="truncate", kl_coef=0.1,
        entropy_coef=0.01,
    ),
}  # fmt: skip


@pytest.mark.parametrize("share", [False, True], ids=["whole", "shared_prompts"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradient_do_not_depend_on_split_or_order(
    oracle, episodes, siblings, config, share
):
    """With shared prompts the splits cut through groups: a prompt is read in several parts."""
    episodes = siblings if share else episodes
    normaliser = Normaliser.of(episodes)
    a = torch.linspace(-1, 1.5, len(episodes))
    reference, before = reference_policy(oracle), Policy(copy.deepcopy(oracle.model))
    lengths = [e.num_inputs for e in episodes]
    count = len(episodes)
    splits = [
        [list(range(count))],
        [[i] for i in reversed(range(count))],
        micro_batches(lengths, 2 * max(lengths)),
        group_batches(
            [tuple(e.prompt_ids.tolist()) for e in episodes],
            [len(e.prompt_ids) for e in episodes],
            [len(e.token) - 1 for e in episodes],
            2 * max(lengths),
        ),
        [[3, 1, 7], [0, 9], [2, 8, 4, 5, 6]],
    ]
    results = []
    for split in splits:
        policy = reference_policy(oracle)
        with torch.no_grad():
            for p in policy.parameters():
                p.mul_(0.995)
        total = 0.0
        for members in split:
            # The first pass reads every prompt anew for each sample: what all others must equal.
            batch = pack([episodes[i] for i in members], share and bool(results))
            with torch.no_grad():
                old, ref = before(batch), reference(batch)
            now = policy(batch, with_entropy=True)
            share = loss(batch, now, a[members], normaliser, config, old=old, reference=ref)
            share.total.backward()
            total += share.total.item()
        results.append((total, [p.grad for p in policy.parameters()]))
    first_total, first = results[0]
    for total, grads in results[1:]:
        assert total == pytest.approx(first_total, rel=1e-4)
        for got, want in zip(grads, first):
            assert float((got - want).norm()) <= 1e-3 * float(want.norm())


def test_old_densities_keep_no_memory_of_the_means():
    batch, now = simple()
    learner = SimpleNamespace(policy=lambda batch: now, device="cpu")
    old = Learner._old(learner, batch)
    assert torch.equal(old.soft, now.soft) and torch.equal(old.hard, now.hard)
    assert old.mean.shape == (0, D)
    assert old.mean.untyped_storage().nbytes() == 0


def simple(samples: int = 2) -> tuple[Batch, Densities]:
    g = torch.Generator().manual_seed(4)
    batch = bare_batch(torch.randn(samples, D, generator=g), torch.arange(samples), samples)
    mean = torch.randn(samples, D, generator=g).mul_(0.1).requires_grad_()
    hard = torch.tensor([-1.0, -2.0, -0.5, -3.0])[:samples].requires_grad_()
    return batch, densities(batch, mean, hard)


def grads_of(share: Loss, now: Densities) -> tuple[torch.Tensor, torch.Tensor]:
    soft, hard = torch.autograd.grad(share.total, (now.mean, now.hard))
    return soft, hard


@pytest.mark.parametrize("ratio", ["plain", "clip"])
def test_at_the_sampling_weights_a_ratio_has_the_score_functions_gradient(ratio):
    batch, now = simple()
    a, n = torch.tensor([1.0, -2.0]), Normaliser(2, 4)
    want = grads_of(loss(batch, now, a, n, ObjectiveConfig()), now)
    batch, now = simple()
    share = loss(batch, now, a, n, ObjectiveConfig(ratio=ratio), old=now.detach())
    for got, expected in zip(grads_of(share, now), want):
        torch.testing.assert_close(got, expected)


def test_the_ratio_moves_when_the_weights_do():
    """The mistake of taking the new densities for the old ones would leave it at 1."""
    batch, now = simple()
    old = Densities(now.soft.detach() - 0.2, now.mean.detach(), now.hard.detach() - 0.1, None)
    share = loss(
        batch, now, torch.ones(2), Normaliser(2, 4), ObjectiveConfig(ratio="plain"), old=old
    )
    assert share.sums["ratio_soft"][0] / 2 == pytest.approx(math.exp(0.2), rel=1e-5)
    assert share.sums["ratio_hard"][0] / 2 == pytest.approx(math.exp(0.1), rel=1e-5)
    with pytest.raises(ValueError, match="needs `old`"):
        loss(batch, now, torch.ones(2), Normaliser(2, 4), ObjectiveConfig(ratio="plain"))


def test_the_clip_stops_gradients_that_would_move_further_out():
    batch, now = simple(4)
    shift = torch.tensor([0.5, 0.5, -0.5, -0.5])  # log ratio of the hard tokens
    old = Densities(now.soft.detach(), now.mean.detach(), now.hard.detach() - shift, None)
    a = torch.tensor([1.0, -1.0, 1.0, -1.0])
    config = ObjectiveConfig(ratio="clip", clip_low=0.2, clip_high=0.3)
    share = loss(batch, now, a, Normaliser(4, 8), config, old=old)
    _, hard = grads_of(share, now)
    assert (hard != 0).tolist() == [False, True, True, False]
    assert share.sums["clipped_hard"] == (2.0, 4.0)


def test_a_huge_soft_log_ratio_stays_finite():
    batch, now = simple()
    old = Densities(now.soft.detach() - 1e4, now.mean.detach(), now.hard.detach(), None)
    config = ObjectiveConfig(ratio="plain", max_log_ratio=3.0)
    share = loss(batch, now, torch.ones(2), Normaliser(2, 4), config, old=old)
    assert share.sums["ratio_soft"][0] / 2 == pytest.approx(math.exp(3.0), rel=1e-5)
    soft, hard = grads_of(share, now)
    assert not bool(soft.any()) and bool(hard.all())


def test_length_and_dimension_normalise_as_named():
    batch, now = simple()
    a, n = torch.tensor([1.0, 1.0]), Normaliser(10, 50)

    def total(**options) -> float:
        return loss(batch, now, a, n, ObjectiveConfig(**options)).total.item()

    soft, hard = now.soft.sum().item(), now.hard.sum().item()
    assert total() == pytest.approx(-(soft + hard) / 10)
    assert total(soft_dims="mean") == pytest.approx(-(soft / D + hard) / 10)
    assert total(soft_dims="root") == pytest.approx(-(soft / D**0.5 + hard) / 10)
    assert total(lengths="sequence") == pytest.approx(-(soft + hard) / 2 / 10)
    assert total(lengths="batch") == pytest.approx(-(soft + hard) / 50)


@pytest.mark.parametrize("kind,want", [("truncate", [1.5, 0.5, 1.0]), ("mask", [0.0, 0.0, 1.0])])
def test_importance_correction_weighs_hard_tokens_only(kind, want):
    batch, now = simple(3)
    rollout = now.hard.detach() - torch.tensor([math.log(4.0), math.log(0.5), torch.nan])
    batch = dataclasses.replace(
        batch, hard=dataclasses.replace(batch.hard, rollout_log_prob=rollout)
    )
    plain = grads_of(loss(batch, now, torch.ones(3), Normaliser(3, 6), ObjectiveConfig()), now)
    _, now2 = simple(3)
    config = ObjectiveConfig(correction=kind, correction_cap=1.5)
    share = loss(batch, now2, torch.ones(3), Normaliser(3, 6), config)
    soft, hard = grads_of(share, now2)
    torch.testing.assert_close(soft, plain[0])
    torch.testing.assert_close(hard, plain[1] * torch.tensor(want))
    assert share.sums["correction"][0] == pytest.approx(4.0 + 0.5 + 1.0, rel=1e-5)


def test_the_kl_is_exact_for_gaussians_and_zero_for_the_same_model():
    batch, now = simple()
    same = kl_terms(batch, now, now.detach())
    assert not bool(same[0].any()) and not bool(same[1].any())
    other = Densities(now.soft, now.mean.detach() + 0.1, now.hard.detach() - 0.3, None)
    soft, hard = kl_terms(batch, now, other)
    gauss = torch.distributions.Normal(now.mean, SIGMA)
    ref = torch.distributions.Normal(other.mean, SIGMA)
    torch.testing.assert_close(soft, torch.distributions.kl_divergence(gauss, ref).sum(-1))
    torch.testing.assert_close(hard, torch.full((2,), math.exp(-0.3) - 1 + 0.3))
    share = loss(
        batch, now, torch.zeros(2), Normaliser(2, 4), ObjectiveConfig(kl_coef=0.5), reference=other
    )
    assert share.total.item() == pytest.approx(0.5 * (soft.sum() + hard.sum()).item() / 2, rel=1e-5)


def test_the_entropy_bonus_raises_entropy():
    hidden, table, _ = problem(3)
    table.requires_grad_()
    batch = bare_batch(None, torch.arange(1), 1)
    log_prob, entropy = head.token_log_prob(
        hidden, table, torch.arange(1), torch.ones(1), with_entropy=True
    )
    now = Densities(torch.zeros(0), torch.zeros(0, D), log_prob, entropy)
    config = ObjectiveConfig(entropy_coef=1.0)
    share = loss(batch, now, torch.zeros(1), Normaliser(1, 1), config)
    (grad,) = torch.autograd.grad(share.total, table)
    with torch.no_grad():
        table -= 1e-3 * grad
        _, after = head.token_log_prob(
            hidden, table, torch.arange(1), torch.ones(1), with_entropy=True
        )
    assert float(after) > float(entropy)


def test_missing_parts_and_bad_options_are_refused():
    batch, now = simple()
    for options, message in (({"kl_coef": 1.0}, "needs `reference`"),
                             ({"entropy_coef": 1.0}, "with_entropy=True")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            loss(batch, now, torch.ones(2), Normaliser(2, 4), ObjectiveConfig(**options))
    for options in (
        {"ratio": "ppo"}, {"soft_dims": "max"}, {"lengths": "token"}, {"correction": "drop"},
        {"clip_low": 1.5}, {"clip_high": 0.0}, {"max_log_ratio": 0.0}, {"correction_cap": 1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            ObjectiveConfig(**options)
