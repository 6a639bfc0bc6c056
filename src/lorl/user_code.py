"""The user's own estimators and losses: a Python file that registers them when it is imported."""

import importlib.util
import sys
import traceback
from pathlib import Path

from lorl.errors import LorlError, UserError


def import_algorithms(path: str) -> None:
    """Runs the file once in this process: its `@advantage`, `@policy_loss` and `@kl` functions are then known by name.

    Raises UserError, with file and line, when there is no such file or it cannot be run.
    """
    file = Path(path).expanduser().resolve()
    name = f"lorl_user_algorithms:{file}"
    if name in sys.modules:
        return
    if not file.is_file():
        raise UserError(f"algorithm.path={path}: there is no such file (looked in {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"algorithm.path={path} is no Python file; name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[name]
        raise UserError(f"algorithm.path: {error.filename}:{error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:  # the user's code raises what it likes
        del sys.modules[name]
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        what = str(error) if isinstance(error, LorlError) else f"{type(error).__name__}: {error}"
        what = what.split("\n", 1)[0]
        raise UserError(f"algorithm.path: {file}:{own[-1] if own else 1}: {what}") from None
