"""Ends what a run's Ray cluster leaves behind when the run is killed: Ray's own agents outlive a driver's SIGKILL.

`python -m lorl.parallel.watcher` reads process ids from its standard input, which the kernel closes whatever becomes of
the run. It then kills those that are left, and removes what they had in shared memory.
"""

import contextlib
import signal
import sys
import time

import psutil

from lorl.policy.shared_memory import sweep

GRACE_S = 1.0  # for what ends by itself
DEADLINE_S = 30.0
TICK_S = 0.05


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watched: set[psutil.Process] = set()  # which, unlike their ids, no later process is equal to
    for line in sys.stdin:
        for pid in map(int, line.split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                watched.add(psutil.Process(pid))
    grace = time.monotonic() + GRACE_S
    deadline = grace + DEADLINE_S
    while (left := [process for process in watched if _lives(process)]) and time.monotonic() < deadline:
        if time.monotonic() > grace:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        time.sleep(TICK_S)
    sweep()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    main()
