"""Runs `lorl` commands as processes of their own without the seconds of imports each: imports once, then forks.

Reads a JSON request a line on stdin and answers with a line of JSON:

    {"start": {"argv", "cwd", "stdout", "stderr", "file_limit"}}  ->  process id
    {"poll": process id}                                          ->  exit status, negative for a signal; null: running
"""

import json
import os
import resource
import signal
import sys
import warnings
from typing import Any, NoReturn

import lorl.setup  # noqa: F401  (with it torch, transformers and peft)
from lorl.cli import main


def start(job: dict[str, Any]) -> int:
    process = os.fork()
    if process == 0:
        become(job)
    return process


def become(job: dict[str, Any]) -> NoReturn:
    """This process, a fresh copy, turns into `lorl *argv`."""
    os.setsid()
    os.chdir(job["cwd"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job["file_limit"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself does at its start
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], resource.RLIM_INFINITY))
    sys.argv = ["lorl", *job["argv"]]
    try:
        main()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def poll(process: int) -> int | None:
    ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # fork from a process that torch has given threads
    for line in sys.stdin:
        request = json.loads(line)
        answer = start(request["start"]) if "start" in request else poll(request["poll"])
        print(json.dumps(answer), flush=True)
