"""The numbers of an evaluation, as plain functions of arrays. P problems, n samples of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.95
SAME = 1e-12
"""Rates nearer than this differ by rounding only, as means over seeds do."""


def pass_at_k(correct: np.ndarray, n: int) -> np.ndarray:
    """Unbiased pass@k of every problem (Chen et al. 2021, section 2.1): the chance that k of its n
    samples, drawn without replacement, hold a correct one: 1 - C(n - c, k) / C(n, k).

    Args:
        correct: correct samples c of each problem, int [P], 0 <= c <= n.

    Returns:
        float64 [P, n]; column k - 1 is pass@k. k = 1 is the share of correct samples, k = n
        whether there is any.
    """
    c = np.asarray(correct, dtype=np.int64)[:, None]  # [P, 1]
    k = np.arange(n)[None]  # C(n-c, k+1) / C(n, k+1) = product over i = 0..k of (n-c-i) / (n-i)
    factors = np.maximum(n - c - k, 0) / (n - k)  # [P, n]
    return 1.0 - np.cumprod(factors, axis=1)


def mean_interval(
    values: np.ndarray, replicates: int, seed: int, low: float = -np.inf, high: float = np.inf
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over problems and its 95 % bootstrap interval (percentiles, problems resampled).

    Where every problem has the same value, resampling shows no spread at all: the interval then
    reaches to what chance could hide, if the values are bounded by `low` and `high`. With P
    problems alike, at most a share 1 - 0.025^(1/P) of all problems differs (exact binomial bound).
    Below 20 problems a bootstrap is too narrow (in simulations 85 % of the intervals of 5 problems
    hold the truth, 91 % of 10 to 20, 94 % of 50).

    Args:
        values: float [P, M]; a column per number.

    Returns:
        Mean, lower and upper end, each [M]; ends of one unbounded value are NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    if not count:
        nothing = np.full(values.shape[1], np.nan)
        return nothing, nothing, nothing
    mean = values.mean(axis=0)
    means = _weights(count, replicates, seed) @ values  # [R, M]
    tail = 50 * (1 - CONFIDENCE)
    lower, upper = np.percentile(means, [tail, 100 - tail], axis=0)
    alike = np.ptp(values, axis=0) < SAME
    hidden = _hidden(count)
    if np.isfinite(low):
        lower = np.where(alike, mean - hidden * (mean - low), lower)
    elif count == 1:
        lower = np.full_like(mean, np.nan)
    if np.isfinite(high):
        upper = np.where(alike, mean + hidden * (high - mean), upper)
    elif count == 1:
        upper = np.full_like(mean, np.nan)
    return mean, lower, upper


def ratio_interval(
    sums: np.ndarray, counts: np.ndarray, replicates: int, seed: int
) -> tuple[float, float, float]:
    """Mean over steps and its 95 % bootstrap interval over problems: a problem's steps stay
    together, since they resemble each other more than those of other problems do.

    Args:
        sums: of a number over a problem's steps, float [P].
        counts: steps of each problem, int [P].

    Returns:
        Mean, lower and upper end; NaN without any step, ends also with steps of one problem only.
    """
    if not counts.sum():
        return np.nan, np.nan, np.nan
    if (counts > 0).sum() == 1:
        return float(sums.sum() / counts.sum()), np.nan, np.nan
    weights = _weights(len(counts), replicates, seed)
    steps = weights @ counts  # [R]; 0 where a replicate drew only problems without steps
    means = (weights @ sums)[steps > 0] / steps[steps > 0]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def best_difference(
    ours: np.ndarray, theirs: np.ndarray, replicates: int, seed: int
) -> tuple[float, float, float]:
    """Best column's mean of ours minus that of theirs, with its 95 % bootstrap interval.

    Every replicate chooses its own best columns: which one is best is luck in part, and an interval
    of the columns chosen once would not know that.

    Args:
        ours, theirs: rates of the same problems, float [P, A] and [P, B], each in [0, 1].

    Returns:
        Difference, lower and upper end.
    """

    def best(means: np.ndarray) -> np.ndarray:
        return np.asarray(means.max(axis=-1))

    count = len(ours)
    difference = float(best(ours.mean(axis=0)) - best(theirs.mean(axis=0)))
    weights = _weights(count, replicates, seed)
    means = best(weights @ ours) - best(weights @ theirs)  # [R]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    if np.ptp(means) < SAME:  # as in mean_interval: no spread to resample
        low = difference - _hidden(count) * (difference + 1.0)
        high = difference + _hidden(count) * (1.0 - difference)
    return difference, float(low), float(high)


def _hidden(count: int) -> float:
    """Largest share of all problems that may differ where `count` of them agree."""
    return 1.0 - float(((1 - CONFIDENCE) / 2) ** (1.0 / count))


@lru_cache(maxsize=4)
def _weights(count: int, replicates: int, seed: int) -> np.ndarray:
    """How much every problem weighs in every replicate, float64 [R, P]."""
    rng = np.random.default_rng([seed, count])
    return rng.multinomial(count, np.full(count, 1.0 / count), size=replicates) / count


def vote_classes(extracted: Sequence[str | None], correct: Sequence[bool]) -> list[str | None]:
    """What each sample votes for: equal answers get equal names; None where nothing was read.

    Correct answers are one class, whatever their form: the verifier says that they are equal. Wrong
    ones are compared as numbers or as text.
    """
    out: list[str | None] = []
    for answer, right in zip(extracted, correct):
        if right:
            out.append("correct")
        else:
            out.append(None if answer is None else "wrong " + _plain(answer))
    return out


def majority(votes: Sequence[str | None], k: int) -> float:
    """Expected accuracy of the most frequent answer of k samples (self-consistency).

    Averages over the disjoint groups of k samples in order. A tie is broken by chance: correct
    counts as its share of the tied answers. Samples without an answer do not vote; a group
    without any vote is wrong.
    """
    groups = [votes[at : at + k] for at in range(0, len(votes) - k + 1, k)]
    return sum(_winner(group) for group in groups) / len(groups)


def _winner(votes: Sequence[str | None]) -> float:
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    tied = [vote for vote, count in counts.items() if count == most]
    return ("correct" in tied) / len(tied)


def distinct(votes: Sequence[str | None]) -> int:
    """Different answers among a problem's samples."""
    return len({vote for vote in votes if vote is not None})


def profile(entropies: Sequence[Sequence[float]]) -> tuple[list[float], list[int]]:
    """Mean entropy at every CoT position over the samples that think that long, and their number
    (section 4.5: non-pad tokens only)."""
    longest = max(map(len, entropies), default=0)
    sums, counts = np.zeros(longest), np.zeros(longest, dtype=np.int64)
    for row in entropies:
        sums[: len(row)] += row
        counts[: len(row)] += 1
    return (sums / np.maximum(counts, 1)).tolist(), counts.tolist()


def ks(n: int) -> list[int]:
    """1, 2, 4 ... and n."""
    powers = [2**i for i in range(n.bit_length()) if 2**i <= n]
    return powers if powers[-1] == n else [*powers, n]


def _plain(answer: str) -> str:
    text = answer.replace("$", "").replace("\\,", "").replace(" ", "").rstrip(".")
    try:
        number = Decimal(text.replace(",", ""))
        return str(number.normalize()) if number.is_finite() else text
    except ArithmeticError:  # no number, or one with an exponent beyond all bounds
        return text
