"""What a person sees while a run goes on.

On a terminal: a progress bar with the time left at the bottom, spinners or sub-bars for what takes long, and one line a
step above them. Elsewhere (a pipe, a log file, TERM=dumb): plain lines without control codes.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RichTimeRemaining
from rich.text import Text

# How often a phase inside training says in plain mode that it is alive. One line a step is the normal sign of life.
HEARTBEAT_S = 30.0

Advance = Callable[[int], None]


class Console:
    """Lines, phases and the training bar of one run, on one stream.

    Args:
        file: where to write; None is standard output. Commands that print data there pass `sys.stderr`.
        live: force (True) or forbid (False) the moving display; None finds out.

    Attributes:
        alive: called at every sign of life of the run, with the step that begins where one does.
    """

    def __init__(self, file: TextIO | None = None, live: bool | None = None):
        stream = sys.stdout if file is None else file
        self.live = _is_terminal(stream) if live is None else live
        self._rich = RichConsole(file=stream, force_terminal=self.live, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._in_training = False
        self.alive: Callable[[int | None], None] = lambda step: None

    def info(self, text: str) -> None:
        """One line, above whatever moves."""
        self._print(Text(printable(text)))

    def warn(self, text: str) -> None:
        """One line that stands out."""
        self._print(Text.assemble(("warning: ", "bold yellow"), printable(text)))

    def take_over(self) -> None:
        """Puts the terminal right after another process died while it showed something that moves."""
        if self.live:
            self._rich.print()
            self._rich.show_cursor(True)

    def step(self, step: int, metrics: dict[str, float], total: int | None = None) -> None:
        """The line of a finished step; moves the training bar to `step`."""
        self._print(Text(step_line(step, metrics, total)))
        self.alive(step + 1)
        if self._progress is not None and self._training is not None:
            self._progress.update(self._training, completed=step)

    @contextmanager
    def training(self, total_steps: int, done_steps: int = 0) -> Iterator[None]:
        """The bar over all steps, with the time left; `done_steps` were made before a resumption."""
        self._in_training = True
        self.alive(done_steps + 1)
        with self._display() as progress:
            if progress is not None:
                self._training = progress.add_task("training", total=total_steps, completed=done_steps)
            try:
                yield
            finally:
                self._in_training = False
                if progress is not None and self._training is not None:
                    progress.remove_task(self._training)
                    self._training = None

    @contextmanager
    def phase(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """Something that takes long; gives `advance(n)`. With a `total` it shows a bar, without one a spinner.

        In plain mode a phase says when it starts and ends, or, inside training, only every half minute.
        """
        show = self._live_phase if self.live else self._plain_phase
        with show(printable(description), total) as advance:

            def advance_alive(n: int = 1) -> None:
                self.alive(None)
                advance(n)

            self.alive(None)
            yield advance_alive
            self.alive(None)

    @contextmanager
    def _live_phase(self, description: str, total: int | None) -> Iterator[Advance]:
        with self._display() as progress:
            assert progress is not None
            task = progress.add_task(description, total=total)
            try:
                yield lambda n=1: progress.advance(task, n)
            finally:
                progress.remove_task(task)

    @contextmanager
    def _plain_phase(self, description: str, total: int | None) -> Iterator[Advance]:
        start = spoke = time.monotonic()
        done = 0
        if not self._in_training:
            self.info(f"{description} ..." if total is None else f"{description} ({total}) ...")

        def advance(n: int = 1) -> None:
            nonlocal done, spoke
            done += n
            now = time.monotonic()
            if now - spoke >= HEARTBEAT_S:
                spoke = now
                self.info(f"{description}: {done}{'' if total is None else f'/{total}'} after {now - start:.0f} s")

        yield advance
        if not self._in_training:
            self.info(f"{description}: done in {time.monotonic() - start:.1f} s")

    @contextmanager
    def _display(self) -> Iterator[Progress | None]:
        """The one live region of the terminal: opened by the outermost user, shared by those inside."""
        if not self.live or self._progress is not None:
            yield self._progress
            return
        with _progress(self._rich) as progress:
            self._progress = progress
            try:
                yield progress
            finally:
                self._progress = None

    def _print(self, text: Text) -> None:
        self.alive(None)
        self._rich.print(text, soft_wrap=True)


def step_line(step: int, metrics: dict[str, float], total: int | None = None) -> str:
    """One step in one line: what was measured, in columns that line up from step to step.

    >>> step_line(3, {"reward/mean": 0.5, "time/step_s": 9.75}, total=40)
    'step  3/40  reward  0.500     9.8 s'
    """
    width = len(str(total)) if total is not None else 4
    columns = [f"step {step:>{width}}" + ("" if total is None else f"/{total}")]
    for name, text in _COLUMNS:
        if (value := metrics.get(name)) is not None:
            columns.append(text.format(value))
    if (graded := metrics.get("reward/ok_fraction", 1.0)) < 1:
        columns.append(f"graded {graded:.0%}")
    if (accuracy := metrics.get("eval/accuracy")) is not None:
        low, high = metrics.get("eval/accuracy_low"), metrics.get("eval/accuracy_high")
        interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        columns.append(f"accuracy {accuracy:.3f}{interval}")
    return "  ".join(columns)


_COLUMNS = [
    ("reward/mean", "reward {:6.3f}"),
    ("policy/kl", "kl {:7.4f}"),
    ("policy/entropy", "entropy {:6.3f}"),
    ("rollout/response_tokens_mean", "length {:6.1f}"),
    ("throughput/rollout_tokens_per_s", "{:7,.0f} tokens/s"),
    ("time/step_s", "{:6.1f} s"),
]


def printable(text: str) -> str:
    """Text whose control characters are spelled out: what a model or a file says must not drive the terminal.

    >>> printable("red \\x1b[31m")
    'red \\\\x1b[31m'
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class _TimeRemaining(RichTimeRemaining):
    """Time left for bars; a spinner has none."""

    def render(self, task: Any) -> Text:
        return super().render(task) if task.total is not None else Text("")


def _progress(console: RichConsole) -> AbstractContextManager[Progress]:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        _TimeRemaining(),
        console=console,
        transient=True,
        speed_estimate_period=3600.0,  # seconds; steps of minutes need a window that holds several
    )


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
