"""A reward worker: forked by the fork server, it grades one request list at a time until its socket closes.

Each call runs under a limit on the address space it may add. Processes that a call starts end with the call. Output
goes nowhere: a reward that prints must neither garble the trainer's console nor block on a full pipe.
"""

import contextlib
import os
import resource
import signal
import socket
import sys
import time
from typing import Any

import psutil

from lorl.rewards import functions, wire
from lorl.rewards.processes import adopt_orphans, descendants, die_with, kill_all

CHILDREN_END_WITHIN_S = 5.0


def main(channel: socket.socket, server: int) -> None:
    """Grade until end of file. First message in: what to load (`functions.load`); first out: {"error": text | None}."""
    isolate(server)
    spec = wire.receive(channel)
    try:
        grade = functions.load(spec)
    except BaseException as error:
        wire.send(channel, {"error": functions.describe(error, spec["path"])})
        return
    wire.send(channel, {"error": None})

    limit_bytes = spec["memory_mib"] << 20
    loaded_bytes = address_space()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            requests = wire.receive(channel)
            results = graded(grade, requests, limit_bytes, spec["path"])
            end_children()
            # what a call leaves behind counts for the next: a worker that has grown, or ran out, is replaced
            fresh = address_space() - loaded_bytes < limit_bytes and all(
                result["status"] not in ("memory", "crashed") for result in results
            )
            wire.send(channel, {"results": results, "reusable": fresh})


def graded(
    grade: functions.Grade, requests: list[dict[str, Any]], limit_bytes: int, path: str | None
) -> list[functions.Result]:
    """The results of one call that may add `limit_bytes`; whatever it raises becomes the result of all its samples.

    BaseException, because math-verify's TimeoutException derives from it and SystemExit ends no worker unseen.
    """
    try:
        with memory_limit(address_space() + limit_bytes):
            return grade(requests)
    except MemoryError as error:
        failure = functions.failure("memory", functions.describe(error, path))
    except SystemExit as error:
        failure = functions.failure("crashed", f"called sys.exit({error.code!r})")
    except BaseException as error:
        failure = functions.failure("raised", functions.describe(error, path))
    return [failure] * len(requests)


def isolate(server: int) -> None:
    """Own session, no terminal, no core files, dead when the fork server is."""
    os.setsid()
    die_with(server)
    adopt_orphans()  # so that `end_children` reaches what the call double-forked
    # A handler and not SIG_IGN, which programs started by the reward would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)


@contextlib.contextmanager
def memory_limit(total_bytes: int):
    """RLIMIT_AS for the body (Linux; macOS does not enforce it)."""
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    if before[1] != resource.RLIM_INFINITY:
        total_bytes = min(total_bytes, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (total_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def address_space() -> int:
    """Bytes of address space in use."""
    return psutil.Process().memory_info().vms


def end_children() -> None:
    """Kill and reap what the call started and left. Costs one system call when there is nothing."""
    deadline = time.monotonic() + CHILDREN_END_WITHIN_S
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        kill_all(descendants(os.getpid()))
        time.sleep(0.001)
    os._exit(1)  # they multiply faster than they die; the fork server, which sees them all, takes over
