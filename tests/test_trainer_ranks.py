"""Two FSDP2 ranks give the loss and the gradients of one process, tied and untied."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny_llama
from torch.distributed.fsdp import fully_shard
from trainer_rollouts import episodes_of

from softvllm.core.oracle import Oracle
from trainer.forward import Policy
from trainer.objective import Normaliser, ObjectiveConfig, loss
from trainer.packing import pack

ADVANTAGES = torch.tensor([1.0, -1.0, 2.0, 0.5])
RANKS = 2
NAMES = ("tied", "untied")


def run(rank: int, folder: Path) -> None:
    """One rank: its half of the episodes; rank 0 writes losses and relative gradient errors."""
    torch.set_num_threads(1)
    oracles = {name: Oracle.load(str(folder / name)) for name in NAMES}
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS)
    results = {name: compare(rank, oracle) for name, oracle in oracles.items()}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def compare(rank: int, oracle: Oracle) -> tuple[float, float, list[float]]:
    """Loss of all ranks, of one process, and how far each parameter's gradient is off."""
    episodes = episodes_of(oracle, ("soft", "blend", "hard", "fuzzy"))
    normaliser, config = Normaliser.of(episodes), ObjectiveConfig()
    whole = Policy(copy.deepcopy(oracle.model))
    batch = pack(episodes)
    want = loss(batch, whole(batch), ADVANTAGES, normaliser, config).total
    want.backward()

    policy = Policy(copy.deepcopy(oracle.model))
    for layer in policy.model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(policy)  # the root gathers embedding and head for the whole forward pass
    mine = list(range(rank, len(episodes), RANKS))
    batch = pack([episodes[i] for i in mine])
    share = loss(batch, policy(batch), ADVANTAGES[mine], normaliser, config).total
    (share * RANKS).backward()  # FSDP averages
    total = share.detach().clone()
    dist.all_reduce(total)
    errors = [
        float((got.grad.full_tensor() - one.grad).norm() / one.grad.norm())
        for got, one in zip(policy.parameters(), whole.parameters())
    ]
    return total.item(), want.item(), errors


def test_two_ranks_give_the_gradients_of_one_process(tmp_path):
    for name in NAMES:
        tiny_llama(tmp_path / name, tied=name == "tied")
    torch.multiprocessing.spawn(run, (tmp_path,), nprocs=RANKS)
    results = torch.load(tmp_path / "results.pt")
    assert set(results) == set(NAMES)
    for total, want, errors in results.values():
        assert total == pytest.approx(want, rel=1e-5)
        assert len(errors) > 10 and max(errors) < 1e-4
