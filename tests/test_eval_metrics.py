"""Every number of the evaluation against brute force, a simulation or a hand-made example."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.eval import metrics
from trainer.eval.likelihood import choice_numbers, kl_numbers
from trainer.eval.metrics import distinct, majority, mean_interval, pass_at_k, profile, vote_classes
from trainer.eval.store import ChoiceRow, KlRow

outcomes = st.lists(st.booleans(), min_size=1, max_size=9)


@given(
    st.lists(outcomes, min_size=1, max_size=3).filter(lambda rows: len(set(map(len, rows))) == 1)
)
@settings(deadline=None)
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(rows: list[list[bool]]) -> None:
    n = len(rows[0])
    found = pass_at_k(np.array([sum(row) for row in rows]), n)
    for row, values in zip(rows, found):
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in combinations(row, k)]
            assert values[k - 1] == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_stays_exact_for_many_samples() -> None:
    n, c = 1024, 3
    values = pass_at_k(np.array([c]), n)[0]
    for k in (1, 7, 512, 1021, 1022, 1024):
        assert values[k - 1] == pytest.approx(1 - comb(n - c, k) / comb(n, k), abs=1e-12)


def test_pass_at_one_is_the_mean_and_pass_at_n_is_any() -> None:
    values = pass_at_k(np.array([0, 1, 4]), 4)
    assert values[:, 0].tolist() == [0, 0.25, 1]
    assert values[:, 3].tolist() == [0, 1, 1]


def test_the_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    """300 evaluations of 80 problems whose rates of success differ; nominal coverage 95 %."""
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for trial in range(300):
        rates = rng.beta(0.6, 1.2, size=80)
        correct = rng.binomial(8, rates)
        _, low, high = mean_interval(pass_at_k(correct, 8)[:, [0, 7]], 400, trial, 0.0, 1.0)
        # E[rate] and E[1 - (1 - rate)^8] under Beta(0.6, 1.2).
        any_of_8 = 1 - np.prod([(1.2 + i) / (1.8 + i) for i in range(8)])
        truth = np.array([0.6 / 1.8, any_of_8])
        hits += (low <= truth) & (truth <= high)
    assert np.all(np.abs(hits / 300 - 0.95) < 0.04)


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_large_sample() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(2000, 1))
    mean, low, high = mean_interval(values, 4000, 0)
    half = 1.96 * values.std() / 2000**0.5
    assert mean[0] == pytest.approx(values.mean())
    assert (low[0], high[0]) == pytest.approx((mean[0] - half, mean[0] + half), abs=0.06 * half)


def test_an_interval_is_never_empty_where_all_problems_agree() -> None:
    """None of 100 solved: up to 1 - 0.025^(1/100) = 3.6 % may still be solvable."""
    zeros, ones = np.zeros((100, 1)), np.ones((100, 1))
    assert np.concatenate(mean_interval(zeros, 200, 0, 0.0, 1.0)).tolist() == pytest.approx(
        [0, 0, 0.0362167], abs=1e-6
    )
    assert np.concatenate(mean_interval(ones, 200, 0, 0.0, 1.0)).tolist() == pytest.approx(
        [1, 1 - 0.0362167, 1], abs=1e-6
    )


def test_a_second_evaluation_gives_the_same_interval() -> None:
    values = np.random.default_rng(2).random((50, 3))
    metrics._weights.cache_clear()
    first = mean_interval(values, 100, 7)
    metrics._weights.cache_clear()
    assert all(np.array_equal(a, b) for a, b in zip(first, mean_interval(values, 100, 7)))
    assert not np.array_equal(first[1], mean_interval(values, 100, 8)[1])


def test_votes_join_equal_answers_and_leave_out_what_cannot_be_read() -> None:
    votes = vote_classes(
        ["1/2", "0.5", "1,000", "$1000.0$", "x + 1", "x+1", None],
        [True, True, False, False, False, False, False],
    )
    assert votes[0] == votes[1] == "correct"
    assert votes[2] == votes[3] and votes[4] == votes[5] and votes[2] != votes[4]
    assert votes[6] is None
    assert distinct(votes) == 3
    assert distinct([None, None]) == 0


def test_an_answer_beyond_all_numbers_is_a_text() -> None:
    votes = vote_classes(["1e9999999", "1e9999999", "-1e-9999999", "sNaN"], [False] * 4)
    assert votes[0] == votes[1] != votes[2] and len(set(votes)) == 3


@pytest.mark.parametrize(
    ("votes", "k", "expected"),
    [
        ("cab", 1, 1 / 3),  # three groups of one, one of them right
        ("cca", 3, 1.0),
        ("caa", 3, 0.0),
        ("ca", 2, 0.5),  # a tie is a toss
        ("cab", 3, 1 / 3),
        ("c..", 3, 1.0),  # what cannot be read does not vote
        ("....", 2, 0.0),
        ("ccaac", 2, 0.5),  # (cc) right, (aa) wrong, the fifth has no partner
    ],
)
def test_majority_by_hand(votes: str, k: int, expected: float) -> None:
    classes = [{"c": "correct", ".": None}.get(v, f"wrong {v}") for v in votes]
    assert majority(classes, k) == pytest.approx(expected)


def test_majority_of_one_is_pass_at_one() -> None:
    classes = ["correct", None, "wrong a", "correct", "wrong b"]
    assert majority(classes, 1) == pytest.approx(pass_at_k(np.array([2]), 5)[0, 0])


def test_the_entropy_profile_counts_only_samples_that_think_that_long() -> None:
    assert profile([[1.0, 2.0], [3.0], []]) == ([2.0, 2.0], [2, 1])
    assert profile([]) == ([], [])


def test_ks_are_powers_of_two_and_n() -> None:
    assert [metrics.ks(n) for n in (1, 2, 6, 32)] == [
        [1],
        [1, 2],
        [1, 2, 4, 6],
        [1, 2, 4, 8, 16, 32],
    ]


def test_choice_numbers_by_hand() -> None:
    rows = [
        # right by sum; by byte -4/8 = -0.5 against -5/20 = -0.25: wrong. NLL 4 / 2 tokens.
        ChoiceRow(item="a", gold=0, log_likelihood=[-4.0, -5.0], tokens=[2, 5], bytes=[8, 20]),
        # wrong by sum, right by byte. NLL 9 / 3 tokens.
        ChoiceRow(item="b", gold=1, log_likelihood=[-6.0, -9.0], tokens=[2, 3], bytes=[6, 18]),
    ]
    found = choice_numbers(rows, 100, 0)
    assert found["items"] == 2
    assert found["accuracy"][0] == 0.5
    assert found["accuracy_per_byte"][0] == 0.5
    assert found["nll_per_token"] == [2.5, 2.0, 3.0]


def test_kl_numbers_are_means_over_texts_per_token() -> None:
    rows = [
        KlRow(text="0", tokens=10, forward=1.0, reverse=2.0, nll=30.0, base_nll=20.0),
        KlRow(text="1", tokens=5, forward=1.0, reverse=0.0, nll=5.0, base_nll=10.0),
    ]
    found = kl_numbers(rows, 100, 0)
    assert found["tokens"] == 15
    assert [found[k][0] for k in ("kl", "kl_reverse", "nll", "base_nll")] == [0.15, 0.1, 2.0, 2.0]
