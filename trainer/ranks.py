"""One process, or several under torchrun: who leads, what is shared, where weights lie (FSDP2).

Rank 0 leads: it alone talks to the server, scores, and writes files. The others get its samples
by `share`, take their part of the micro-batches, and hold their shard of weights and moments. An
error on any rank ends its process; torchrun then ends the others.

The sharded weights are float32 and are rounded for every pass (FSDP2's mixed precision), which is
what a single process does with its masters: the same loss and gradient up to the order of sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long ranks wait for each other; rank 0 may wait for rollouts meanwhile."""


class Ranks:
    """The processes of a run. `with Ranks.of_environment() as ranks` joins and leaves them."""

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0) -> None:
        self.rank, self.size, self.local = rank, size, local

    @classmethod
    def of_environment(cls) -> Ranks:
        """What torchrun says; one process without it."""
        get = os.environ.get
        if int(get("WORLD_SIZE", "1")) <= 1:
            return cls()
        return cls(int(get("RANK", "0")), int(get("WORLD_SIZE", "1")), int(get("LOCAL_RANK", "0")))

    def __enter__(self) -> Ranks:
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self.size > 1 and failed is None:  # after a failure others may never answer
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """`auto` is CUDA where there is one; each rank has its own."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and self.size > 1:
            name = f"cuda:{self.local}"
            torch.cuda.set_device(self.local)
        return torch.device(name)

    # ---- values ----------------------------------------------------------------------------------

    def share(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; nobody else runs it."""
        if self.size == 1:
            return work()
        box: list[Any] = [work() if self.leads else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        value: T = box[0]
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    # ---- weights ---------------------------------------------------------------------------------

    def spread(self, policy: torch.nn.Module, dtype: torch.dtype) -> None:
        """Shard a float32 policy over the ranks; passes compute in `dtype`. One rank: nothing."""
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        device = next(policy.parameters()).device
        mesh = init_device_mesh(device.type, (self.size,))
        precision = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
        )
        for layer in policy.model.get_decoder().layers:  # type: ignore[operator, union-attr]
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        # Embedding and head stay gathered from forward to backward: the fused head saves them.
        fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)

    def forget_gathered(self, policy: torch.nn.Module) -> None:
        """After passes without a backward: gathered weights would outlive the next update."""
        if self.size > 1:
            policy.reshard()  # type: ignore[operator]


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor whole (all ranks must ask at the same time), any other as it is."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def shard_like(value: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """This rank's share of a whole tensor, laid out as `pattern` is (whole if that is)."""
    mesh = getattr(pattern, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    placements = pattern.placements  # type: ignore[attr-defined]
    # Every rank has read the whole tensor: nothing needs to be sent.
    return distribute_tensor(value.to(pattern.device), mesh, placements, src_data_rank=None)
