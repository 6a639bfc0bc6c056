"""Signals as requests: the first SIGINT or SIGTERM asks the run to save and leave, the second leaves at once."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopRequest:
    """A context in which SIGINT and SIGTERM set `requested` to the signal's name; a second one ends the process.

    Only a flag is set: the trainer looks at it between steps, where its state is whole.
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
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = signal.Signals(number).name
        self._notify(f"{self.requested}: finishing this step, then saving; once more leaves at once")
