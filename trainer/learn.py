"""The learning half of a step: samples to episodes, to a gradient, to new weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from softvllm.core.rollout import Sample
from trainer import diagnostics
from trainer.advantages import advantages, zero_advantage_groups
from trainer.collect import Collected
from trainer.config import Config, ModelConfig
from trainer.episodes import Asked, Episode
from trainer.forward import Densities, Policy, check
from trainer.objective import Loss, Normaliser, loss
from trainer.optim import Optimiser
from trainer.packing import Batch, micro_batches, pack
from trainer.reading import episode


@dataclass
class Prepared:
    """One step's training data; made while the weights are those that sampled it."""

    advantages: torch.Tensor  # float32 [N]
    batches: list[tuple[Batch, torch.Tensor]]
    """Micro-batches, each with its sequences' advantages."""
    old: list[Densities | None]
    """Their densities at the sampling weights, where the objective wants a ratio."""
    normaliser: Normaliser
    zero_groups: int
    groups: int
    tokens: int
    """Rows of all micro-batches."""
    unreadable: list[str] = field(default_factory=list)
    """Why samples could not be trained on."""


class Learner:
    """Model, optimiser and objective.

    Raises:
        ValueError: the model cannot be trained here; the message names the remedy.
    """

    def __init__(self, config: Config, stop_ids: tuple[int, ...], min_think: int = 0) -> None:
        self.config = config
        self.device = pick_device(config.model.device)
        self.trained, self.model = load_model(config.model, self.device)
        self.policy = self._policy(self.model)
        self.forward_error = check(self.policy)
        self.optimiser = Optimiser(self.trained, config.optim)
        self.reference: Policy | None = None
        if config.objective.kl_coef:
            plain = replace(config.model, lora_rank=0)
            self.reference = self._policy(load_model(plain, self.device)[1]).requires_grad_(False)
        self.asked = Asked(
            temperature=config.rollout.answer_temperature,
            min_think=min_think,
            stop_ids=stop_ids,
            greedy_answer=config.rollout.greedy_answer,
        )

    def _policy(self, model: Any) -> Policy:
        settings = self.config.model
        head_dtype = getattr(torch, settings.head_dtype) if settings.head_dtype else None
        return Policy(
            model,
            table_gradient=settings.table_gradient,
            kernel=settings.attention,
            checkpointing=settings.checkpointing,
            head_dtype=head_dtype,
        )

    # ---- samples to micro-batches ----------------------------------------------------------------

    def read(self, samples: list[Sample]) -> tuple[list[Episode], list[int], list[str]]:
        """Episodes, the index of each one's sample, and why others have none."""
        episodes, kept, unreadable = [], [], []
        for i, sample in enumerate(samples):
            try:
                trace = sample.trace
                table = None
                if trace.sparse_ids is not None:
                    dtype = getattr(torch, trace.meta["dtype"])
                    table = self.policy.table.detach().to("cpu", dtype)
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
        split = micro_batches([chosen[i].num_inputs for i in computed], config.micro_batch_tokens)
        batches = []
        for part in filter(None, split):  # no group may have an advantage
            indices = [computed[i] for i in part]
            batches.append((pack([chosen[i] for i in indices]), gain[indices]))
        old: list[Densities | None] = [None] * len(batches)
        if objective.ratio != "none" or (
            objective.correction != "none" and config.updates_per_batch > 1
        ):
            old = [self._old(batch) for batch, _ in batches]
        return Prepared(
            gain,
            batches,
            old,
            Normaliser.of(chosen),
            zero_advantage_groups(rewards, group),
            len(group.unique()),
            sum(batch.num_rows for batch, _ in batches),
            unreadable,
        )

    @torch.no_grad()
    def _old(self, batch: Batch) -> Densities:
        now = self.policy(batch.to(self.device)).detach()
        # The means would take as much memory as all soft inputs; a ratio does not need them.
        return replace(now, mean=now.mean[:0])

    # ---- micro-batches to a gradient -------------------------------------------------------------

    def gradient(self, data: Prepared) -> dict[str, float]:
        """Add up the gradient over all micro-batches; returns the step's metrics."""
        self.optimiser.zero()
        parts: dict[str, float] = dict.fromkeys(("total", "soft", "think", "answer"), 0.0)
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        agreement = Agreement(self.config.log.gap_samples // max(1, len(data.batches)))
        for (batch, gain), old in zip(data.batches, data.old):
            share, batch, now = self._loss(batch, gain, old, data.normaliser)
            share.total.backward()
            for name in parts:
                parts[name] += float(getattr(share, name).detach())
            for name, (value, count) in share.sums.items():
                sums[name][0] += value
                sums[name][1] += count
            agreement.add(batch, now)
        metrics = {f"loss/{name}": value for name, value in parts.items()}
        metrics |= {f"policy/{name}": v / c for name, (v, c) in sums.items() if c}
        return metrics | agreement.metrics()

    def gradient_parts(self, data: Prepared) -> dict[str, float]:
        """Length of the gradient of each part of the loss alone (as long as a step each)."""
        choose: dict[str, Callable[[Loss], torch.Tensor]] = {
            "soft": lambda share: share.soft,
            "think": lambda share: share.think,
            "answer": lambda share: share.answer,
        }
        norms = {}
        for name, part in choose.items():
            self.optimiser.zero()
            for (batch, gain), old in zip(data.batches, data.old):
                part(self._loss(batch, gain, old, data.normaliser)[0]).backward()
            norms[f"grad/norm_{name}"] = self.optimiser.norm()
        self.optimiser.zero()
        return norms

    def _loss(
        self, batch: Batch, gain: torch.Tensor, old: Densities | None, normaliser: Normaliser
    ) -> tuple[Loss, Batch, Densities]:
        objective = self.config.objective
        batch = batch.to(self.device)
        now = self.policy(batch, with_entropy=bool(objective.entropy_coef))
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference(batch)
        share = loss(
            batch,
            now,
            gain.to(self.device),
            normaliser,
            objective,
            old=old,
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
        return agreement.metrics()


class Agreement:
    """Collects the measures of `diagnostics` over micro-batches."""

    def __init__(self, limit: int) -> None:
        self.limit = max(1, limit)
        self._values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, batch: Batch, now: Densities) -> None:
        values = self._values
        if len(batch.soft.row):
            values["distance"].append(diagnostics.gaussian_distance(batch, now).cpu())
            values["gap"].append(diagnostics.mean_gap(batch, now, self.limit).cpu())
            values["floor"].append(diagnostics.rounding_floor(batch).cpu())
        values["mismatch"].append(diagnostics.hard_mismatch(batch, now).cpu())

    def metrics(self) -> dict[str, float]:
        """agree/...; absent where nothing was measured."""
        joined = {name: torch.cat(parts) for name, parts in self._values.items()}
        out: dict[str, float] = {}
        if "distance" in joined:
            distance, gap = (diagnostics.summary(joined[n]) for n in ("distance", "gap"))
            out |= {
                "agree/gaussian_distance": distance["mean"],
                "agree/gaussian_distance_max": distance["max"],
                "agree/mean_gap": gap["mean"],
                "agree/mean_gap_p99": gap["p99"],
                "agree/rounding_floor": diagnostics.summary(joined["floor"])["mean"],
            }
        if len(joined.get("mismatch", ())):
            mismatch = diagnostics.summary(joined["mismatch"])
            out |= {"agree/hard_kl": mismatch["mean"], "agree/hard_kl_max": mismatch["max"]}
        return out


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_model(config: ModelConfig, device: torch.device) -> tuple[Any, Any]:
    """(what holds the trained weights, the transformers model); they differ with LoRA only."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.path, dtype=getattr(torch, config.dtype)
        )
    except OSError as error:
        raise ValueError(f"cannot load model.path = {config.path!r}: {error}") from None
    model = model.to(device)
    if not config.lora_rank:
        return model, model
    try:
        import peft
    except ImportError:
        raise ValueError("model.lora_rank needs the package peft: pip install peft") from None
    settings = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear"
    )
    adapted = peft.get_peft_model(model, settings)
    return adapted, adapted.get_base_model()
