"""Reward functions as a worker sees them: loading, calling, and turning what comes back into a result."""

import asyncio
import functools
import importlib.machinery
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorl.errors import UserError, nearest
from lorl.rewards import graders

Result = dict[str, Any]  # the fields of lorl.experience.Outcome, without seconds
Grade = Callable[[list[dict[str, Any]]], list[Result]]  # requests as sent by the pool -> one result each

SINGULAR = {"data_source": "data_source", "solution_str": "solution", "ground_truth": "ground_truth",
            "extra_info": "extra_info"}  # verl's keyword -> field of a request  # fmt: skip
PLURAL = {f"{keyword}s": field for keyword, field in SINGULAR.items()}

MAX_DETAIL_CHARS = 300


def load(spec: dict[str, Any]) -> Grade:
    """What grades the requests of a run.

    `spec`: name, path (absolute), kwargs and batched of `RewardConfig`, and graders, {data source: what grades it}.
    Raises whatever the user's file raises when imported, and UserError when the function can't be called with verl's
    arguments and `reward.kwargs`, or a data source can't be graded.
    """
    if spec["path"] is None:
        for data_source, name in spec["graders"].items():
            graders.GRADERS[name].prepare(data_source)
        call_for = functools.cache(functools.partial(_built_in, spec["name"], spec["kwargs"]))
        return functools.partial(_grade_each, call_for)
    function = import_function(spec["path"], spec["name"])
    if spec["batched"]:
        return functools.partial(_grade_together, bind(function, spec["kwargs"], PLURAL))
    call = bind(function, spec["kwargs"], SINGULAR)
    return functools.partial(_grade_each, lambda data_source: call)


def _built_in(name: str, kwargs: dict[str, Any], data_source: str) -> Callable[..., Any]:
    """The built-in grader of a data source. Where several are in use, each gets the kwargs that it takes."""
    grader = graders.GRADERS[graders.for_source(data_source) if name == "auto" else name]
    taken = {key: value for key, value in kwargs.items() if key in grader.options()}
    return bind(grader.function, taken, SINGULAR)


def import_function(path: str, name: str) -> Callable[..., Any]:
    """A function of a Python file. The file's folder is importable, as it is for `python FILE`."""
    sys.path.insert(0, str(Path(path).parent))
    loader = importlib.machinery.SourceFileLoader("lorl_user_reward", path)
    module_spec = importlib.util.spec_from_loader(loader.name, loader)
    assert module_spec is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return getattr(module, name)


def bind(function: Callable[..., Any], kwargs: dict[str, Any], arguments: dict[str, str]) -> Callable[..., Any]:
    """A call that takes all of `arguments` by keyword and passes on those that `function` takes, and `kwargs`.

    UserError when `kwargs` holds a name that it doesn't take, or it requires one that nothing gives.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions of extension modules have no signature
        return functools.partial(function, **kwargs)
    by_name = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    name = getattr(function, "__name__", repr(function))
    if not takes_any and (unknown := sorted(kwargs.keys() - set(by_name))):
        raise UserError(f"{name} takes no argument {unknown[0]!r} (from reward.kwargs); {nearest(unknown[0], by_name)}")
    for p in parameters:
        required = p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        if required and (p.kind is p.POSITIONAL_ONLY or p.name not in arguments.keys() | kwargs.keys()):
            other = next((flag for flag, names in (("true", PLURAL), ("false", SINGULAR)) if p.name in names), None)
            hint = f"; set reward.batched={other}" if other and p.name not in arguments else ""
            raise UserError(
                f"{name} requires {p.name!r}, but it is called by keyword with {', '.join(arguments)} and reward.kwargs"
                f"{hint}"
            )
    passed = [keyword for keyword in arguments if (takes_any or keyword in by_name) and keyword not in kwargs]
    return lambda **values: function(**{keyword: values[keyword] for keyword in passed}, **kwargs)


def _grade_each(call_for: Callable[[str], Callable[..., Any]], requests: list[dict[str, Any]]) -> list[Result]:
    results = []
    for request in requests:
        arguments = {keyword: request[field] for keyword, field in SINGULAR.items()}
        results.append(to_result(_finished(call_for(request["data_source"])(**arguments))))
    return results


def _grade_together(call: Callable[..., Any], requests: list[dict[str, Any]]) -> list[Result]:
    arguments = {keyword: [request[field] for request in requests] for keyword, field in PLURAL.items()}
    scores = _finished(call(**arguments))
    if hasattr(scores, "tolist"):  # an array or a tensor
        scores = scores.tolist()
    if not isinstance(scores, (list, tuple)):
        problem = f"returned {_shown(scores)}, not a list of {len(requests)} scores"
    elif len(scores) != len(requests):
        problem = f"returned {len(scores)} scores for {len(requests)} samples"
    else:
        return [to_result(score) for score in scores]
    return [failure("invalid", problem)] * len(requests)


@functools.cache
def _event_loop() -> asyncio.Runner:
    """One loop for the worker's life, so that sessions which a reward keeps between calls stay usable."""
    return asyncio.Runner()


def _finished(value: Any) -> Any:
    """`value`, awaited when it is awaitable."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    return _event_loop().run(wait())


def to_result(value: Any) -> Result:
    """What a reward function returned, as a result.

    A finite real number (bool and numpy or torch scalars too), or a dict with one under "score"; of its other entries,
    numbers and strings become extras.
    """
    extras = {}
    if isinstance(value, dict):
        if "score" not in value:
            return failure(
                "invalid", f"returned a dict without 'score' (it has {', '.join(map(str, value)) or 'nothing'})"
            )
        for key, entry in value.items():
            if key != "score" and (isinstance(entry, str) or _number(entry) is not None):
                extras[str(key)] = entry if isinstance(entry, str) else _number(entry)
        value = value["score"]
    score = _number(value)
    if score is None:
        return failure("invalid", f"returned {_shown(value)}, not a number")
    if not math.isfinite(score):
        return failure("invalid", f"returned {score}")
    return {"status": "ok", "reward": score, "detail": "", "extras": extras}


def _number(value: Any) -> float | None:
    """`value` as a float if it is one real number (an int too large for a float is infinite)."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _shown(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def failure(status: str, detail: str) -> Result:
    return {"status": status, "reward": None, "detail": one_line(detail), "extras": {}}


def one_line(text: str) -> str:
    text = " ".join(text[: 4 * MAX_DETAIL_CHARS].split())
    return text if len(text) <= MAX_DETAIL_CHARS else text[: MAX_DETAIL_CHARS - 1] + "…"


def describe(error: BaseException, path: str | None) -> str:
    """Type, message and place of an exception: the innermost line in the user's file, or else the innermost line."""
    if isinstance(error, UserError):
        return one_line(str(error))
    try:
        message = str(error)
    except Exception:  # a message that can't be made must not hide the exception itself
        message = "(its message raised)"
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.filename == path] or frames
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return one_line(f"{type(error).__name__}: {message}" if message else type(error).__name__) + place
