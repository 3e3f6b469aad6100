"""Trainer and rollout mean the same thing: the packed forward pass against the oracle's decoding
and against the loss written out position by position."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_gemma, tiny_llama, tiny_qwen3
from trainer_rollouts import ASKED, MODES, episodes_of, naive_log_density, roll, single_thread
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from softvllm.core import mixture
from softvllm.core.oracle import Oracle
from softvllm.core.trace import Trace
from trainer import diagnostics
from trainer.forward import Policy, check
from trainer.packing import Batch, pack
from trainer.reading import episode_of_trace

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    yield from single_thread()


@pytest.fixture(scope="module")
def oracles(tmp_path_factory) -> dict[str, Oracle]:
    root = tmp_path_factory.mktemp("models")
    paths = {
        "tied": tiny_llama(root / "tied"),
        "untied": tiny_llama(root / "untied", tied=False),
        "qwen3": tiny_qwen3(root / "qwen3"),
        "gemma": tiny_gemma(root / "gemma"),
    }
    return {name: Oracle.load(str(path)) for name, path in paths.items()}


def policy_of(oracle: Oracle, **options) -> Policy:
    """A policy with its own copy of the model: the packed attention stays with it."""
    return Policy(copy.deepcopy(oracle.model), **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tied", "untied", "qwen3", "gemma"])
def test_on_policy_the_trainer_agrees_with_the_rollout(oracles, name, mode):
    oracle = oracles[name]
    runs = [
        roll(oracle, length=3 + 5 * i, seed=i, think=10, tokens=16, **MODES[mode]) for i in range(3)
    ]
    batch = pack([episode_of_trace(ids, trace, ASKED) for ids, trace in runs])
    with torch.no_grad():
        densities = policy_of(oracle)(batch)
    if len(batch.soft.row):
        distance = diagnostics.gaussian_distance(densities)
        # d degrees of freedom a step: five standard deviations of the mean.
        allowed = 5 * (2 / (64 * len(distance))) ** 0.5
        assert abs(float(distance.mean()) - 1.0) < allowed
        # The mean: fuzzy is discontinuous, so a near-tie may differ by more at a single step.
        gap = diagnostics.mean_gap(batch, densities)
        assert float(gap.mean()) < 0.02 and float(gap.median()) < 1e-4
    else:
        assert mode == "hard"
    mismatch = diagnostics.hard_mismatch(batch, densities)
    assert len(mismatch) >= 6 and float(mismatch.max()) < 1e-6


@pytest.mark.parametrize("name", ["tied", "untied", "gemma"])
def test_density_and_gradient_are_the_naive_ones(oracles, name):
    oracle = oracles[name]
    runs = [
        roll(oracle, length=4 + 3 * i, seed=i, tokens=12 + i, **MODES[mode])
        for i, mode in enumerate(MODES)
    ]
    batch = pack([episode_of_trace(ids, trace, ASKED) for ids, trace in runs])
    policy, naive = policy_of(oracle).double(), copy.deepcopy(oracle.model).double()
    densities = policy(batch)
    soft, hard = zip(*(naive_log_density(naive, *run, torch.float64) for run in runs))
    torch.testing.assert_close(densities.soft.sum(), torch.stack(soft).sum(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(densities.hard.sum(), torch.stack(hard).sum(), rtol=1e-6, atol=1e-4)
    (densities.soft.sum() + densities.hard.sum()).backward()
    torch.stack((*soft, *hard)).sum().backward()
    for (key, got), want in zip(policy.model.named_parameters(), naive.parameters()):
        error = float((got.grad - want.grad).norm() / want.grad.norm())
        assert error < 1e-4, f"{key}: {error}"


def exact_norm(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """transformers' normalises in float32 whatever the model's type is."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_gradients_are_finite_differences_in_float64(oracles, name, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    oracle = oracles[name]
    batch = pack(episodes_of(oracle, ("soft", "blend", "hard")))
    policy = policy_of(oracle).double()

    def value() -> torch.Tensor:
        densities = policy(batch)
        return 1e-2 * densities.soft.sum() + densities.hard.sum()

    value().backward()
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction *= 1e-5 / direction.norm()
        with torch.no_grad():
            parameter += direction
            high = value()
            parameter -= 2 * direction
            low = value()
            parameter += direction
        slope = float((parameter.grad * direction).sum())
        assert float(high - low) / 2 == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_the_row_of_a_step_is_the_one_before_it(oracles):
    """Moving all terms one row to either side must ruin the agreement."""
    oracle = oracles["tied"]
    ids, trace = roll(oracle, mode="soft")
    batch = pack([episode_of_trace(ids, trace, ASKED)])
    assert batch.soft.row.tolist() == [len(ids) - 1 + t for t in range(8)]
    assert batch.soft_rows.tolist() == [len(ids) + t for t in range(8)]
    assert batch.hard.row.tolist() == [len(ids) - 1 + t for t in range(10, 14)]  # 8, 9: forced
    assert batch.num_rows == len(ids) + 14 - 1
    policy = policy_of(oracle)
    for shift in (-1, 1):
        batch.soft.row.add_(shift)
        with torch.no_grad():
            off = diagnostics.mean_gap(batch, policy(batch))
        batch.soft.row.sub_(shift)
        assert float(off.median()) > 1.0


def test_a_step_that_ends_the_sample_is_judged_and_not_read(oracles):
    oracle = oracles["tied"]
    ids, trace = roll(oracle, mode="soft", think=6, tokens=9)
    trace = Trace(trace.meta, trace.steps[:6], dense=trace.dense)
    batch = pack([episode_of_trace(ids, trace, ASKED)])
    assert len(batch.soft.row) == 6 and len(batch.soft_rows) == 5
    with torch.no_grad():
        assert float(diagnostics.mean_gap(batch, policy_of(oracle)(batch)).max()) < 0.02


def sparse_trace(oracle: Oracle, ids: np.ndarray, trace: Trace, top_k: int) -> Trace:
    """The trace as `record="sparse"` would have it: tokens and weights from the trainer's side."""
    policy = policy_of(oracle)
    batch = pack([episode_of_trace(ids, trace, ASKED)])
    with torch.no_grad():
        hidden = policy.hidden(batch, policy.table)[batch.soft.row]
        dist = mixture.distribution(
            hidden @ policy.output_head(policy.table)[0].t(),
            batch.soft.tau,
            top_k=torch.full((len(hidden),), top_k),
            max_top_k=top_k,
        )
    assert isinstance(dist, mixture.Sparse)
    meta = {**trace.meta, "record": "sparse"}
    return Trace(
        meta,
        trace.steps,
        sparse_ids=dist.ids.numpy().astype(np.int32),
        sparse_weights=dist.probs.numpy(),
    )


def batch_sigma(batch: Batch) -> float:
    return float(batch.soft.sigma[0])


@pytest.mark.parametrize("mode", ["soft", "fuzzy"])
def test_sparse_records_give_the_densities_of_dense_ones(oracles, mode):
    oracle = oracles["untied"]
    ids, trace = roll(oracle, top_k=5, **MODES[mode])
    sparse = sparse_trace(oracle, ids, trace, 5)
    dense_batch = pack([episode_of_trace(ids, trace, ASKED)])
    episode = episode_of_trace(ids, sparse, ASKED, oracle.table)
    assert episode.soft_ids is not None and bool((episode.soft_ids >= 0).all())
    mixed_batch = pack([episode, episode_of_trace(ids, trace, ASKED)])
    policy = policy_of(oracle)
    with torch.no_grad():
        dense, mixed = policy(dense_batch), policy(mixed_batch)
    assert float(diagnostics.mean_gap(dense_batch, dense).max()) < 0.02
    # Rebuilt inputs differ from the fed ones in the last bit, which random layers amplify.
    assert float((mixed.mean[:8] - dense.mean).abs().max() / batch_sigma(dense_batch)) < 1e-2
    torch.testing.assert_close(mixed.mean[8:], dense.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed.soft[:8], dense.soft, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "restriction",
    [{"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.7, "min_p": 0.02}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["soft", "hard", "blend"])
def test_restricted_supports_are_the_rollouts(oracles, mode, restriction):
    oracle = oracles["untied"]
    ids, trace = roll(oracle, **MODES[mode], **restriction)
    batch = pack([episode_of_trace(ids, trace, ASKED)])
    with torch.no_grad():
        densities = policy_of(oracle)(batch)
    if mode != "hard":
        assert float(diagnostics.mean_gap(batch, densities).max()) < 0.02
    assert float(diagnostics.hard_mismatch(batch, densities).max()) < 1e-6


def test_wrong_supports_and_temperatures_show_in_the_diagnostics(oracles):
    """The on-policy test can fail: the full vocabulary for a mixture of 3 tokens is seen."""
    oracle = oracles["untied"]
    ids, trace = roll(oracle, mode="soft", top_k=3)
    trace.meta["top_k"] = 0
    batch = pack([episode_of_trace(ids, trace, ASKED)])
    batch.hard.tau.fill_(0.7)
    with torch.no_grad():
        densities = policy_of(oracle)(batch)
    assert float(diagnostics.mean_gap(batch, densities).mean()) > 0.05
    assert float(diagnostics.hard_mismatch(batch, densities).mean()) > 1e-3


def test_table_gradients_can_be_cut_or_frozen(oracles):
    batch = pack(episodes_of(oracles["untied"], ("soft",)))
    grads = {}
    for choice in ("full", "no_mixture", "frozen"):
        policy = policy_of(oracles["untied"], table_gradient=choice)
        policy(batch).soft.sum().backward()
        grads[choice] = policy.model.get_input_embeddings().weight.grad
    assert grads["frozen"] is None
    # Without the mixture only tokens that were read have a gradient, in the mixture all have.
    read = set(batch.token_ids.tolist())
    rows = grads["no_mixture"].abs().sum(-1).nonzero()[:, 0].tolist()
    assert set(rows) <= read
    assert int((grads["full"].abs().sum(-1) > 0).sum()) == VOCAB_SIZE


def test_checkpointing_changes_neither_value_nor_gradient(oracles):
    batch = pack(episodes_of(oracles["tied"], ("soft", "hard")))
    runs = []
    for checkpointing in (False, True):
        policy = policy_of(oracles["tied"], checkpointing=checkpointing)
        total = policy(batch).soft.sum()
        total.backward()
        runs.append([total, *(p.grad for p in policy.parameters())])
    for got, want in zip(*runs):
        torch.testing.assert_close(got, want)


def test_two_byte_heads_stay_close_to_float32(oracles):
    batch = pack(episodes_of(oracles["tied"], ("soft", "hard")))
    with torch.no_grad():
        exact = policy_of(oracles["tied"])(batch)
        rounded = policy_of(oracles["tied"], head_dtype=torch.bfloat16)(batch)
    assert rounded.mean.dtype == torch.float32
    gap = (rounded.mean - exact.mean).norm(dim=-1) / batch.soft.sigma
    assert 0 < float(gap.mean()) < 0.3
    assert float((rounded.hard - exact.hard).abs().max()) < 0.2


def test_rounding_explains_the_gap_of_two_byte_rollouts(oracles):
    model = copy.deepcopy(oracles["tied"].model).to(torch.bfloat16)
    oracle = Oracle(model)
    ids, trace = roll(oracle, mode="soft", think=8, tokens=12)
    batch = pack([episode_of_trace(ids, trace, ASKED)])
    assert batch.soft.value.dtype == torch.bfloat16
    # Means as the rollout had them: what is left is the rounding of h~ alone.
    exact = oracle_means(oracle, ids, trace)
    gap = (diagnostics.rollout_mean(batch.soft) - exact).norm(dim=-1) / batch.soft.sigma
    floor = diagnostics.rounding_floor(batch)
    assert float(floor.mean()) == pytest.approx(float(gap.mean()), rel=0.25)
    assert 0.005 < float(floor.mean()) < 0.05


def oracle_means(oracle: Oracle, ids: np.ndarray, trace: Trace) -> torch.Tensor:
    """h of every soft step from the oracle's own logits, fed what was recorded."""
    from softvllm import CoTParams, reconstruct

    bare = {"force_after_cut": (17, 23), "force_after_end": (), "end_strings": (), "seed": 0}
    result = oracle.decode(
        ids.tolist(),
        CoTParams(mode="soft", max_think_tokens=8, **bare),
        max_tokens=len(trace),
        feed=reconstruct(trace, oracle.table),
        keep_logits=True,
    )
    assert result.logits is not None
    p = torch.softmax(result.logits[trace.soft_positions] / trace.meta["tau"], dim=-1)
    return p @ oracle.table.float()


def gemma2() -> Gemma2ForCausalLM:
    config = Gemma2Config(**SMALL, final_logit_softcapping=5.0, attn_logit_softcapping=None)
    return Gemma2ForCausalLM(config)


def windowed() -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(**SMALL, sliding_window=4, layer_types=["sliding_attention"] * 2)
    return Gemma3ForCausalLM(config)


def granite() -> GraniteForCausalLM:
    small = {k: v for k, v in SMALL.items() if k != "head_dim"}
    config = GraniteConfig(**small, embedding_multiplier=3.0, logits_scaling=2.5)
    return GraniteForCausalLM(config)


def alternating() -> Gemma3ForCausalLM:
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=4, layer_types=kinds))


def full_first() -> Gemma3ForCausalLM:
    kinds = ["full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=4, layer_types=kinds))


@pytest.mark.parametrize("make", [alternating, full_first])
def test_layers_with_and_without_a_window_share_prompts_each_in_its_own_way(oracles, make):
    torch.manual_seed(0)
    policy = Policy(make(), kernel="sdpa")
    runs = [
        roll(oracles["tied"], length=length, seed=length, tokens=13 + i, **MODES[mode])
        for i, mode in enumerate(("soft", "hard", "blend"))
        for length in (9, 6)  # more than the window
    ]
    episodes = [episode_of_trace(ids, trace, ASKED) for ids, trace in runs]
    with torch.no_grad():
        alone = policy(pack(episodes, share_prompts=False))
        shared = policy(pack(episodes, share_prompts=True))
    torch.testing.assert_close(shared.mean, alone.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(shared.hard, alone.hard, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [gemma2, windowed, alternating, granite])
def test_caps_windows_and_multipliers_are_known(make):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(5.0)  # logits that feel a cap
    assert check(Policy(model)) < 1e-4


def test_a_model_that_does_something_else_is_refused(oracles):
    policy = policy_of(oracles["tied"])
    assert check(policy) < 1e-4
    policy.model.model.norm.register_forward_hook(lambda m, args, out: out.flip(1))
    with pytest.raises(ValueError, match="forward pass is not this model's"):
        check(policy)
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, attn_logit_softcapping=50.0))
    with pytest.raises(ValueError, match="soft-capped attention"):
        check(Policy(capped))
    other = copy.deepcopy(oracles["untied"].model)
    other.lm_head = torch.nn.Sequential(other.lm_head)
    with pytest.raises(ValueError, match="leave lm_head out"):
        Policy(other)


def test_a_wrapped_model_says_so_when_it_is_used_alone(oracles):
    policy = policy_of(oracles["tied"])
    policy(pack(episodes_of(oracles["tied"], ("hard",))))
    with pytest.raises(ValueError, match="runs through it only"):
        policy.model(torch.tensor([[5, 6]]))


def test_rollouts_of_another_model_are_refused(oracles):
    episode = episodes_of(oracles["tied"], ("soft",))[0]
    batch = pack([episode])
    model = Gemma3ForCausalLM(Gemma3TextConfig(**{**SMALL, "hidden_size": 32}))
    with pytest.raises(ValueError, match="come from another model"):
        Policy(model)(batch)
