"""The CoT distribution over tokens, and the mixture h = p E it stands for.

Paper section 1.1, eq. 3 and 5: p = softmax(logits / tau) over the whole vocabulary,
h = sum_v p_v E_v. A support (top-k, top-p, min-p) may restrict p, which is then
renormalised. Two representations:

- `Dense`: p over all V columns (the paper's method, exact);
- `Sparse`: the k most likely ids and their probabilities, whose mixture costs almost nothing.

Everything accumulates in float32 (peers' bfloat16 sums bias long vocabularies). Plain torch:
this file is the reference that faster code is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

DROPPED_MASS = 1e-5
"""A dense mixture may leave out tokens of less probability than this, all of them together.

Their part of h is then below 1e-5 x max|E|, under 3e-4 sigma (gamma 0.33) even where an entry is
ten times the RMS, and far below the bfloat16 rounding of h (2**-9 of its value).
"""
_BLOCK = 256
_CHUNK = 8192


@dataclass(slots=True)
class Dense:
    """p over the vocabulary: probs float32 [B, V], rows sum to 1 (zeros outside the support)."""

    probs: torch.Tensor

    def sample(self, u: torch.Tensor) -> torch.Tensor:
        """Inverse-CDF draw: ids int64 [B] for uniforms u float64 [B]."""
        return inverse_cdf(self.probs, u)

    def log_prob(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 [B]: log p of one id per row."""
        return self.probs.gather(1, ids[:, None])[:, 0].log()

    def top(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k most likely: ids int64 [B, k], probs float32 [B, k], most likely first."""
        probs, ids = top_k_in_order(self.probs, min(k, self.probs.shape[1]))
        return ids, probs

    def expect(self, table: torch.Tensor) -> torch.Tensor:
        """h = p E: float32 [B, d] for a table [>= V, d] of any float type."""
        return dense_expect(self.probs, table)


@dataclass(slots=True)
class Sparse:
    """p on at most k tokens: ids int64 [B, k] (most likely first), probs float32 [B, k]."""

    ids: torch.Tensor
    probs: torch.Tensor

    def sample(self, u: torch.Tensor) -> torch.Tensor:
        column = inverse_cdf(self.probs, u)
        return self.ids.gather(1, column[:, None])[:, 0]

    def log_prob(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.probs * (self.ids == ids[:, None])).sum(1).log()

    def top(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        k = min(k, self.ids.shape[1])
        return self.ids[:, :k], self.probs[:, :k]

    def expect(self, table: torch.Tensor) -> torch.Tensor:
        return sparse_expect(self.ids, self.probs, table)


Distribution = Dense | Sparse


@dataclass(slots=True)
class Support:
    """Which tokens a batch of B rows may mix.

    Order as in vLLM: temperature, min-p, top-k, top-p on what is left, renormalised last. A row
    that does not use a filter is not touched by its neighbours' doing so.
    """

    tau: torch.Tensor
    """float32 [B]."""
    top_k: torch.Tensor | None = None
    """int [B] with values 1 to max_top_k, or None for the whole vocabulary."""
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None
    """float32 [B], or None where no row uses them."""
    max_top_k: int = 0
    """Host-side maximum of top_k, so that no device value is read."""

    def dense(self, probs: torch.Tensor) -> Dense:
        """From softmax(logits / tau), float32 [B, V]."""
        if self.min_p is not None:
            probs = _apply_min_p(probs, self.min_p)
        if self.top_p is not None:
            probs = _nucleus(probs, self.top_p)
        return Dense(probs)

    def sparse(self, values: torch.Tensor, ids: torch.Tensor) -> Sparse:
        """From the largest logits and their ids, [B, k], as `top_k_in_order` gives them."""
        assert self.top_k is not None
        values = values / self.tau[:, None]
        rank = torch.arange(values.shape[1], device=values.device)
        values = values.masked_fill(rank[None, :] >= self.top_k[:, None], float("-inf"))
        probs = torch.softmax(values, dim=-1)
        if self.min_p is not None:
            probs = _apply_min_p(probs, self.min_p)
        if self.top_p is not None:
            probs = _keep_mass(probs, self.top_p)
        return Sparse(ids, probs)


@dataclass(slots=True)
class Reading:
    """What a think step takes from the logits."""

    dist: Distribution
    """p at tau on its support. Its tensors may be scratch memory: valid until the next reading."""
    shadow: torch.Tensor
    """argmax of the unscaled distribution, ties by lowest index: int64 [B]."""
    entropy: torch.Tensor
    """Entropy of the unscaled distribution in nats, float32 [B]."""


Read = Callable[[torch.Tensor, Support], Reading]
"""read(logits [B, V] of any float type, support): the function below, or a faster equal."""


def read(logits: torch.Tensor, support: Support) -> Reading:
    """Distribution, shadow and entropy of a batch of rows; logits [B, V] without padded rows."""
    logits = logits.to(torch.float32)
    dist = _distribution(logits, support)
    # The most likely token comes first in a sparse distribution, at any temperature.
    shadow = dist.ids[:, 0] if isinstance(dist, Sparse) else logits.argmax(dim=-1)
    return Reading(dist, shadow, entropy(logits, shadow))


def _distribution(logits: torch.Tensor, support: Support) -> Distribution:
    if support.top_k is None:
        return support.dense(torch.softmax(logits / support.tau[:, None], dim=-1))
    return support.sparse(*top_k_in_order(logits, min(support.max_top_k, logits.shape[1])))


def distribution(
    logits: torch.Tensor,
    tau: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    max_top_k: int = 0,
) -> Distribution:
    """p at temperature tau on its support (see `Support`); logits float32 [B, V]."""
    return _distribution(logits, Support(tau, top_k, top_p, min_p, max_top_k))


def top_k_in_order(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row [B, V], largest first, ties by lowest index: values, ids [B, k].

    Two-byte logits are often equal, and which of them `topk` returns depends on k and thus on the
    neighbours in the batch. Here the first k' columns are the same for every k >= k'.
    """
    top, ids = values.topk(k, dim=-1)
    if values.device.type == "cpu":  # CUDA's radix select already takes the lowest of the last
        edge = top[:, -1:]
        equal = values == edge
        rows = torch.nonzero(equal.sum(1) > (top == edge).sum(1))[:, 0]
        if len(rows):
            columns = torch.arange(values.shape[1])
            lowest = torch.where(equal[rows], columns, values.shape[1])
            lowest = lowest.topk(k, dim=-1, largest=False).values
            place = torch.arange(k) - (top[rows] > edge[rows]).sum(1, keepdim=True)
            ids[rows] = torch.where(place >= 0, lowest.gather(1, place.clamp(min=0)), ids[rows])
    ids, order = ids.sort(dim=-1)
    top, order = top.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return top, ids.gather(1, order)


def _apply_min_p(probs: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    floor = probs.amax(dim=-1, keepdim=True) * min_p[:, None]
    kept = probs * (probs >= floor)
    return torch.where(min_p[:, None] > 0.0, kept / kept.sum(dim=-1, keepdim=True), probs)


def _keep_mass(sorted_probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the fewest leading columns whose mass reaches top_p; columns are sorted."""
    before = sorted_probs.cumsum(dim=-1) - sorted_probs
    inside = before < top_p[:, None]
    inside[:, 0] = True  # never an empty support
    kept = sorted_probs * inside
    kept = kept / kept.sum(dim=-1, keepdim=True)
    # A float32 running sum may reach 1 before the last column does.
    return torch.where(top_p[:, None] < 1.0, kept, sorted_probs)


def _nucleus(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(probs).scatter_(1, ids, _keep_mass(ordered, top_p))


def inverse_cdf(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Column index int64 [B] with P(column) = probs[:, column], from u float64 [B] in (0, 1).

    Two levels with float64 sums: a float32 running sum over 150,000 columns would be off by
    more than the rare tokens' probabilities.
    """
    rows, columns = probs.shape
    padded = -(-columns // _BLOCK) * _BLOCK
    if padded != columns:
        probs = torch.nn.functional.pad(probs, (0, padded - columns))
    blocks = probs.view(rows, -1, _BLOCK)
    block_cdf = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # [B, V / 256]
    target = u[:, None] * block_cdf[:, -1:]
    block = (block_cdf <= target).sum(dim=-1).clamp(max=block_cdf.shape[1] - 1)
    start = torch.where(
        block > 0, block_cdf.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0
    )
    inside = blocks[torch.arange(rows, device=probs.device), block].to(torch.float64)
    cdf = inside.cumsum(dim=-1) + start[:, None]
    # A zero-probability column must never be hit, not even through rounding at a block's end.
    last = (inside > 0).long().mul(torch.arange(1, _BLOCK + 1, device=probs.device)).amax(1) - 1
    column = torch.minimum((cdf <= target).sum(dim=-1), last.clamp(min=0))
    return block * _BLOCK + column


def dense_expect(probs: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """p E in float32, chunk by chunk over the vocabulary: [B, V] x [>= V, d] -> [B, d].

    Rows of the table beyond V (vocabulary padding) are never read.
    """
    out = torch.zeros(probs.shape[0], table.shape[1], device=probs.device, dtype=torch.float32)
    for start in range(0, probs.shape[1], _CHUNK):
        stop = min(start + _CHUNK, probs.shape[1])
        out.addmm_(probs[:, start:stop], table[start:stop].to(torch.float32))
    return out


def sparse_expect(ids: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """sum_j w_j E[id_j] in float32: ids [B, k], weights [B, k] -> [B, d]."""
    rows = torch.nn.functional.embedding(ids, table).to(torch.float32)  # [B, k, d]
    return torch.einsum("bk,bkd->bd", weights, rows)


@dataclass(slots=True)
class Ragged:
    """Each row's own list of tokens: row b holds entries offsets[b] to offsets[b + 1]."""

    ids: torch.Tensor  # int64 [N]
    weights: torch.Tensor  # float32 [N]
    offsets: torch.Tensor  # int64 [B + 1]


def cuts(columns: int, dropped: float = DROPPED_MASS) -> tuple[float, float]:
    """Coarse and fine probability below which a token may be left out.

    Leaving out everything below dropped / V is safe for any distribution, but real ones hold
    far less than that bound in their tails: ten times the cut usually drops less than `dropped`,
    with a third of the tokens.
    """
    return 10.0 * dropped / columns, dropped / columns


def significant(probs: torch.Tensor, dropped: float = DROPPED_MASS) -> Ragged:
    """Tokens that matter: what is left out sums to less than `dropped` in every row.

    A row uses the coarse cut where that keeps the bound (with 20 % to spare for the rounding
    of float32 probabilities), else the fine one, which keeps it for any distribution. Weights
    are the probabilities themselves, not renormalised.
    """
    coarse, fine = cuts(probs.shape[1], dropped)
    kept = torch.where(probs >= coarse, probs, 0.0).sum(dim=-1, dtype=torch.float64)
    cut = torch.where(1.0 - kept <= 0.8 * dropped, coarse, fine).to(torch.float32)
    rows, ids = torch.nonzero(probs >= cut[:, None], as_tuple=True)
    counts = torch.bincount(rows, minlength=probs.shape[0])
    offsets = torch.zeros(probs.shape[0] + 1, dtype=torch.int64, device=probs.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return Ragged(ids, probs[rows, ids], offsets)


def ragged_expect(ragged: Ragged, table: torch.Tensor) -> torch.Tensor:
    """Reference for the ragged sum: float32 [B, d], summed in float64 (thousands of equal terms
    drift by 3e-5 in float32)."""
    counts = ragged.offsets.diff()
    rows = torch.repeat_interleave(torch.arange(len(counts), device=table.device), counts)
    out = torch.zeros(len(counts), table.shape[1], dtype=torch.float64, device=table.device)
    terms = table[ragged.ids].to(torch.float64) * ragged.weights[:, None]
    return out.index_add_(0, rows, terms).to(torch.float32)


def entropy(logits: torch.Tensor, argmax: torch.Tensor | None = None) -> torch.Tensor:
    """Entropy in nats of softmax(logits), unscaled and unfiltered: float32 [B].

    Healthy range: 0 to ln V; sharp reasoning steps stay below 0.5. NaN logits give NaN, which
    is how a broken model shows up in a trace. `argmax` int64 [B] saves a pass if known.
    """
    probs = torch.softmax(logits, dim=-1)
    # A float32 softmax over 50,000 columns sums to 1 within 2e-5 only, which the mean logit
    # (about 20) would turn into 4e-4 nats.
    total = probs.sum(dim=-1)
    best = (logits.argmax(dim=-1) if argmax is None else argmax)[:, None]
    # log Z from the largest term: logsumexp would pass over the vocabulary three more times.
    log_z = logits.gather(1, best)[:, 0] - (probs.gather(1, best)[:, 0] / total).log()
    mean = torch.linalg.vecdot(probs, logits) / total
    # A masked token has logit -inf and probability 0; its term is 0, not NaN. Clamping costs a
    # copy of the logits, so a CPU, which can look, does it only where it matters.
    if logits.device.type != "cpu" or bool(mean.isnan().any()):
        finite = logits.clamp(min=torch.finfo(logits.dtype).min)
        mean = torch.linalg.vecdot(probs, finite) / total
    # Rounding may leave a point mass at -1e-7; clamp keeps NaN.
    return (log_z - mean).clamp(min=0.0)
