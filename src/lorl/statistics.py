"""How sure an accuracy is: intervals for proportions, and pass@k with its interval."""

from collections.abc import Sequence
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

BOOTSTRAP_RESAMPLES = 10_000


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927): (low, high), both in [0, 1].

    Unlike the normal interval it stays inside [0, 1] and keeps its width at 0 and n successes, where evaluations of
    small models often are. With n = 0 nothing is known: (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..n, got {successes} of {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    scale = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is exact; rounding would leave it a few ulp outside or inside.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return low, high


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples is right, estimated without bias from n samples with c right:
    1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374, eq. 1), in exact integers."""
    if not 0 <= c <= n:
        raise ValueError(f"right samples must lie in 0..n, got {c} of {n}")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem and k >= 1, got n={n}")
    return 1 - comb(n - c, k) / comb(n, k)


def mean_interval(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Interval for the mean over problems of per-problem scores in [0, 1], such as pass@k: (low, high).

    Problems are the unit of sampling: samples of one problem are not independent. Where every score is 0 or 1 (one
    sample a problem, or pass@n) the mean is a proportion and Wilson's interval holds, which also covers "all right" and
    "all wrong", where resampling would claim certainty. Otherwise a percentile bootstrap over problems (Efron 1979),
    rather than a clipped normal: pass@k piles up at 0 and 1, so its mean is skewed near the ends. The seed is fixed, so
    the same evaluation prints the same interval.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.size and not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("scores must lie between 0 and 1")
    if np.isin(scores, (0.0, 1.0)).all():
        return wilson_interval(int(scores.sum()), scores.size, confidence)
    # Distinct scores are few (at most n + 1), so resampling their counts costs no [resamples, problems] array.
    levels, counts = np.unique(scores, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(scores.size, counts / scores.size, size=BOOTSTRAP_RESAMPLES)
    means = draws @ levels / scores.size
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)
