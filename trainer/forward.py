"""One forward pass: from a packed batch to the log-densities of everything that was decided.

The model reads [prompt embeddings, recorded h~ as constants, embeddings of hard tokens], so every
step is judged in the context in which it was taken (teacher forcing; no gradient through past
soft tokens, paper eq. 7-15). All tensors are in table units; the embedding's multiplier, if
the model has one, is applied once, to everything the model reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from softvllm.core.embedding import module_scale
from trainer import head
from trainer.attention import Boundaries, Kernel, name_of, pick
from trainer.head_chunks import Logits
from trainer.head_reference import scaled_logits
from trainer.head_sparse import sparse_soft_mean
from trainer.packing import Batch

TableGradient = Literal["full", "no_mixture", "frozen"]


@dataclass(frozen=True, slots=True)
class Densities:
    """What a model says about a batch's Ns Gaussian and Nh log-prob terms."""

    soft: torch.Tensor
    """log N(h~; mu, sigma^2 I) without its constant: -|h~ - mu|^2 / (2 sigma^2), summed over the
    d coordinates (eq. 8), float32 [Ns]."""
    mean: torch.Tensor
    """mu, float32 [Ns, d], table units."""
    hard: torch.Tensor
    """log p of what was drawn, float32 [Nh]."""
    entropy: torch.Tensor | None
    """Entropy of the distributions behind `hard`, float32 [Nh], if asked for."""

    def detach(self) -> Densities:
        """The same values as constants: `old` of a ratio, or a reference."""
        entropy = None if self.entropy is None else self.entropy.detach()
        return Densities(self.soft.detach(), self.mean.detach(), self.hard.detach(), entropy)


class Policy(torch.nn.Module):
    """A transformers causal LM as a density over recorded chains.

    A module of its own, so that FSDP gathers the embedding and the head for the whole of
    `forward`, which uses both outside the model's own forward.
    """

    def __init__(
        self,
        model: Any,
        *,
        table_gradient: TableGradient = "full",
        kernel: Kernel | None = None,
        checkpointing: bool = False,
        head_dtype: torch.dtype | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: `AutoModelForCausalLM`, possibly with LoRA (peft) on its layers.
            table_gradient: full: E learns through every use, mixtures pE included; no_mixture:
                not through pE; frozen: the embedding is not trained (with tied weights neither
                is the head).
            kernel: attention over packed sequences; None: by device and type.
            checkpointing: compute layers again in the backward pass instead of keeping them; the
                module must be in training mode.
            head_dtype: type of hidden states, head and table inside the head, bfloat16 to use
                two-byte products under float32 master weights and to see the same table as a
                bfloat16 rollout; None: as they are.

        The model keeps the packed attention: afterwards it only runs through this class.

        Raises:
            ValueError: a head that does more than the trainer knows.
        """
        super().__init__()
        self.model, self.table_gradient, self.kernel = model, table_gradient, kernel
        self.head_dtype = head_dtype
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.form = logits_form(model)
        embedding = model.get_input_embeddings()
        self.scale = module_scale(embedding)
        output = model.get_output_embeddings()
        if type(output) is not torch.nn.Linear:
            raise ValueError(
                f"the output head is a {type(output).__name__}, the trainer knows nn.Linear; "
                "with LoRA leave lm_head out of target_modules"
            )
        if table_gradient == "frozen":
            embedding.weight.requires_grad_(False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()

    def forward(self, batch: Batch, with_entropy: bool = False) -> Densities:
        """Densities of all terms of a batch on the model's device, with gradients."""
        table = self.table
        hidden = self.hidden(batch, table)
        weight, bias = self.output_head(table)
        if self.head_dtype is not None:
            shared = weight is table
            hidden, weight = hidden.to(self.head_dtype), weight.to(self.head_dtype)
            table = weight if shared else table.to(self.head_dtype)
        mean = self._mean(batch, hidden, weight, bias, table)
        error = batch.soft.value.to(mean.dtype) - mean
        soft = -error.square().sum(-1) / (2.0 * batch.soft.sigma.to(mean.dtype) ** 2)
        hard = batch.hard
        log_prob, entropy = head.token_log_prob(
            hidden[hard.row],
            weight,
            hard.ids,
            hard.tau,
            bias=bias,
            form=self.form,
            support=hard.support,
            with_entropy=with_entropy,
        )
        return Densities(soft, mean, log_prob, entropy)

    @property
    def table(self) -> torch.Tensor:
        """E [V, d]: real rows, before any multiplier."""
        return self._rows(self.model.get_input_embeddings().weight)

    def hidden(self, batch: Batch, table: torch.Tensor) -> torch.Tensor:
        """Last hidden states [R, d] of a batch."""
        soft = batch.soft_values
        if soft.shape[1] != table.shape[1] and len(soft):
            raise ValueError(
                f"recorded inputs have {soft.shape[1]} coordinates, the model {table.shape[1]}: "
                "the rollouts come from another model"
            )
        embeds = torch.nn.functional.embedding(batch.token_ids, table)
        if len(soft):
            embeds = embeds.index_copy(0, batch.soft_rows, soft.to(embeds.dtype))
        if self.scale != 1.0:
            # The multiplier in the table's own type, as the model and the oracle round it.
            embeds = embeds * torch.tensor(self.scale).to(embeds)
        decoder = self.model.get_decoder()
        kernel = self.kernel or pick(embeds.device, embeds.dtype)
        # Stays set: checkpointed layers read it again in the backward pass.
        decoder.config._attn_implementation = name_of(kernel)
        out = decoder(
            inputs_embeds=embeds[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            boundaries=Boundaries(batch.lengths, batch.cu_seqlens, batch.parents),
        )
        return out.last_hidden_state[0]

    def output_head(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output rows [V, d] and bias [V]; the rows are `table` itself where the two are tied."""
        output = self.model.get_output_embeddings()
        tied = output.weight is self.model.get_input_embeddings().weight
        weight = table if tied else self._rows(output.weight)
        return weight, None if output.bias is None else output.bias[: self.vocab_size]

    def _rows(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if len(weight) == self.vocab_size else weight[: self.vocab_size]

    def _mean(
        self,
        batch: Batch,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        table: torch.Tensor,
    ) -> torch.Tensor:
        """Means of the Gaussian terms: w pE + (1 - w) E[token], float32 [Ns, d]."""
        terms = batch.soft
        if self.table_gradient == "no_mixture":
            table = table.detach()
        if not len(terms.row):
            return torch.zeros(0, table.shape[1], device=table.device)
        rows = hidden[terms.row]

        def dense(at: torch.Tensor | slice) -> torch.Tensor:
            support = None if terms.support is None else terms.support[at]
            mean, _ = head.soft_mean(
                rows[at], weight, table, terms.tau[at], bias=bias, form=self.form, support=support
            )
            return mean

        if terms.ids is None:
            mean = dense(slice(None))
        else:
            recorded = (terms.ids >= 0).any(dim=1)
            is_in, is_out = recorded.nonzero()[:, 0], (~recorded).nonzero()[:, 0]
            sparse = sparse_soft_mean(
                rows[is_in],
                weight,
                table,
                terms.ids[is_in],
                terms.tau[is_in],
                bias=bias,
                form=self.form,
            )
            mean = sparse.new_zeros(len(rows), table.shape[1]).index_copy(0, is_in, sparse)
            if len(is_out):
                mean = mean.index_copy(0, is_out, dense(is_out))
        if bool((terms.mix < 1).any()):
            own = torch.nn.functional.embedding(terms.token, table).to(mean.dtype)
            mix = terms.mix[:, None].to(mean.dtype)
            mean = mix * mean + (1.0 - mix) * own
        return mean


def logits_form(model: Any) -> Logits:
    """What a model does between head and logits, from its config; `check` proves it right."""
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "logit_scale", None):
        scale = float(config.logit_scale)
    return Logits(scale, getattr(config, "final_logit_softcapping", None))


CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Root mean square of relative differences of log-probs that `check` takes for rounding."""


@torch.no_grad()
def check(policy: Policy, seed: int = 0) -> float:
    """Compare the policy with the model's own forward pass; call it once, before wrapping.

    Two random sequences, packed, must give the log-probs that the model gives each of them alone
    with its own attention and head. Catches layers that look across sequences, unknown attention
    variants, multipliers, caps and heads.

    Returns:
        The root mean square difference, relative to the spread of the log-probs. Healthy: below
        1e-4 in float32, below 1e-2 in bfloat16 (whose largest of 50,000 is near 3e-2).

    Raises:
        ValueError: they differ by more than `CHECK_TOLERANCE`.
    """
    model, device = policy.model, policy.table.device
    generator = torch.Generator().manual_seed(seed)
    lengths = (9, 6)
    ids = [torch.randint(policy.vocab_size, (n,), generator=generator).to(device) for n in lengths]
    was_training = model.training
    model.eval()
    config = model.get_decoder().config
    before = config._attn_implementation
    own = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    worst = 0.0
    try:
        packed = Batch(
            token_ids=torch.cat(ids),
            soft_rows=torch.zeros(0, dtype=torch.int64, device=device),
            soft_values=torch.zeros(0, policy.table.shape[1], device=device),
            position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]),
            cu_seqlens=torch.tensor([0, 9, 15], dtype=torch.int32, device=device),
            lengths=lengths,
            soft=None,  # type: ignore[arg-type]
            hard=None,  # type: ignore[arg-type]
            num_decisions=torch.zeros(2),
        )
        table = policy.table
        weight, bias = policy.output_head(table)
        lasts = [rows[-1:] for rows in policy.hidden(packed, table).split(list(lengths))]
        for i, last in zip(ids, lasts):
            one = torch.ones(1, device=device)
            got = scaled_logits(last, weight, one, bias, policy.form)[0].log_softmax(-1)
            config._attn_implementation = own
            logits = model(input_ids=i[None], use_cache=False).logits[0, -1, : policy.vocab_size]
            want = logits.float().log_softmax(-1)
            worst = max(worst, float((got - want).square().mean().sqrt() / want.std()))
    finally:
        config._attn_implementation = before
        model.train(was_training)
    if not worst <= CHECK_TOLERANCE.get(policy.table.dtype, 1e-3):
        raise ValueError(
            f"the trainer's forward pass is not this model's: log-probs differ by {worst:.2g} of "
            f"their spread ({type(model).__name__}); its attention, embedding or head does "
            "something the trainer does not know"
        )
    return worst
