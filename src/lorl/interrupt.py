"""Signals as requests: the first SIGINT or SIGTERM asks the run to save and leave, the second leaves at once."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

SUPERVISED = "LORL_SUPERVISED"
"""Variable in the environment of a run that `lorl.supervisor` watches: the supervisor's process id."""


class StopRequest:
    """A context in which SIGINT and SIGTERM set `requested` to the signal's name; a second one ends the process.

    Only a flag is set: the trainer looks at it between steps, where its state is whole. In a supervised run the second
    signal is the supervisor's to act on: schedulers send one to each process of a job, so this one may get two of it.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.requested: str | None = None
        self._notify = notify
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self._SIGNALS:
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if os.environ.get(SUPERVISED) == str(os.getppid()):
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = signal.Signals(number).name
        self._notify(f"{self.requested}: finishing this step, then saving; once more leaves at once")
