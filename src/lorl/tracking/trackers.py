"""Trackers by name, and the fan-out that keeps a failing one from hurting the run."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lorl.errors import UserError, nearest
from lorl.tracking import backends
from lorl.tracking.jsonl import JsonlTracker

# A network that is gone costs its timeout at every step; after this many failures in a row the tracker is left out.
MAX_FAILURES_IN_A_ROW = 3


class Tracker(Protocol):
    """Takes one step's numbers. It may raise: `Trackers` turns that into a warning."""

    name: str

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


# name -> (module that the extra brings, constructor)
OPTIONAL: dict[str, tuple[str, Callable[[Path, dict[str, Any], int | None], Tracker]]] = {
    "tensorboard": ("tensorboard", backends.TensorBoardTracker),
    "wandb": ("wandb", backends.WandbTracker),
    "trackio": ("trackio", backends.TrackioTracker),
    "mlflow": ("mlflow", backends.MlflowTracker),
}


class Trackers:
    """All trackers of a run behind one `log`. What one of them raises becomes a warning, once; the others and the run
    go on. A tracker other than jsonl that fails three times in a row is left out from then on."""

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]):
        self._trackers = list(trackers)
        self._warn = warn
        self._failures: dict[str, int] = {}
        self._warned: set[str] = set()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(step, metrics)
            except Exception as error:
                self._failed(tracker, error)
            else:
                self._failures[tracker.name] = 0

    def close(self) -> None:
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                self._failed(tracker, error)
        self._trackers = []

    def _failed(self, tracker: Tracker, error: Exception) -> None:
        if tracker.name not in self._warned:
            self._warned.add(tracker.name)
            self._warn(f"tracker {tracker.name} failed, the run goes on: {_describe(error)}")
        self._failures[tracker.name] = self._failures.get(tracker.name, 0) + 1
        if self._failures[tracker.name] >= MAX_FAILURES_IN_A_ROW and tracker.name != JsonlTracker.name:
            self._trackers.remove(tracker)


def check(names: Sequence[str]) -> None:
    """Refuse unknown tracker names and those whose package is missing, without importing anything.

    Raises:
        UserError: with the nearest name, or with the command that installs the extra.
    """
    for name in names:
        if name == JsonlTracker.name:
            continue
        if name not in OPTIONAL:
            raise UserError(f"unknown tracker {name!r}: {nearest(name, [JsonlTracker.name, *OPTIONAL])}")
        if importlib.util.find_spec(OPTIONAL[name][0]) is None:
            raise UserError(f"tracker {name!r} needs a package that is not installed: pip install 'lorl[{name}]'")


def open(
    names: Sequence[str],
    run_folder: Path,
    config: dict[str, Any],
    resume_step: int | None,
    warn: Callable[[str], None] = logging.getLogger("lorl.tracking").warning,
) -> Trackers:
    """Open `jsonl`, always, and the named trackers.

    Args:
        names: of `jsonl`, `tensorboard`, `wandb`, `trackio`, `mlflow`; each once, in any order.
        run_folder: where files go; its name is the run's name in every tracker.
        config: the resolved configuration, nested; shown by trackers that show one.
        resume_step: the checkpoint's step that the run goes on from; None starts every tracker anew.
        warn: told once about each tracker that fails to start or to log.

    Raises:
        UserError: an unknown name or a missing package, before any tracker is started.
        OSError: metrics.jsonl cannot be written.
    """
    check(names)
    opened: list[Tracker] = [JsonlTracker(run_folder, resume_step)]
    for name in dict.fromkeys(names):
        if name == JsonlTracker.name:
            continue
        try:
            opened.append(OPTIONAL[name][1](run_folder, config, resume_step))
        except Exception as error:
            warn(f"tracker {name} did not start, the run goes on without it: {_describe(error)}")
    return Trackers(opened, warn)


def _describe(error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
