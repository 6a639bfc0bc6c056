"""Every algorithm equals its paper's formula, value and gradient, on ragged batches with all the oddities."""

import pytest
from algorithm_cases import random_case
from algorithm_checks import CHECKS, Check, worst

from lorl.algorithms.catalogue import filled
from lorl.algorithms.registry import ADVANTAGES, KL_ESTIMATORS, POLICY_LOSSES

TOLERANCE = 1e-10


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.label)
def test_equals_the_paper(check: Check) -> None:
    errors = worst(check, range(60))
    assert errors.value < TOLERANCE
    assert errors.gradient is None or errors.gradient < TOLERANCE


def test_every_built_in_algorithm_is_checked() -> None:
    checked = {check.name for check in CHECKS}
    built_in = [entry for registry in (ADVANTAGES, POLICY_LOSSES, KL_ESTIMATORS) for entry in filled(registry)]
    own = [entry for entry in built_in if entry.function.__module__.startswith("lorl.")]
    assert {entry.name for entry in own} <= checked


def test_the_random_batches_hold_every_oddity() -> None:
    cases = [random_case(seed) for seed in range(60)]
    counts = [[case.group.count(g) for g in set(case.group)] for case in cases]
    assert any(1 in sizes for sizes in counts)
    assert any(0 in case.lengths for case in cases)
    assert any(not sum(case.lengths) for case in cases) or any(not any(case.graded) for case in cases)
    assert any(len(set(case.rewards)) == 1 and len(case.rewards) > 1 for case in cases)
    assert any(any(case.graded) and not all(case.graded) for case in cases)
    assert any(case.logprobs == case.old_logprobs and sum(case.lengths) for case in cases)
