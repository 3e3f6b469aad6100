"""The oracle: soft decoding as a plain loop over a transformers model, written for reading.

One request, one forward pass per token, one `if` per rule. It shares with the engine what a
request means (parameters, noise, the draw by inverse CDF, sigma, the trace format) and nothing
of how the engine gets there: phases, policies and mixture are written again here, so that two
independent versions check each other.

    oracle = Oracle.load("path/to/model")
    result = oracle.decode(prompt_ids, CoTParams(mode="soft", seed=1), max_tokens=256)

Penalties, stop strings, grammars and policies registered by others are the engine's alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from softvllm.core import noise
from softvllm.core.embedding import embedding_rms, module_scale, noise_sigma, noisy_input
from softvllm.core.mixture import inverse_cdf
from softvllm.core.params import CoTParams
from softvllm.core.phases import EndCause, Phase
from softvllm.core.resolve import ResolvedCoT, resolve
from softvllm.core.trace import STEP, Kind, Trace

GREEDY_BELOW = 1e-5
"""Answer temperatures below this mean argmax, as in vLLM."""
_META = ("mode", "policy", "policy_values", "tau", "gamma", "top_k", "top_p", "min_p")


@dataclass(slots=True)
class OracleResult:
    """What one request gave: T generated positions."""

    token_ids: list[int]
    """Visible tokens: shadow, sampled and forced ones."""
    trace: Trace
    """As the engine's, always with the embeddings of soft steps."""
    inputs: torch.Tensor
    """What each position feeds, model dtype [T, d], table units; the last is never consumed."""
    logits: torch.Tensor | None
    """float32 [T, V], masked stop tokens at -inf; only if asked for."""


@dataclass(slots=True)
class _Thought:
    """What a think step would show and feed."""

    token: int
    log_prob: float | None = None  # None: not sampled
    mean: torch.Tensor | None = None  # h, float32 [d]; None: the token's own embedding is fed


class Oracle:
    """A transformers causal LM (in evaluation mode) that thinks softly."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        # `inputs_embeds` must carry what the bypassed module applies, in the model's dtype. A
        # model that multiplies later does so to `inputs_embeds`, too.
        module, ids = model.get_input_embeddings(), torch.arange(2, device=self.table.device)
        self.scale = torch.tensor(module_scale(module)).to(self.table)
        if not torch.equal(module(ids), self.table[ids] * self.scale):
            raise ValueError(f"{type(module).__name__} does more than look up and scale rows")

    @classmethod
    def load(cls, path: str, dtype: Any = "auto") -> Oracle:
        """Model and tokenizer of a folder or a Hugging Face name."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        return cls(model, AutoTokenizer.from_pretrained(path))

    @property
    def table(self) -> torch.Tensor:
        """The embedding table E [V, d]: real rows, before any multiplier."""
        return self.model.get_input_embeddings().weight.detach()[: self.vocab_size]

    def stop_ids(self) -> set[int]:
        """Tokens that end a request: EOS of the tokenizer and of the generation config."""
        config = getattr(self.model, "generation_config", None)
        eos = getattr(config, "eos_token_id", None)
        stops = eos if isinstance(eos, list) else [eos]
        stops = [*stops, getattr(self.tokenizer, "eos_token_id", None)]
        return {stop for stop in stops if stop is not None}

    @torch.no_grad()
    def decode(
        self,
        prompt_ids: Sequence[int],
        cot: CoTParams | ResolvedCoT,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop_token_ids: Iterable[int] = (),
        feed: torch.Tensor | None = None,
        keep_logits: bool = False,
    ) -> OracleResult:
        """Think and answer.

        Args:
            prompt_ids: the prompt, at least one token.
            cot: the think phase; a `ResolvedCoT` brings its own seed and stop tokens.
            max_tokens: generated positions of all phases together.
            temperature, top_k, top_p, min_p: of the answer phase; temperature 0 is greedy.
            seed: of the request, used where `cot` has none.
            stop_token_ids: tokens that end the answer besides EOS.
            feed: inputs [T, d] to feed instead of the oracle's own, e.g. those that an engine
                recorded (`reconstruct`). Then every step is judged by itself; running free, a
                small model may multiply a rounding difference tenfold from step to step.
        """
        if isinstance(cot, CoTParams):
            cot = resolve(
                cot,
                self.tokenizer,
                stop_ids=self.stop_ids() | set(stop_token_ids),
                vocab_size=self.vocab_size,
                greedy_answer=temperature < GREEDY_BELOW,
                request_seed=seed,
                max_tokens=max_tokens,
            )
        table = self.table
        rms = embedding_rms(table)
        sigma = noise_sigma(cot.gamma, rms) if cot.gamma else 0.0
        steps = np.zeros(max_tokens, STEP)
        inputs: list[torch.Tensor] = []
        logits_kept: list[torch.Tensor] = []

        thoughts: list[int] = []
        forced: list[int] = []  # forced tokens still to come
        answers = 0
        cause = EndCause.UNFINISHED  # as long as it thinks
        if cot.max_think == 0:
            cause, forced = EndCause.BUDGET, list(cot.after_cut)
        cold = 0  # low-entropy steps in a row
        memory: dict[str, bool] = {}  # the policy's own

        rows, cache = table[torch.as_tensor(prompt_ids, device=table.device)], None
        for t in range(max_tokens):
            logits, cache = self._forward(rows, cache)
            step, fed, thought = steps[t], None, None

            if cause == EndCause.UNFINISHED:
                if t < cot.min_think:
                    logits[cot.stop_ids] = -torch.inf
                entropy = float(torch.special.entr(logits.softmax(-1)).sum())
                thought = self._think(cot, t, logits, entropy, table, memory)
                if thought.token in cot.stop_ids:
                    # Never shown: this very position is the first after the think phase.
                    thought, cause, forced = None, EndCause.EOS, list(cot.after_cut)

            if thought is not None:
                step["phase"], step["kind"] = Phase.THINK, Kind.SAMPLED
                step["token"], step["entropy"] = thought.token, entropy
                step["log_prob"] = thought.log_prob or 0.0
                if thought.mean is not None:
                    step["kind"] = Kind.SOFT if thought.log_prob is None else Kind.SOFT_SAMPLED
                    z = noise.gaussian(*self._counter(cot.seed, t), table.shape[1])
                    spread = torch.full((1,), sigma, device=table.device)
                    fed = noisy_input(thought.mean[None], spread, z, table.dtype)[0]
                thoughts.append(thought.token)
                cold = cold + 1 if entropy < cot.cold_entropy else 0
                may_end = t + 1 >= cot.min_think
                if may_end and any(thoughts[-len(s) :] == s for s in cot.end_sequences):
                    cause, forced = EndCause.END_SEQUENCE, list(cot.after_end)
                elif t + 1 >= cot.max_think:
                    cause, forced = EndCause.BUDGET, list(cot.after_cut)
                elif may_end and cold >= cot.cold_steps:
                    cause, forced = EndCause.COLD_STOP, list(cot.after_cut)
            elif forced:
                step["phase"], step["kind"] = Phase.FORCED, Kind.FORCED
                step["token"] = forced.pop(0)
            else:
                step["phase"], step["kind"] = Phase.ANSWER, Kind.SAMPLED
                step["token"] = int(logits.argmax())
                if temperature >= GREEDY_BELOW:
                    probs = shaped(logits, temperature, top_k, top_p, min_p)
                    drawn = self._draw(probs, cot.seed, t, stream=noise.ANSWER)
                    step["token"], step["log_prob"] = drawn
                answers += 1

            step["cause"] = cause
            inputs.append(table[int(step["token"])] if fed is None else fed)
            rows = (inputs if feed is None else feed)[t][None]
            if keep_logits:
                logits_kept.append(logits)
            if answers and (step["token"] in cot.stop_ids or answers == cot.answer_max):
                break

        stacked = torch.stack(inputs)
        trace = Trace({}, steps[: len(inputs)])
        if len(trace.soft_positions):
            raw = stacked[trace.soft_positions].cpu()
            trace.dense = (raw.view(torch.uint16) if raw.element_size() == 2 else raw).numpy()
        trace.meta = {name: getattr(cot, name) for name in _META} | {
            "seed": cot.seed,
            "max_think": cot.max_think,
            "record": "dense",
            "sigma": sigma,
            "sigmas": [[sigma, 0]],
            "rms": rms,
            "dtype": str(table.dtype).removeprefix("torch."),
            "dim": table.shape[1],
            "vocab_size": self.vocab_size,
            "weight_versions": [],
        }
        kept = torch.stack(logits_kept) if keep_logits else None
        return OracleResult(trace.token.tolist(), trace, stacked, kept)

    def _forward(self, rows: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits float32 [V] after the rows [n, d] (table units), and the grown KV cache."""
        embeds = (rows * self.scale)[None]
        out = self.model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1)
        return out.logits[0, -1, : self.vocab_size].float(), out.past_key_values

    def _think(
        self,
        cot: ResolvedCoT,
        t: int,
        logits: torch.Tensor,
        entropy: float,
        table: torch.Tensor,
        memory: dict[str, bool],
    ) -> _Thought:
        """The policy's choice at position t from logits [V]."""
        probs = shaped(logits, cot.tau, cot.top_k, cot.top_p, cot.min_p)
        hard = _Thought(*self._draw(probs, cot.seed, t, by_rank=cot.top_k > 0))
        mixture = probs @ table.float()
        soft = _Thought(int(logits.argmax()), mean=mixture)
        values = cot.policy_values
        if cot.policy == "hard":
            return hard
        if cot.policy == "soft":
            return soft
        if cot.policy == "blend":
            hard.mean = values[0] * mixture + (1 - values[0]) * table[hard.token].float()
            return hard
        if cot.policy == "interleave":
            u = noise.uniform(*self._counter(cot.seed, t), noise.POLICY)
            return soft if float(u) < values[0] else hard
        if cot.policy == "entropy":
            low, high, soft_above = values[0], values[1], values[2] >= 0.5
            if entropy >= high:
                memory["high"] = True
            elif entropy < low:
                memory["high"] = False
            return soft if memory.setdefault("high", soft_above) == soft_above else hard
        raise ValueError(f"the oracle does not know policy {cot.policy!r}")

    def _counter(self, seed: int, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Seed and position as the noise functions take them: int64 [1] each."""
        device = self.table.device
        return torch.tensor([seed], device=device), torch.tensor([t], device=device)

    def _draw(
        self,
        probs: torch.Tensor,
        seed: int,
        t: int,
        by_rank: bool = False,
        stream: int = noise.SAMPLE,
    ) -> tuple[int, float]:
        """Token and log-prob from probs [V] by inverse CDF, whose columns run in vocabulary
        order, or from the most likely down (`by_rank`) as where only the top k are known."""
        columns, order = torch.sort(probs, descending=True, stable=True)
        u = noise.uniform(*self._counter(seed, t), stream)
        if by_rank:
            token = int(order[inverse_cdf(columns[None], u)])
        else:
            token = int(inverse_cdf(probs[None], u))
        return token, float(probs[token].log())


def shaped(
    logits: torch.Tensor, tau: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """softmax(logits / tau) float32 [V], filtered by min-p, then top-k, then top-p of the rest."""
    probs = torch.softmax(logits / tau, dim=-1)
    probs[probs < min_p * probs.max()] = 0.0
    order = probs.argsort(descending=True, stable=True)
    probs[order[top_k or len(order) :]] = 0.0
    probs /= probs.sum()
    if top_p < 1.0:
        before = probs[order].cumsum(0) - probs[order]
        probs[order[before >= top_p]] = 0.0
    return probs / probs.sum()
