"""Accuracy, pass@k and well-formedness from graded samples."""

import pytest

from lorl.evaluation import evaluate
from lorl.experience import Completion, Outcome, Prompt
from lorl.samples import Sample


def sample(problem: str, index: int, reward: float | None, well_formed: float = 1.0) -> Sample:
    completion = Completion(Prompt(problem, [1], ""), index, [5, 6], [0.0, 0.0], "", "stop", 1)
    status = "timeout" if reward is None else "ok"
    detail = "took too long" if reward is None else ""
    return Sample(completion, Outcome(status, reward, detail, {"well_formed": well_formed}))


def test_one_sample_a_problem() -> None:
    found = evaluate([sample("a", 0, 1.0), sample("b", 0, 0.0, 0.0), sample("c", 0, 0.5)], success=1.0)
    assert (found.accuracy, found.n) == (pytest.approx(1 / 3), 3)
    assert found.well_formed == pytest.approx(2 / 3)
    assert found.low < found.accuracy < found.high
    assert found.pass_at == {}
    assert found.reward_mean == pytest.approx(0.5)


def test_several_samples_give_pass_at_k() -> None:
    rewards = {"a": [1, 0, 0, 0], "b": [0, 0, 0, 0], "c": [1, 1, 1, 1]}
    found = evaluate([sample(p, i, r) for p, marks in rewards.items() for i, r in enumerate(marks)], success=1.0)
    assert found.accuracy == pytest.approx((0.25 + 0 + 1) / 3)
    assert set(found.pass_at) == {2, 4}
    assert found.pass_at[2][0] == pytest.approx((0.5 + 0 + 1) / 3)  # one right of four: 1 - C(3,2)/C(4,2)
    assert found.pass_at[4][0] == pytest.approx(2 / 3)


def test_what_could_not_be_graded_is_counted_and_not_judged() -> None:
    found = evaluate([sample("a", 0, 1.0), sample("a", 1, None), sample("b", 0, None)], success=1.0)
    assert (found.accuracy, found.n, found.failed) == (1.0, 1, {"timeout": 2})
    assert found.sentence().endswith("1 problems, 100.0% well-formed); samples not graded: 2 'timeout' (took too long)")
    nothing = evaluate([sample("a", 0, None)], success=1.0)
    assert nothing.sentence() == "accuracy unknown: samples not graded: 1 'timeout' (took too long)"
    assert nothing.metrics() == {}
