"""Equivalence of mathematical answers: an exact pass that costs microseconds, then math-verify (sympy).

A completion can hold an expression that sympy evaluates for ever, as \\boxed{9^{9^{9}}}. math-verify's own time limits,
which turn that into "wrong", are off: the worker's deadline ends it, and it counts as a timeout.
"""

import re
from itertools import product
from typing import Any


def math(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """The answer equals the truth as mathematics: 1/2, 0.5 and \\frac{1}{2} are the same.

    The answer is the content of the last \\boxed or \\fbox, or else the last expression that math-verify finds. The
    truth is LaTeX or a plain expression, with or without $ or a box. Well formed: there is an answer that can be read.
    """
    answer, truth = last_boxed(solution_str), str(ground_truth)
    if answer is not None and plain(answer) == plain(last_boxed(truth) or truth):
        return {"score": 1.0, "well_formed": 1.0}
    found = parsed(solution_str if answer is None else rf"\boxed{{{answer}}}")
    right = bool(found) and equivalent(
        parsed(truth if re.search(r"\$|\\boxed|\\\(|\\\[", truth) else f"${truth}$"), found
    )
    return {"score": float(right), "well_formed": float(bool(found))}


def last_boxed(text: str) -> str | None:
    """What the last complete \\boxed{…} or \\fbox{…} holds, braces balanced; None when there is none."""
    for start in reversed([match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start:end].strip()
    return None


def plain(expression: str) -> str:
    """An expression without what changes its looks only."""
    expression = (
        re.sub(r"\\left|\\right|\\[!,;: ]|\$|\s", "", expression).replace("dfrac", "frac").replace("tfrac", "frac")
    )
    return expression.rstrip(".")


def parsed(text: str) -> list[Any]:
    """The expressions that math-verify reads off the text; none where it fails."""
    from math_verify import parse

    try:
        return parse(text, parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]
    except MemoryError:
        raise
    except Exception:
        return []


def equivalent(truths: list[Any], answers: list[Any]) -> bool:
    """Whether any reading of the truth equals any of the answer. A pair that can't be compared is unequal."""
    from math_verify import verify

    for truth, answer in product(truths, answers):
        try:
            if verify(truth, answer, timeout_seconds=None, raise_on_error=True):
                return True
        except MemoryError:
            raise
        except Exception:
            continue
    return False
