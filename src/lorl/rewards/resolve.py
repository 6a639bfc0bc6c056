"""Start-up checks of `reward.*`: every mistake that shows without running the user's code, before any work.

The user's file is read, never imported, in this process; importing it is a worker's job.
"""

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorl.config import RewardConfig
from lorl.errors import UserError, nearest
from lorl.rewards.graders import GRADERS, SOURCES, for_source

DEFAULT_FUNCTION = "compute_score"  # verl's


def resolve(config: RewardConfig, data_sources: Iterable[str]) -> dict[str, str]:
    """What grades each data source: the name of a built-in grader, or of the function in `config.path`.

    Raises UserError for an unknown grader or data source, a file or function that isn't there, a syntax error in the
    file, and kwargs that the built-in graders in use don't take.
    """
    sources = sorted(set(data_sources))
    if config.path is not None:
        name = function_name(config)
        check_function(Path(config.path), name)
        return dict.fromkeys(sources, name)
    if config.batched:
        raise UserError("reward.batched is for a function of your own; set reward.path, or leave reward.batched out")
    if config.name == "auto":
        chosen = {source: automatic(source) for source in sources}
    elif config.name in GRADERS:
        chosen = dict.fromkeys(sources, config.name)
    else:
        raise UserError(
            f"reward.name={config.name!r} is no built-in grader; {nearest(config.name, [*GRADERS, 'auto'])} "
            "(a function of your own needs reward.path=FILE.py)"
        )
    in_use = set(chosen.values()) or {config.name} - {"auto"}
    check_kwargs(config, in_use)
    if "reasoning_gym" in in_use:
        check_reasoning_gym([source for source, grader in chosen.items() if grader == "reasoning_gym"])
    return chosen


def function_name(config: RewardConfig) -> str:
    """The function that `config.path` is expected to hold."""
    return DEFAULT_FUNCTION if config.name == "auto" else config.name


def automatic(data_source: str) -> str:
    """The built-in grader of a data source."""
    try:
        return for_source(data_source)
    except LookupError:
        described = f"data_source {data_source!r} has" if data_source else "rows without a data_source have"
        raise UserError(
            f"{described} no built-in reward; {nearest(data_source, SOURCES)} Otherwise set reward.name to one of "
            f"{', '.join(GRADERS)}, or reward.path to a file with a function {DEFAULT_FUNCTION}"
        ) from None


def check_kwargs(config: RewardConfig, in_use: set[str]) -> None:
    options = {grader: GRADERS[grader].options() for grader in sorted(in_use)}
    known = {option for taken in options.values() for option in taken}
    if in_use and (unknown := sorted(config.kwargs.keys() - known)):
        hint = nearest(unknown[0], known) if known else "it takes none"
        raise UserError(f"reward.kwargs.{unknown[0]}: {', '.join(options)} takes no such option; {hint}")
    for grader, taken in options.items():
        for option, required in taken.items():
            if required and option not in config.kwargs:
                raise UserError(f"reward.name={grader} needs reward.kwargs.{option}")
    for option in ("pattern", "answer_regex"):
        if option in known and option in config.kwargs:
            check_pattern(option, config.kwargs[option])


def check_pattern(option: str, pattern: object) -> None:
    try:
        re.compile(pattern)  # pyright: ignore[reportCallIssue, reportArgumentType]
    except (re.error, TypeError) as error:
        raise UserError(f"reward.kwargs.{option}={pattern!r} is no regular expression: {error}") from None


def check_reasoning_gym(data_sources: list[str]) -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(
            "the reasoning_gym reward needs the package reasoning-gym, which is missing: pip install 'lorl[tasks]'"
        )
    for source in data_sources:
        if not source.startswith("reasoning_gym/"):
            raise UserError(
                f"reward.name=reasoning_gym can't grade data_source {source!r}: it must be 'reasoning_gym/NAME', "
                "NAME being a data set of reasoning-gym, such as 'reasoning_gym/chain_sum'"
            )


def check_function(path: Path, name: str) -> None:
    """That the file parses and binds `name` at its top level."""
    if not path.is_file():
        raise UserError(f"reward.path={path}: there is no such file (looked in {Path.cwd()})")
    try:
        module = ast.parse(path.read_bytes(), filename=str(path))
    except OSError as error:
        raise UserError(f"reward.path={path} cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        raise UserError(f"reward.path: {path}:{error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nested too deeply
        raise UserError(f"reward.path={path} is no Python source: {error}") from None
    statements = list(_top_level(module.body))
    functions = [s.name for s in statements if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef)]
    if name in functions or any(name in _bound(s) or "*" in _bound(s) for s in statements):
        return
    if not functions:
        raise UserError(f"reward.path={path} has no functions; write `def {name}(solution_str, ground_truth): ...`")
    raise UserError(
        f"reward.path={path} has no function {name!r}; it has {', '.join(functions)} (set reward.name to one of them)"
    )


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, those inside if, try and with too."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for block in ("body", "orelse", "finalbody"):
                yield from _top_level(getattr(statement, block, []))
            for handler in getattr(statement, "handlers", []):
                yield from _top_level(handler.body)


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a statement binds without `def`: a reward may be imported, or made by a call."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    if isinstance(statement, ast.Assign):
        return {target.id for target in statement.targets if isinstance(target, ast.Name)}
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return {statement.target.id}
    return {statement.name} if isinstance(statement, ast.ClassDef) else set()
