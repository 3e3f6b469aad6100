"""AdamW on float32 master weights, and the learning rate of every step.

A bfloat16 weight cannot take an update of 1e-6 of its size, nor sum a hundred micro-batches'
gradients. So two-byte weights get a float32 master, and each gradient is added to the master's in
float32 as soon as it is complete. The model holds the rounded master, which is what the server
receives: trainer and server compute with the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trainer.config import OptimConfig
from trainer.ranks import full, shard_like


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of a step (counted from 0) of so many: linear warm-up, then cosine or constant."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    floor = config.min_lr_ratio
    return config.lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))


class Optimiser:
    """AdamW over a model's trainable weights."""

    def __init__(self, model: torch.nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("nothing to train: every weight is frozen")
        self.masters = {name: self._master(p) for name, p in self.named.items()}
        self.adamw = torch.optim.AdamW(
            self.masters.values(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def _master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        master = parameter.detach().float().requires_grad_()

        def collect(p: torch.Tensor) -> None:
            assert p.grad is not None
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
        return master

    def zero(self) -> None:
        """Forget gradients; weights that get none this step have gradient 0 all the same."""
        for master in self.masters.values():
            master.grad = None

    def norm(self) -> float:
        """Length of the whole gradient."""
        grads = [m.grad for m in self.masters.values() if m.grad is not None]
        return float(full(torch.nn.utils.get_total_norm(grads))) if grads else 0.0

    def step(self, lr: float) -> float:
        """Clip if configured, update, write back; returns the gradient's length before clipping.

        Raises:
            ValueError: the gradient is not finite; nothing was updated.
        """
        norm = self.norm()
        if not math.isfinite(norm):
            raise ValueError(
                "the gradient is not finite; look at agree/gaussian_distance and the loss parts "
                "in metrics.jsonl, lower optim.lr or set optim.max_grad_norm"
            )
        limit = self.config.max_grad_norm
        scale = min(1.0, limit / (norm + 1e-12)) if limit is not None else 1.0
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            elif scale < 1.0:
                master.grad *= scale
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.write_back()
        return norm

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the model."""
        for name, parameter in self.named.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state_dict(self) -> dict[str, Any]:
        """Masters and moments, by parameter name, whole whatever the number of ranks (all of them
        must call it)."""
        adamw = self.adamw.state_dict()
        adamw["state"] = {
            index: {name: full(value).cpu() for name, value in moments.items()}
            for index, moments in adamw["state"].items()
        }
        return {
            "names": list(self.masters),
            "masters": {n: full(m.detach()).cpu() for n, m in self.masters.items()},
            "adamw": adamw,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state belongs to another model."""
        if state["names"] != list(self.masters):
            raise ValueError("the checkpoint trains other weights than this configuration")
        for name, master in self.masters.items():
            master.copy_(shard_like(state["masters"][name], master))
        moments = {
            index: {
                name: shard_like(value, master) if value.shape == master.shape else value
                for name, value in state["adamw"]["state"][index].items()
            }
            for index, master in enumerate(self.masters.values())
            if index in state["adamw"]["state"]
        }
        self.adamw.load_state_dict({**state["adamw"], "state": moments})
        self.write_back()
