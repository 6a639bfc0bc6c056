"""The math grader: equal as mathematics is right, however it is written."""

import pytest

from lorl.rewards.mathematics import last_boxed, math


@pytest.mark.parametrize(
    ("completion", "truth"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{1/2}", r"\frac{1}{2}"),
        (r"\boxed{\dfrac{1}{2}}", r"$\frac{1}{2}$"),
        (r"\boxed{\frac12}", "1/2"),
        ("so the answer is 1/2", "0.5"),
        ("The final answer is $0.5$.", r"\boxed{\frac{1}{2}}"),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2"),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3, \frac{\pi}{2})"),
        (r"\boxed{1,000}", "1000"),
        (r"first \boxed{3}, no, \boxed{4}", "4"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    ],
)
def test_right(completion: str, truth: str) -> None:
    assert math("math", completion, truth) == {"score": 1.0, "well_formed": 1.0}


@pytest.mark.parametrize(
    ("completion", "truth", "well_formed"),
    [
        (r"\boxed{0.51}", r"\frac{1}{2}", 1),
        (r"first \boxed{4}, no, \boxed{3}", "4", 1),
        (r"\boxed{x + 2}", "x + 1", 1),
        ("I do not know", "4", 0),
        ("", "4", 0),
        (r"\boxed{}", "4", 0),
        (r"4 is wrong: \boxed{\frac{", "5", 1),
    ],
)
def test_wrong(completion: str, truth: str, well_formed: float) -> None:
    assert math("math", completion, truth) == {"score": 0.0, "well_formed": well_formed}


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {a} \boxed{ b }", "b"),
        (r"\boxed{a} \boxed{b", "a"),
        ("none", None),
    ],
)
def test_last_boxed_balances_braces(text: str, content: str | None) -> None:
    assert last_boxed(text) == content
