"""Built-in graders: what scores, what doesn't, and what counts as well formed."""

import json

import pytest

from lorl.rewards.graders import exact, for_source, format, gsm8k, gsm8k_flexible, reasoning_gym, regex, shape


@pytest.mark.parametrize(
    ("completion", "truth", "score", "well_formed"),
    [
        ("so it is 72.\n#### 72", "72", 1, 1),
        ("#### 72 apples", "72", 1, 1),
        ("#### -3", "-3", 1, 1),
        ("#### 1,234", "1234", 1, 1),
        ("#### 71", "72", 0, 1),
        ("#### 72.", "72", 0, 1),  # the full stop belongs to the number, as in verl
        ("#### 72.0", "72", 0, 1),
        ("#### 72 #### 73", "72", 0, 1),  # the last one counts
        ("#### 73 #### 72", "72", 1, 1),
        ("####72", "72", 0, 0),  # one space exactly
        ("####  72", "72", 0, 0),
        ("#### $72", "72", 0, 0),
        ("#### 7 2", "72", 0, 1),
        ("#### ,", "72", 0, 1),
        ("The answer is 72", "72", 0, 0),
        ("", "72", 0, 0),
        ("#### 72" + " " * 293, "72", 1, 1),  # 300 characters
        ("#### 72" + " " * 294, "72", 0, 0),
        ("#### 72", 72, 1, 1),
    ],
)
def test_gsm8k_is_verls_strict_method(completion: str, truth: object, score: float, well_formed: float) -> None:
    assert gsm8k("openai/gsm8k", completion, truth) == {"score": score, "well_formed": well_formed}


@pytest.mark.parametrize(
    ("completion", "truth", "score", "well_formed"),
    [
        ("The answer is 72", "72", 1, 1),
        ("72 it is . . .", "72", 1, 1),
        ("The answer is 72.", "72", 0, 1),
        ("1,234", "1234", 0, 1),  # commas stay, as in verl
        ("72 then 73", "72", 0, 1),
        ("none . .", "72", 0, 0),
        ("72" + "x" * 300, "72", 0, 0),
    ],
)
def test_gsm8k_flexible_takes_the_last_number(completion: str, truth: str, score: float, well_formed: float) -> None:
    assert gsm8k_flexible("openai/gsm8k", completion, truth) == {"score": score, "well_formed": well_formed}


def test_gsm8k_gives_a_wrong_number_the_format_score_and_no_number_nothing() -> None:
    assert gsm8k("", "#### 1", "2", format_score=0.1)["score"] == 0.1
    assert gsm8k("", "1", "2", format_score=0.1)["score"] == 0.0
    assert gsm8k("", "#### 2", "2", score=5.0)["score"] == 5.0


def test_exact_ignores_outer_white_space_and_case_on_request() -> None:
    assert exact("", " Paris\n", "Paris") == {"score": 1.0, "well_formed": 1.0}
    assert exact("", "paris", "Paris") == {"score": 0.0, "well_formed": 1.0}
    assert exact("", "paris", "PARIS", ignore_case=True)["score"] == 1.0
    assert exact("", "  ", "Paris") == {"score": 0.0, "well_formed": 0.0}


def test_regex_compares_the_last_match_and_its_group() -> None:
    assert regex("", "A: 1 A: 2", "2", pattern=r"A: (\d)") == {"score": 1.0, "well_formed": 1.0}
    assert regex("", "A: 2 A: 1", "2", pattern=r"A: (\d)") == {"score": 0.0, "well_formed": 1.0}
    assert regex("", "no", "2", pattern=r"A: (\d)") == {"score": 0.0, "well_formed": 0.0}
    assert regex("", "x 42 y", "42", pattern=r"\d+")["score"] == 1.0
    assert regex("", "A:", "2", pattern=r"A:(\d)?") == {"score": 0.0, "well_formed": 1.0}


def test_format_wants_the_whole_completion() -> None:
    pattern = "<think>.*</think><answer>.*</answer>"
    assert format("", "<think>a\nb</think><answer>1</answer>\n", None, pattern=pattern)["score"] == 1.0
    assert format("", "So: <think>a</think><answer>1</answer>", None, pattern=pattern)["score"] == 0.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("[3, -1, 25]", "[17, 8]", True),
        ("['1.5', '2']", "['10', '-7', '3.25']", True),
        ("(94 + 4)*(61 - 6)", "61+6*94", True),
        ("(1, 2)", "(3, 4, 5)", True),
        ("(1, 2)", "1, 2", False),
        ("-4", "12", True),
        ("Ann is a hero, and Bob is a villain.", "Eve is a villain, and Al is a hero.", True),
        ("1 2 3\n4 5 6", "7 8 9\n1 2 3", True),
        ("[1, 2]", "1, 2", False),
        ("12", "The answer is 12", False),
        ("['1', '2']", "[1, 2]", True),
        ("3", "three", False),
    ],
)
def test_shape_sees_structure_and_not_content(one: str, other: str, same: bool) -> None:
    assert (shape(one) == shape(other)) == same


@pytest.mark.parametrize(
    ("name", "wrong"), [("chain_sum", "123456789"), ("number_sorting", "['1', '2', '3']"), ("countdown", "1 + 1")]
)
def test_reasoning_gym_scores_with_the_data_sets_own_scorer(name: str, wrong: str) -> None:
    library = pytest.importorskip("reasoning_gym")
    source = f"reasoning_gym/{name}"
    for entry in library.create_dataset(name, size=3, seed=0):
        extra = {"entry": json.dumps(entry)}
        right = entry["answer"]
        assert reasoning_gym(source, right, None, extra) == {"score": 1.0, "well_formed": 1.0}
        assert reasoning_gym(source, right, None, {"entry": entry})["score"] == 1.0
        assert reasoning_gym(source, f"I think <answer> {right} </answer>", None, extra)["score"] == 1.0
        assert reasoning_gym(source, f"A: {right}", None, extra, answer_regex="A: (.*)")["score"] == 1.0
        failed = reasoning_gym(source, wrong, None, extra)
        assert failed["score"] < 1.0
        assert failed["well_formed"] == 1.0
        assert reasoning_gym(source, f"A: {right}", None, extra, answer_regex="B: (.*)") == {
            "score": 0.0,
            "well_formed": 0.0,
        }
        assert reasoning_gym(source, "I can't say what that is!", None, extra)["well_formed"] == 0.0
        assert reasoning_gym(source, "  ", None, extra) == {"score": 0.0, "well_formed": 0.0}


def test_reasoning_gym_without_its_entry_raises_rather_than_scoring_zero() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="no 'entry'"):
        reasoning_gym("reasoning_gym/chain_sum", "4", "4", {})


@pytest.mark.parametrize(
    ("source", "grader"),
    [
        ("openai/gsm8k", "gsm8k"),
        ("lighteval/MATH", "math"),
        ("DigitalLearningGmbH/MATH-lighteval", "math"),
        ("HuggingFaceH4/MATH-500", "math"),
        ("math_dapo", "math"),
        ("math", "math"),
        ("aime2024", "math"),
        ("reasoning_gym/chain_sum", "reasoning_gym"),
    ],
)
def test_data_sources_are_graded_as_in_verl(source: str, grader: str) -> None:
    assert for_source(source) == grader
