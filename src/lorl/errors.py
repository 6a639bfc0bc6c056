"""What can go wrong, by who has to act on it, and the exit code that each kind ends the process with.

The messages are read by people: one sentence with the offending name, the nearest valid one, and what to do next.
"""

import difflib
from collections.abc import Iterable


class LorlError(Exception):
    """Base of all errors that lorl raises on purpose; `exit_code` is what the process ends with."""

    exit_code = 1


class UserError(LorlError):
    """The user's mistake: config, data, model, adapter, checkpoint or request. Nothing was lost."""

    exit_code = 2


class DivergedError(LorlError):
    """Training left the region where going on makes sense (non-finite steps in a row, engine and trainer apart)."""

    exit_code = 3


class InfrastructureError(LorlError):
    """Something under lorl failed more often than its budget of restarts allows."""

    exit_code = 4


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause that names the valid spelling closest to `name`, or lists the valid ones when none is close."""
    options = sorted(set(valid))
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "valid: " + ", ".join(options)
