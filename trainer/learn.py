"""The learning half of a step: samples to episodes, to a gradient, to new weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from softvllm.core.rollout import Sample
from trainer.advantages import advantages, zero_advantage_groups
from trainer.agreement import Agreement
from trainer.attention import pick, shares_prompts
from trainer.collect import Collected
from trainer.config import Config, ModelConfig
from trainer.episodes import Asked, Episode
from trainer.forward import Densities, Policy, check
from trainer.load import load_model
from trainer.objective import Loss, Normaliser, loss
from trainer.optim import Optimiser
from trainer.packing import Batch, group_batches, micro_batches, pack
from trainer.ranks import Ranks, full
from trainer.reading import episode


@dataclass
class MicroBatch:
    """What goes through the model together."""

    batch: Batch
    gain: torch.Tensor  # float32 [S]: advantages
    old: Densities | None = None
    """Densities at the sampling weights, where the objective wants a ratio."""
    counts: bool = True
    """False: a filler for a rank that has no more sequences, as all ranks must pass equally often.
    It adds nothing."""


@dataclass
class Prepared:
    """One step's training data; made while the weights are those that sampled it."""

    advantages: torch.Tensor  # float32 [N]
    batches: list[MicroBatch]
    """Those of this rank."""
    normaliser: Normaliser
    zero_groups: int
    groups: int
    tokens: int
    """Tokens of all ranks' sequences; a shared prompt counts for each."""
    unreadable: list[str] = field(default_factory=list)
    """Why samples could not be trained on."""


class Learner:
    """Model, optimiser and objective.

    Raises:
        ValueError: the model cannot be trained here; the message names the remedy.
    """

    def __init__(
        self,
        config: Config,
        stop_ids: tuple[int, ...],
        min_think: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.device = self.ranks.device(config.model.device)
        kernel = config.model.attention or pick(self.device, getattr(torch, config.model.dtype))
        self.shares = shares_prompts(kernel)
        self.trained, self.model, self.policy = self._load(config.model)
        self.optimiser = Optimiser(self.trained, config.optim)
        self.reference: Policy | None = None
        if config.objective.kl_coef:
            plain = replace(config.model, lora_rank=0)
            self.reference = self._load(plain)[2].requires_grad_(False)
        self.asked = Asked(
            temperature=config.rollout.answer_temperature,
            min_think=min_think,
            stop_ids=stop_ids,
            greedy_answer=config.rollout.greedy_answer,
        )

    def _load(self, settings: ModelConfig) -> tuple[Any, Any, Policy]:
        """(what holds the trained weights, the transformers model, its policy)."""
        dtype = getattr(torch, settings.dtype)
        # Shards are masters and therefore float32; FSDP rounds them for every pass.
        alone = self.ranks.size == 1
        trained, model = load_model(settings, self.device, dtype if alone else torch.float32)
        policy = Policy(
            model,
            table_gradient=settings.table_gradient,
            kernel=settings.attention,
            checkpointing=settings.checkpointing,
            head_dtype=getattr(torch, settings.head_dtype) if settings.head_dtype else None,
        )
        check(policy)
        self.ranks.spread(policy, dtype)
        return trained, model, policy

    # ---- samples to micro-batches ----------------------------------------------------------------

    def read(self, samples: list[Sample]) -> tuple[list[Episode], list[int], list[str]]:
        """Episodes, the index of each one's sample, and why others have none."""
        episodes, kept, unreadable = [], [], []
        table: torch.Tensor | None = None
        for i, sample in enumerate(samples):
            try:
                trace = sample.trace
                if table is None and trace.sparse_ids is not None:
                    dtype = getattr(torch, trace.meta["dtype"])
                    table = full(self.policy.table.detach()).to("cpu", dtype)
                episodes.append(episode(sample, self.asked, table))
                kept.append(i)
            except ValueError as error:
                unreadable.append(str(error))
        return episodes, kept, unreadable

    def prepare(self, collected: Collected) -> Prepared:
        """Read, compare within groups, pack. Call it before the sampling weights change.

        Raises:
            ValueError: too many samples cannot be read, or no group has two left.
        """
        config = self.config
        episodes, kept, unreadable = self.read(collected.samples)
        if len(unreadable) > config.rollout.max_failure_rate * max(1, len(collected.samples)):
            raise ValueError(
                f"{len(unreadable)} of {len(collected.samples)} samples cannot be trained on "
                f"(limit rollout.max_failure_rate); the first: {unreadable[0]}"
            )
        members: dict[int, list[int]] = defaultdict(list)
        for at, i in enumerate(kept):
            members[collected.samples[i].prompt].append(at)
        alone = {at for group in members.values() if len(group) < 2 for at in group}
        used = [at for at in range(len(episodes)) if at not in alone]
        if not used:
            raise ValueError("no prompt has two samples left, so there is nothing to compare")
        chosen = [episodes[at] for at in used]
        rewards = torch.tensor([collected.scored[kept[at]].reward for at in used])
        group = torch.tensor([collected.samples[kept[at]].prompt for at in used])
        gain = advantages(rewards, group, config.estimator)

        # A sample without advantage adds nothing to the loss, but counts in its normaliser.
        objective = config.objective
        everything = bool(objective.kl_coef or objective.entropy_coef)
        computed = [i for i in range(len(chosen)) if everything or gain[i] != 0]
        batches = self.batches([chosen[i] for i in computed], gain[computed])
        if objective.ratio != "none" or (
            objective.correction != "none" and config.updates_per_batch > 1
        ):
            for part in batches:
                part.old = self._old(part.batch)
            self.ranks.forget_gathered(self.policy)
        return Prepared(
            gain,
            batches,
            Normaliser.of(chosen),
            zero_advantage_groups(rewards, group),
            len(group.unique()),
            sum(chosen[i].num_inputs for i in computed),
            unreadable,
        )

    def batches(self, episodes: list[Episode], gain: torch.Tensor) -> list[MicroBatch]:
        """This rank's micro-batches; every rank has equally many."""
        if not episodes:  # no group has an advantage
            return []
        lengths = [e.num_inputs for e in episodes]
        rank, size = self.ranks.rank, self.ranks.size
        split = self._split(episodes)
        if len(split) % size:
            split = self._split(episodes, at_least=len(split) + -len(split) % size)
            split += [[]] * (-len(split) % size)
        batches = []
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        for part in split[rank::size]:
            indices = part or [shortest]
            packed = pack([episodes[i] for i in indices], self.shares)
            batches.append(MicroBatch(packed, gain[indices], counts=bool(part)))
        return batches

    def _split(self, episodes: list[Episode], at_least: int = 1) -> list[list[int]]:
        limit = self.config.micro_batch_tokens
        if not self.shares:
            return micro_batches([e.num_inputs for e in episodes], limit, at_least)
        prompts = [tuple(e.prompt_ids.tolist()) for e in episodes]
        owns = [len(e.token) - 1 for e in episodes]
        return group_batches(prompts, [len(p) for p in prompts], owns, limit, at_least)

    @torch.no_grad()
    def _old(self, batch: Batch) -> Densities:
        now = self.policy(batch.to(self.device)).detach()
        # The means would take as much memory as all soft inputs; a ratio does not need them.
        # A slice of length 0 would keep all of them.
        return replace(now, mean=now.mean.new_zeros(0, now.mean.shape[1]))

    # ---- micro-batches to a gradient -------------------------------------------------------------

    def gradient(self, data: Prepared) -> dict[str, float]:
        """Add up the gradient over all micro-batches; returns the step's metrics."""
        self.optimiser.zero()
        parts: dict[str, float] = dict.fromkeys(("total", "soft", "think", "answer"), 0.0)
        sums: dict[str, tuple[float, float]] = {}
        agreement = Agreement(self.config.log.gap_samples // max(1, len(data.batches)))
        for part in data.batches:
            share, batch, now = self._loss(part, data.normaliser)
            self._backward(share.total, part)
            if part.counts:
                parts = {n: v + float(getattr(share, n).detach()) for n, v in parts.items()}
                sums = _added(sums, share.sums)
                agreement.add(batch, now)
        others = self.ranks.gather((parts, sums, agreement.values))
        parts = {name: sum(other[0][name] for other in others) for name in parts}
        sums = _added(*(other[1] for other in others))
        metrics = {f"loss/{name}": value for name, value in parts.items()}
        metrics |= {f"policy/{name}": v / c for name, (v, c) in sums.items() if c}
        return metrics | Agreement.metrics(*(other[2] for other in others))

    def gradient_parts(self, data: Prepared) -> dict[str, float]:
        """Length of the gradient of each part of the loss alone (as long as a step each)."""
        choose: dict[str, Callable[[Loss], torch.Tensor]] = {
            "soft": lambda share: share.soft,
            "think": lambda share: share.think,
            "answer": lambda share: share.answer,
        }
        norms = {}
        for name, of_share in choose.items():
            self.optimiser.zero()
            for part in data.batches:
                share = self._loss(part, data.normaliser)[0]
                # The total's graph: a part without steps (soft ones in mode hard) has none, and
                # under FSDP every rank must pass through the model backwards.
                self._backward(of_share(share) + 0.0 * share.total, part)
            norms[f"grad/norm_{name}"] = self.optimiser.norm()
        self.optimiser.zero()
        return norms

    def _backward(self, value: torch.Tensor, part: MicroBatch) -> None:
        # FSDP averages gradients over the ranks; shares of the loss are meant to add up.
        (value * (self.ranks.size if part.counts else 0)).backward()

    def _loss(self, part: MicroBatch, normaliser: Normaliser) -> tuple[Loss, Batch, Densities]:
        objective = self.config.objective
        batch = part.batch.to(self.device)
        now = self.policy(batch, with_entropy=bool(objective.entropy_coef))
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(batch)
        share = loss(
            batch,
            now,
            part.gain.to(self.device),
            normaliser,
            objective,
            old=part.old,
            reference=reference,
        )
        return share, batch, now

    @torch.no_grad()
    def compare(self, samples: list[Sample]) -> dict[str, float]:
        """How far trainer and server agree on samples of the weights they both hold.

        Raises:
            ValueError: none of the samples can be read.
        """
        episodes, _, unreadable = self.read(samples)
        if not episodes:
            raise ValueError(f"no sample can be read: {unreadable[0] if unreadable else 'none'}")
        agreement = Agreement(self.config.log.gap_samples)
        for part in micro_batches([e.num_inputs for e in episodes], self.config.micro_batch_tokens):
            batch = pack([episodes[i] for i in part]).to(self.device)
            agreement.add(batch, self.policy(batch))
        self.ranks.forget_gathered(self.policy)
        return Agreement.metrics(agreement.values)


def _added(*several: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Sums of (value, count) by name."""
    out: dict[str, tuple[float, float]] = {}
    for sums in several:
        for name, (value, count) in sums.items():
            before = out.get(name, (0.0, 0.0))
            out[name] = (before[0] + value, before[1] + count)
    return out
