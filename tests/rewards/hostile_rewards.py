"""A user's reward file in which every completion names something that a reward should not do."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

MARK = "lorl-test-child"


def sleeper():
    return [sys.executable, "-c", "import time; time.sleep(1000)", MARK]


def forked_sleeper(daemonize=False):
    if os.fork() == 0:
        if daemonize:
            os.setsid()
            if os.fork():
                os._exit(0)
        os.execv(sys.executable, sleeper())


def forever():
    while True:
        pass


def fork_bomb():
    while True:
        with contextlib.suppress(OSError):
            os.fork()


def ignore_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1e9)


def flood():
    for _ in range(100_000):
        print("spam\n" * 10)
    os.write(2, b"spam" * 1_000_000)
    return 1.0


def leave_child():
    forked_sleeper()
    forked_sleeper(daemonize=True)
    return 1.0


def child_and_exit():
    forked_sleeper()
    forked_sleeper(daemonize=True)
    os._exit(0)


def child_and_hang():
    forked_sleeper(daemonize=True)
    subprocess.Popen(sleeper(), start_new_session=True)
    time.sleep(1e9)


def write_garbage():
    for fd in range(3, 20):
        with contextlib.suppress(OSError):
            os.write(fd, b"\0\0\0\2{}")


def die_later():
    threading.Timer(0.1, lambda: os._exit(5)).start()
    return 1.0


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError


def throw(error):
    raise error


REWARDS = {
    "fine": lambda: 1.0,
    "pid": lambda: os.getpid(),
    "true": lambda: True,
    "loop": forever,
    "sleep": lambda: time.sleep(1e9),
    "ignore SIGTERM": ignore_sigterm,
    "sys.exit": lambda: sys.exit(3),
    "os._exit": lambda: os._exit(3),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT) or 1.0,
    "close all": lambda: os.closerange(0, 100),
    "write garbage": write_garbage,
    "gigabyte": lambda: bytearray(1 << 30),
    "kill server": lambda: os.kill(os.getppid(), signal.SIGKILL) or time.sleep(1e9),
    "raise": lambda: {}["missing"],
    "base exception": lambda: throw(BaseException("odd")),
    "unprintable": lambda: throw(UnprintableError()),
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "huge int": lambda: 10**400,
    "none": lambda: None,
    "str": lambda: "1.0",
    "no score": lambda: {"acc": 1.0},
    "nan score": lambda: {"score": float("nan")},
    "flood": flood,
    "leave child": leave_child,
    "child and exit": child_and_exit,
    "child and hang": child_and_hang,
    "fork bomb": fork_bomb,
    "die later": die_later,
}


def compute_score(solution_str):
    return REWARDS[solution_str]()
