"""Built-in graders: plain functions with verl's signature, and which of them grades which data source.

Each returns `{"score": s, "well_formed": w}`: w is 1.0 when the completion has the form that the grader reads answers
from, whatever the answer is worth, so that learning the format can be told from learning the skill.
"""

import fnmatch
import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorl.errors import UserError, nearest
from lorl.rewards.mathematics import math

Graded = dict[str, float]

GSM8K_TAIL_CHARS = 300  # verl looks at the end only, since its flexible pattern is slow on long text


def gsm8k(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    format_score: float = 0.0,
    score: float = 1.0,
) -> Graded:
    """The last number after "#### " in the last 300 characters equals the truth as a string, commas removed.

    The strict method of verl's `utils/reward_score/gsm8k.py`: one space exactly, and "72." is not "72". A wrong number
    scores `format_score`. Well formed: there is such a number.
    """
    found = re.findall(r"#### (\-?[0-9.,]+)", solution_str[-GSM8K_TAIL_CHARS:])
    return _gsm8k([number.replace(",", "") for number in found], ground_truth, format_score, score)


def gsm8k_flexible(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    format_score: float = 0.0,
    score: float = 1.0,
) -> Graded:
    """The last number in the last 300 characters equals the truth as a string.

    The flexible method of verl's file: commas and a full stop after the number stay, so "72." is not "72". Well formed:
    there is a number.
    """
    found = re.findall(r"\-?[0-9.,]+", solution_str[-GSM8K_TAIL_CHARS:])
    return _gsm8k([number for number in found if number != "."], ground_truth, format_score, score)


def _gsm8k(found: list[str], ground_truth: Any, format_score: float, score: float) -> Graded:
    if not found:
        return {"score": 0.0, "well_formed": 0.0}
    return {"score": score if found[-1] == str(ground_truth) else format_score, "well_formed": 1.0}


def exact(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    ignore_case: bool = False,
) -> Graded:
    """The whole completion equals the truth, white space around them aside. Well formed: it is not empty."""
    answer, truth = solution_str.strip(), str(ground_truth).strip()
    right = answer.casefold() == truth.casefold() if ignore_case else answer == truth
    return {"score": float(right), "well_formed": float(bool(answer))}


def regex(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    pattern: str,
) -> Graded:
    """What the last match of `pattern` (its group 1 where it has groups) holds equals the truth, both stripped.

    Well formed: there is a match.
    """
    answer = _last_match(pattern, solution_str)
    right = answer is not None and answer == str(ground_truth).strip()
    return {"score": float(right), "well_formed": float(answer is not None)}


def format(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    pattern: str,
) -> Graded:
    """1.0 when all of the stripped completion matches `pattern`, in which "." matches newlines too."""
    matched = float(re.fullmatch(pattern, solution_str.strip(), re.DOTALL) is not None)
    return {"score": matched, "well_formed": matched}


def reasoning_gym(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    answer_regex: str | None = None,
) -> Graded:
    """reasoning-gym's own score, between 0 and 1, for the data set named in `data_source` ("reasoning_gym/NAME").

    `extra_info["entry"]` is the item as reasoning-gym made it ({question, answer, metadata}) or its JSON. The answer is
    the last match of `answer_regex`; without one, what the last <answer> tags hold, or else the whole completion.
    Well formed: it is right, or has the shape of the reference answer (`shape`).
    """
    from reasoning_gym.utils import extract_answer

    entry = (extra_info or {}).get("entry")
    if entry is None:
        raise ValueError("extra_info has no 'entry', the item as reasoning-gym made it")
    entry = json.loads(entry) if isinstance(entry, str) else entry
    if answer_regex is not None:
        answer = _last_match(answer_regex, solution_str)
    else:
        answer = extract_answer(solution_str) or solution_str.strip()
    if not answer:
        return {"score": 0.0, "well_formed": 0.0}
    score = float(_reasoning_gym_scorer(data_source)(answer, entry))
    return {"score": score, "well_formed": float(score == 1.0 or shape(answer) == shape(str(entry["answer"])))}


@functools.cache
def _reasoning_gym_scorer(data_source: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    name = data_source.partition("/")[2]
    if name not in reasoning_gym.factory.DATASETS:
        raise UserError(f"reasoning-gym has no data set {name!r}; {nearest(name, reasoning_gym.factory.DATASETS)}")
    return reasoning_gym.get_score_answer_fn(name)  # pyright: ignore[reportReturnType] - annotated as () -> float


def shape(answer: str) -> str:
    """The structure of an answer: numbers, words and operators made alike, white space dropped, repeated items once.

    >>> shape("[3, -1, 25]") == shape("[7, 8]"), shape("3 7") == shape("The answer is 3, 7.")
    (True, False)
    """
    text = re.sub(r"(?<![0-9)])\s*-(?=\.?\d)", "", answer)  # a sign, not a minus
    text = re.sub(r"['\"]", "", text)  # a list of numbers or of their texts: scorers take both
    text = re.sub(r"\d+(\.\d+)?", "0", text)
    text = re.sub(r"[^\W\d_]+", "a", text)
    text = re.sub(r"[-+*/]+", "+", text)
    text = re.sub(r"\s+", "", text)
    grouped = 1
    while grouped:  # parentheses within arithmetic
        text, grouped = re.subn(r"\((0(\+0)*)\)", r"\1", text)
    for _ in range(2):  # items, then rows of items
        text = re.sub(r"(.{1,8}?)\1+", r"\1", text)
    return text


def _last_match(pattern: str, text: str) -> str | None:
    matches = list(re.finditer(pattern, text, re.DOTALL))
    if not matches:
        return None
    last = matches[-1]
    return (last.group(1 if last.re.groups else 0) or "").strip()


@dataclass(frozen=True, slots=True)
class Grader:
    """A built-in grader.

    `prepare` takes a data source that will be graded and does what would make the first call for it slow (the fork
    server does it once, ahead of all workers). It raises UserError when that data source can't be graded.
    """

    function: Callable[..., Graded]
    prepare: Callable[[str], object] = lambda data_source: None

    def options(self) -> dict[str, bool]:
        """The names that reward.kwargs may hold, and whether each is required."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


GRADERS: dict[str, Grader] = {
    "gsm8k": Grader(gsm8k),
    "gsm8k_flexible": Grader(gsm8k_flexible),
    "math": Grader(math, prepare=lambda source: math(source, r"\boxed{\frac{1}{2}}", "0.5")),
    "exact": Grader(exact),
    "regex": Grader(regex),
    "format": Grader(format),
    "reasoning_gym": Grader(reasoning_gym, prepare=_reasoning_gym_scorer),
}

# Data sources as verl's default_compute_score knows them, and reasoning-gym's. First match wins.
SOURCES: dict[str, str] = {
    "openai/gsm8k": "gsm8k",
    "lighteval/MATH": "math",
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "HuggingFaceH4/MATH-500": "math",
    "math_dapo": "math",
    "math": "math",
    "aime*": "math",
    "reasoning_gym/*": "reasoning_gym",
}


def for_source(data_source: str) -> str:
    """The name of the grader that reward.name=auto uses for a data source; LookupError when there is none."""
    for pattern, grader in SOURCES.items():
        if fnmatch.fnmatchcase(data_source, pattern):
            return grader
    raise LookupError(f"no built-in grader for data_source {data_source!r}")
