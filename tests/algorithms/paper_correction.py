"""Rollout correction once more, from its definitions, as loops over ragged lists in float64."""

import math

from algorithm_cases import Case

from lorl.algorithms.correction import Correction, Rejection


def log_ratios(case: Case) -> list[list[float]]:
    return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(case.logprobs, case.old_logprobs, strict=True)]


def weights(case: Case, correction: Correction) -> list[list[float]]:
    found: list[list[float]] = []
    for row in log_ratios(case):
        raw = [math.exp(d) for d in row] if correction.importance == "token" else [math.exp(sum(row))] * len(row)
        if correction.lower is None:
            found.append([min(w, correction.upper) for w in raw])
        else:
            found.append([w if correction.lower <= w <= correction.upper else 0.0 for w in raw])
    if not correction.normalize:
        return found
    tokens = [w for row in found for w in row]
    units = tokens if correction.importance == "token" else [row[0] for row in found if row]
    mean = sum(units) / len(units) if units else 0.0
    return [[w / mean if mean > 1e-8 else w for w in row] for row in found]


def kept(case: Case, correction: Correction) -> list[bool]:
    """Whether each token passes every test."""
    tests = [_passes(case, rejection) for rejection in correction.rejections]
    return [all(each) for each in zip(*tests, strict=True)] if tests else [True] * sum(case.lengths)


def _passes(case: Case, rejection: Rejection) -> list[bool]:
    level, _, rest = rejection.mode.partition("_")
    reduction, _, estimator = rest.rpartition("_") if level == "seq" else ("", "", rest)
    found: list[bool] = []
    for row, new, old in zip(log_ratios(case), case.logprobs, case.old_logprobs, strict=True):
        values = [_statistic(estimator, *each) for each in zip(row, new, old, strict=True)]
        if level == "seq" and values:
            reduce = {"sum": sum, "max": max, "mean": lambda xs: sum(xs) / len(xs)}[reduction]
            values = [reduce(values)] * len(values)
        if rejection.lower is None:
            found += [value <= rejection.upper for value in values]
        else:
            found += [math.log(rejection.lower) <= value <= math.log(rejection.upper) for value in values]
    return found


def _statistic(estimator: str, d: float, new: float, old: float) -> float:
    if estimator == "binary_kl":
        p, q = (min(max(math.exp(x), 1e-6), 1 - 1e-6) for x in (new, old))
        return max(a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in ((p, q), (q, p)))
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[estimator]
