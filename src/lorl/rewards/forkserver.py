"""The process that forks reward workers, and ends them with everything that they started.

The trainer has threads, so it can't fork. It starts this single-threaded process once; what makes graders slow to start
is done here, and a new worker is then one fork away (milliseconds). On Linux this process is a child subreaper: what a
dead worker leaves behind, double-forked or in a session of its own, becomes a child of this process and is killed.

It ends, with all workers, when the trainer does: the control socket closes, or the parent's id changes (the socket may
be held open by a plain fork of the trainer). Terminal and scheduler signals are ignored: the trainer still needs
rewards while it saves.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
from pathlib import Path

from lorl.rewards import worker
from lorl.rewards.graders import GRADERS
from lorl.rewards.processes import adopt_orphans, descendants, kill_all

REQUEST = struct.Struct("!cq")  # FORK (with the worker's socket attached) or KILL, and the worker's number
REPLY = struct.Struct("!qq?")  # the worker's number, its wait status, and whether it was ended as a fork bomb
FORK, KILL = b"F", b"K"

TICK_S = 0.05
MAX_DESCENDANTS = 128  # of one worker; more is taken for a fork bomb


def main() -> None:
    """`python -m lorl.rewards.forkserver CONTROL_FD '{"DATA_SOURCE": "GRADER", ...}'`"""
    trainer = os.getppid()
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    adopt_orphans()
    for data_source, grader in json.loads(sys.argv[2]).items():
        with contextlib.suppress(Exception):  # the worker fails on it again, and can say so
            GRADERS[grader].prepare(data_source)
    gc.collect()
    gc.freeze()  # a collection in a worker would otherwise touch, and so copy, every shared page
    ForkServer(control).serve(trainer)


class ForkServer:
    """Answers one request at a time; between requests it reaps and watches."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.workers: dict[int, int] = {}  # number -> process id; numbers, unlike ids, are never used twice
        self.ended: dict[int, tuple[int, bool]] = {}  # workers reaped before anyone asked: wait status, bomb
        self.last_number = 0
        self.quiet_threads = threads_on_machine()

    def serve(self, trainer: int) -> None:
        """Until `trainer`, the parent of this process, is gone."""
        while os.getppid() == trainer:
            if select.select([self.control], [], [], TICK_S)[0] and not self.answer():
                break
            self.reap()
            self.stop_bombs()
        for number in list(self.workers):
            self.kill(number)

    def answer(self) -> bool:
        """Serve one request; False when the trainer is gone."""
        try:
            message, fds, _, _ = socket.recv_fds(self.control, REQUEST.size, 1)
            if len(message) < REQUEST.size:
                return False
            operation, number = REQUEST.unpack(message)
            status, bomb = 0, False
            if operation == FORK:
                number = self.fork(fds[0])
            else:
                status, bomb = self.kill(number)
            self.control.sendall(REPLY.pack(number, status, bomb))
        except ConnectionError:
            return False
        return True

    def fork(self, fd: int) -> int:
        os.set_inheritable(fd, False)
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                self.control.close()
                worker.main(socket.socket(fileno=fd), server)
                code = 0
            finally:
                os._exit(code)  # never unwind into the server's frames; threads of the reward don't hold it up
        os.close(fd)
        self.last_number += 1
        self.workers[self.last_number] = pid
        return self.last_number

    def kill(self, number: int) -> tuple[int, bool]:
        """End a worker and all that it started; its wait status tells how it ended if it was dead already."""
        if number not in self.workers:
            return self.ended.pop(number)
        pid = self.workers[number]
        kill_all(descendants(pid))
        with contextlib.suppress(ProcessLookupError, PermissionError):  # before its setsid there is no such group
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        del self.workers[number]
        self.kill_orphans()
        return status, False

    def reap(self) -> None:
        """Notice workers that died by themselves. Their children hold the socket open, so these go at once."""
        for number, pid in list(self.workers.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self.workers[number]
                self.ended[number] = status, False
                self.kill_orphans()

    def kill_orphans(self) -> None:
        """Kill children that are not workers, and theirs, until a look finds none."""
        while orphans := descendants(os.getpid(), skip=self.workers.values()):
            kill_all(orphans)
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):  # a grandchild; it is ours at the next look
                    os.waitpid(pid, os.WNOHANG)

    def stop_bombs(self) -> None:
        """End workers with too many descendants.

        The scan of all processes runs only when the machine's count of threads, one small read, has jumped.
        """
        threads = threads_on_machine()
        if threads < self.quiet_threads + MAX_DESCENDANTS:
            self.quiet_threads = min(threads, self.quiet_threads)
            return
        self.quiet_threads = threads
        for number, pid in list(self.workers.items()):
            if len(descendants(pid)) > MAX_DESCENDANTS:
                status, _ = self.kill(number)
                self.ended[number] = status, True


def threads_on_machine() -> int:
    """Threads that exist, from /proc/loadavg; 0 where there is none (then fork bombs are only ended by deadlines)."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    except OSError:
        return 0


if __name__ == "__main__":
    main()
