import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from lorl.statistics import mean_interval, pass_at_k, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),  # z^2 / (n + z^2)
        (10, 10, 0.72247, 1.0),
        (8, 10, 0.49016, 0.94331),
        (1, 2, 0.09453, 0.90547),
    ],
)
def test_wilson_matches_published_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(("successes", "n", "confidence"), [(3, 7, 0.95), (100, 256, 0.95), (9, 12, 0.8)])
def test_wilson_bounds_are_the_shares_that_the_score_test_just_accepts(successes, n, confidence):
    """The interval inverts the score test: |share - p| = z * sqrt(p (1 - p) / n) at both bounds."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    for p in wilson_interval(successes, n, confidence):
        assert abs(successes / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), rel=1e-9)


def test_wilson_knows_nothing_without_trials_and_refuses_impossible_counts():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 of 4"):
        wilson_interval(5, 4)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 4, confidence=95)


def test_pass_at_k_equals_enumeration_of_all_subsets():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            right = [i < c for i in range(n)]
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_1_is_the_share_of_right_samples_and_large_n_does_not_overflow():
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="pass@9"):
        pass_at_k(8, 3, 9)


def test_mean_of_zeros_and_ones_gets_wilsons_interval():
    assert mean_interval([1, 0, 1, 1]) == wilson_interval(3, 4)
    assert mean_interval([0.0] * 20)[1] > 0.1  # twenty failures do not prove that success is impossible


def test_bootstrap_repeats_itself_and_agrees_with_the_normal_interval_where_that_holds():
    scores = np.random.default_rng(1).beta(2, 2, size=400).round(3)
    low, high = mean_interval(list(scores))
    half = 1.96 * scores.std(ddof=1) / math.sqrt(400)
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.003)
    assert mean_interval(list(scores)) == (low, high)
    assert low < mean_interval(list(scores), confidence=0.5)[0]


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth = pass_at_1 = 0.3
    covered = 0
    for _ in range(200):
        counts = rng.binomial(8, pass_at_1, size=60)
        low, high = mean_interval(list(counts / 8))
        covered += low <= truth <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_scores_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval([0.5, 1.5])
