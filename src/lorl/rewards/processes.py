"""Finding, adopting and killing processes; what the fork server and its workers share."""

import contextlib
import ctypes
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Collection

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants (Linux; elsewhere those that leave their session go unseen)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which forked it, dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)


def descendants(root: int, skip: Collection[int] = ()) -> list[int]:
    """Ids of all processes below `root`, parents first, without the subtrees of `skip`."""
    children = defaultdict(list)
    for process in psutil.process_iter(["ppid"]):
        children[process.info["ppid"]].append(process.pid)
    found = [pid for pid in children[root] if pid not in skip]
    for pid in found:  # grows while it is read
        found += [child for child in children[pid] if child not in skip]
    return found


def kill_all(pids: Collection[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
