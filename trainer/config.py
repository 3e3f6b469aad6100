"""Everything a run can be told, as typed dataclasses; `config_file` reads and writes them.

Defaults are the paper's recipe (arXiv 2509.19170v2) where it states one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from trainer import checks
from trainer.advantages import Estimator
from trainer.config_groups import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
    SyncConfig,
    ValidationConfig,
)
from trainer.objective import ObjectiveConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LogConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ProbeConfig",
    "PromptConfig",
    "RewardConfig",
    "RolloutConfig",
    "SyncConfig",
    "ValidationConfig",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run of `python -m trainer.rl`."""

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """TOML file below the command line; given several times, each lies over the one before."""
    rollout_url: str | None = None
    """The server: `softvllm serve MODEL --enable-rl`."""
    run: str = "runs/default"
    """Folder of the run: metrics, checkpoints, final model."""
    resume: bool = False
    """Go on with the run in this folder (from its last checkpoint, or from the start)."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""
    record: str | None = None
    """Folder to record every step's rollouts in."""
    replay: str | None = None
    """Train on recorded rollouts, without a server."""
    steps: int = 4000
    """Optimiser steps (paper, section 4)."""
    seed: int = 0
    """Of everything drawn: noise, sampling and, without data.order_seed, the order of problems."""
    threads: int = 0
    """CPU threads of torch; 0: torch's choice."""
    estimator: Estimator = "rloo"
    """Advantages (paper, section 3): rloo, mean, grpo."""
    updates_per_batch: int = 1
    """Optimiser updates on each batch; above 1 needs objective.ratio plain or clip."""
    micro_batch_tokens: int = 8192
    """Tokens that go through the model together; changes memory and speed, not the result."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def order_seed(self) -> int:
        """Seed of the order of problems."""
        return self.seed if self.data.order_seed is None else self.data.order_seed

    def check(self) -> None:
        """Raise ValueError for settings that are missing or contradict each other, naming the
        remedy. A dry run needs neither model nor server."""
        if not self.model.path and not self.dry_run:
            raise ValueError("model.path is missing: the folder or name of the model to train")
        if not self.replay and not self.rollout_url and not self.dry_run:
            raise ValueError(
                "give --rollout-url (a server started with `softvllm serve MODEL --enable-rl`) or "
                "--replay DIR"
            )
        if self.replay and self.record:
            raise ValueError("--record and --replay exclude each other")
        if self.rollout.samples < 2:
            raise ValueError(
                "rollout.samples must be at least 2: the baseline of a sample is made of the other "
                "samples of its prompt"
            )
        for name, value, least in (
            ("seed", self.seed, 0),
            ("data.seed", self.data.seed, 0),
            ("data.order_seed", self.order_seed, 0),
            ("steps", self.steps, 1),
            ("rollout.prompts", self.rollout.prompts, 1),
            ("micro_batch_tokens", self.micro_batch_tokens, 1),
            ("updates_per_batch", self.updates_per_batch, 1),
            ("checkpoint.keep", self.checkpoint.keep, 1),
            ("reward.workers", self.reward.workers, 1),
        ):
            checks.at_least(name, value, least)
        checks.rate("rollout.max_failure_rate", self.rollout.max_failure_rate)
        checks.rate("reward.max_failure_rate", self.reward.max_failure_rate)
        checks.seconds("reward.timeout", self.reward.timeout)
        checks.seconds("rollout.timeout", self.rollout.timeout)
        checks.seconds("rollout.retry_for", self.rollout.retry_for, zero=True)
        checks.seconds("sync.timeout", self.sync.timeout)
        off_policy = self.rollout.max_staleness or self.updates_per_batch > 1
        if off_policy and self.objective.ratio == "none":
            raise ValueError(
                "rollout.max_staleness = 1 or updates_per_batch > 1 trains on samples of older "
                'weights: set objective.ratio to "clip" or "plain"'
            )
        if (self.sync.method == "lora") != (self.model.lora_rank > 0):
            raise ValueError("sync.method = lora and model.lora_rank > 0 go together")
        if self.model.lora_rank and self.model.table_gradient != "frozen":
            raise ValueError('LoRA trains layers only: set model.table_gradient = "frozen"')
        reserved = {"seed", "record", "mode", "max_think_tokens", "answer_max_tokens"}
        if clash := reserved & set(self.rollout.cot):
            raise ValueError(f"rollout.cot.{sorted(clash)[0]} is set by the trainer; leave it out")
        if self.rollout.cot.get("noise") == "none" or self.rollout.cot.get("noise_scale") == 0:
            raise ValueError(
                "soft steps without noise have no density to train on; leave noise and "
                "noise_scale out of rollout.cot, or set noise_scale above 0"
            )
