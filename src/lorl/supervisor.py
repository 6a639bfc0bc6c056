"""A run that is started again when its process dies or hangs (`run.restarts`).

Sharing weights means sharing a process: what kills an engine kills the run. So this process, which has loaded nothing
that could fail, forks the run and watches it. A run repeats exactly from its checkpoints: a restart is a resumption.

    how the run ends                                what becomes of it
    0, 2, 3, or 130 (Ctrl-C before there was        the same code, at once
      anything to save)
    killed by a signal, any other code, or silent   started again, unless the restarts are spent or the same step ended
      for longer than run.step_limit_s              it `SAME_STEP` times in a row (then 4)
    Ctrl-C or SIGTERM                               passed on once: the run saves and leaves with 0; the second kills

Nothing outlives the run: it has a process group of its own, and what leaves that (Linux) becomes a child of this
process. If this process is killed, the kernel kills the run (Linux), and the reward workers end with it.
"""

import contextlib
import faulthandler
import mmap
import os
import select
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lorl import checkpoint
from lorl.config import RunConfig
from lorl.errors import InfrastructureError
from lorl.interrupt import SUPERVISED
from lorl.policy import shared_memory
from lorl.rewards.processes import adopt_orphans, descendants, die_with, kill_all
from lorl.run_folder import CHECKPOINTS, CONFIG, SUMMARY, path_for
from lorl.tracking.console import Console

FINAL = (0, 2, 3, 130)
SAME_STEP = 3  # a run repeats exactly: what ends the same step this often is no accident
BACKOFF_S = 1.0  # before a restart; doubled when it is the same step again
START_LIMIT_S = 3600.0  # run.step_limit_s of what comes before the first step, if that is less: downloads, compilation
KILL_DEADLINE_S = 60.0
DUMP_S = 1.0  # given to a hanging run to say where it hangs
TICK_S = 0.05
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SIGN = "Q"  # uint64


def supervise(config: RunConfig, console: Console) -> RunConfig:
    """Forks the process that is to run what this returns, as often as needed. The calling process does not return: it
    exits as the run did.

    Raises:
        UserError: run.name cannot name a folder.
        InfrastructureError: the run kept dying (exit 4), or its processes cannot be ended.
    """
    folder = path_for(config)
    named = config.model_copy(update={"run": config.run.model_copy(update={"name": folder.name})})
    return _Supervisor(named, folder, console).run()


class Heartbeat:
    """A run's signs of life, in memory that it shares with its supervisor."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, 16)).cast(_SIGN)

    def beat(self, step: int | None = None) -> None:
        """One sign of life; `step` where a step begins."""
        self._words[0] += 1
        if step is not None:
            self._words[1] = step

    @property
    def count(self) -> int:
        return self._words[0]

    @property
    def step(self) -> int:
        """The step that is being made; 0 before the first."""
        return self._words[1]


class _Supervisor:
    """One run and the process that it is in at the moment."""

    def __init__(self, config: RunConfig, folder: Path, console: Console) -> None:
        self._config = config
        self._folder = folder
        self._console = console
        self._strangers = descendants(os.getpid())  # children that this process was born with
        self._summary = _changed(folder / SUMMARY)
        self._child: int | None = None
        self._group = 0  # its process group, and that of what it started
        self._stderr = b""  # the end of what the run said there
        self._requested: int | None = None  # the signal that asked the run to stop

    def run(self) -> RunConfig:
        """Returns in the child only."""
        adopt_orphans()
        handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        restarts, same, before = 0, 0, -1
        while True:
            heartbeat = Heartbeat()
            pipe = self._fork(heartbeat)
            if pipe is None:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                return self._config
            with open(pipe, "rb", buffering=0) as stderr:
                end = self._watch(heartbeat, stderr.fileno())
            self._end_all()
            self._console.take_over()
            step = heartbeat.step
            end += f" after step {step - 1}" if step > 1 else " in step 1" if step else " while it started"
            self._exit_if_over(end)
            same, before = (same + 1 if step == before else 1), step
            if restarts == self._config.run.restarts or same == SAME_STEP:
                raise InfrastructureError(self._last_words(end, same))
            restarts += 1
            self._resume(end, restarts)
            time.sleep(BACKOFF_S * 2 ** (same - 1))

    def _fork(self, heartbeat: Heartbeat) -> int | None:
        """The pipe that the child's stderr comes through; None in the child, whose signals are still blocked."""
        supervisor = os.getpid()
        ours, theirs = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        child = os.fork()
        if child:
            with contextlib.suppress(OSError):  # done already by the child, which may even have ended
                os.setpgid(child, child)
            self._child = self._group = child
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            os.close(theirs)
            os.set_blocking(ours, False)
            return ours
        die_with(supervisor)
        os.setpgid(0, 0)
        # The terminal takes this group for a background job. It may write; reading would stop it, and so would writing
        # after `stty tostop`.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(theirs, 2)
        os.close(theirs)
        os.close(ours)
        os.environ[SUPERVISED] = str(supervisor)
        faulthandler.register(signal.SIGUSR1)
        self._console.alive = heartbeat.beat
        return None

    def _watch(self, heartbeat: Heartbeat, stderr: int) -> str:
        """Until the child ended or hangs. Leaves with it if that was its proper end, and says else how it ended."""
        assert self._child is not None
        limit = self._config.run.step_limit_s
        self._stderr = b""
        count, seen = 0, time.monotonic()
        while True:
            self._forward(stderr, TICK_S)
            ended, status = os.waitpid(self._child, os.WNOHANG)
            if ended:
                self._child = None
                self._forward(stderr, 0)
                return self._judge(os.waitstatus_to_exitcode(status))
            if heartbeat.count != count:
                count, seen = heartbeat.count, time.monotonic()  # which, unlike the clock, rests with the machine
            allowed = None if limit is None else limit if heartbeat.step else max(limit, START_LIMIT_S)
            if allowed is not None and time.monotonic() - seen > allowed:
                os.kill(self._child, signal.SIGUSR1)  # faulthandler: every thread's frames
                while time.monotonic() - seen < allowed + DUMP_S:
                    self._forward(stderr, TICK_S)
                return f"gave no sign of life for {allowed:g} s (run.step_limit_s)"

    def _judge(self, code: int) -> str:
        if code in FINAL:
            sys.exit(code)
        if code < 0 and -code == self._requested:  # it had not come to where it would have saved
            self._die_of(-code)
        if code >= 0:
            return f"ended with exit code {code}"
        memory = " (as the kernel does when memory runs out)" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{memory}"

    def _exit_if_over(self, end: str) -> None:
        if _changed(self._folder / SUMMARY) != self._summary:
            self._console.warn(f"the run was finished, and then its process {end}")
            sys.exit(0)
        if self._requested is not None:
            asked = f"{signal.Signals(self._requested).name} asked the run to stop"
            raise InfrastructureError(f"{asked}, and its process {end}; {self._where_it_goes_on()}")

    def _resume(self, end: str, restarts: int) -> None:
        newest = checkpoint.latest(self._folder / CHECKPOINTS)
        place = f"step {newest.name.removeprefix('step-')}" if newest else "its start"
        self._console.warn(
            f"the run's process {end}; restart {restarts} of {self._config.run.restarts} goes on from {place}"
        )
        if (self._folder / CONFIG).exists():  # which knows a checkpoint that `resume` named
            self._config = self._config.model_copy(update={"resume": "auto"})

    def _last_words(self, end: str, same: int) -> str:
        lines = [line for line in self._stderr.decode(errors="replace").splitlines() if line.strip()]
        said = f" its last line on standard error: {lines[-1].strip()!r};" if lines else ""
        why = f"and run.restarts={self._config.run.restarts} are spent"
        if same == SAME_STEP:
            why = f"where it has ended {SAME_STEP} times in a row"
        return f"the run's process {end}, {why};{said} {self._where_it_goes_on()}"

    def _where_it_goes_on(self) -> str:
        newest = checkpoint.latest(self._folder / CHECKPOINTS)
        if newest is None:
            return "there is no checkpoint yet"
        return f"the same command with run.name={self._folder.name} goes on from {newest}"

    def _forward(self, stderr: int, seconds: float) -> None:
        """Copies what the child says on stderr to this process's, waiting up to `seconds` for it to begin."""
        if not select.select([stderr], [], [], seconds)[0]:
            return
        with contextlib.suppress(OSError):  # nothing more to read for now, or nobody to read it here
            while chunk := os.read(stderr, 1 << 16):
                self._stderr = (self._stderr + chunk)[-4096:]
                os.write(2, chunk)
            time.sleep(seconds)  # the child has closed its stderr: there is no more to wait for

    # Signals and ends

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._child is None or self._requested is not None:
            self._die_of(number)
        self._requested = number
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, number)

    def _die_of(self, number: int) -> NoReturn:
        """As a process that has no handler for this signal, with all that it started."""
        self._end_all()
        self._console.take_over()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(128 + number)

    def _end_all(self) -> None:
        """Kills the child's group and everything below this process, until a look finds nothing."""
        if self._group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, signal.SIGKILL)
        self._child, self._group = None, 0
        deadline = time.monotonic() + KILL_DEADLINE_S
        while left := descendants(os.getpid(), skip=self._strangers):
            if time.monotonic() > deadline:
                raise InfrastructureError(f"processes {left} of the run cannot be killed; see whether a device hangs")
            kill_all(left)
            for pid in left:
                with contextlib.suppress(ChildProcessError):  # below one of the others; ours at a later look
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        shared_memory.sweep()  # whoever would have done so was among them


def _changed(path: Path) -> int | None:
    """When a file was last written; None: never."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
