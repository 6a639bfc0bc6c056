"""A supervised run (`run.restarts`) that dies or hangs goes on by itself to the same end, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lorl_command import ENVIRONMENT, LORL, Command, Forks, adapter_sha256, metrics, rollouts, sha256, small_run

STEPS = 6
# An algorithm file runs in the trainer's process: what it does, the trainer does. `fault(call)` comes before the
# advantages of the call-th step of a process.
FAULTY = """
import os, pathlib, signal, subprocess, sys, time
from lorl.algorithms.registry import advantage

{fault}

calls = 0

@advantage("faulty", source="ours")
def faulty(inputs):
    "A = R"
    global calls
    calls += 1
    fault(calls)
    return inputs.rewards[inputs.layout.sequence]
"""
NO_FAULT = "def fault(call): pass"
PIDS_REWARD = """
import os
def compute_score(solution_str, ground_truth):
    with open("pids", "a") as file:
        file.write(f"{os.getpid()}\\n{os.getppid()}\\n")
    return len(set(solution_str)) / 16
"""


def supervised(folder: Path, model: Path, *more: str, fault: str = NO_FAULT) -> list[str]:
    (folder / "own.py").write_text(FAULTY.format(fault=fault))
    keys = (f"trainer.total_steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep=null", "adapter.dropout=0.1")
    own = ("algorithm.path=own.py", "algorithm.advantage=faulty")
    return small_run(folder, model, *keys, *own, "run.restarts=3", *more, reward=PIDS_REWARD)


@dataclass(frozen=True, slots=True)
class Undisturbed:
    run: Path
    step_s: float


@pytest.fixture(scope="module")
def whole(forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("whole")
    done = forks.run(*supervised(folder, tiny_model, "run.restarts=0"), cwd=folder)
    assert done.code == 0, done
    lines = (folder / "runs/r/metrics.jsonl").read_text().splitlines()
    return Undisturbed(folder / "runs/r", sum(json.loads(line)["time/step_s"] for line in lines) / STEPS)


def assert_same_end(whole: Undisturbed, run: Path) -> None:
    assert adapter_sha256(run, STEPS) == adapter_sha256(whole.run, STEPS)
    optimizer = f"checkpoints/step-{STEPS}/optimizer.safetensors"
    assert sha256(run / optimizer) == sha256(whole.run / optimizer)
    assert metrics(run) == metrics(whole.run)
    for step in range(1, STEPS + 1):
        assert rollouts(run, step) == rollouts(whole.run, step)
    assert (run / "summary.json").exists()


def child_of(command: Command) -> psutil.Process:
    """The process that trains."""
    (child,) = psutil.Process(command.process).children()
    return child


def pids(folder: Path) -> set[int]:
    """Of all processes that wrote theirs down: reward workers, their fork servers, what an algorithm file started."""
    return {int(line) for line in (folder / "pids").read_text().split()}


def alive(ids: set[int]) -> list[psutil.Process]:
    found = [psutil.Process(pid) for pid in ids if psutil.pid_exists(pid)]
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def assert_gone(ids: set[int]) -> None:
    assert ids
    _, left = psutil.wait_procs(alive(ids), timeout=10)
    assert not left


def said(command: Command, words: str) -> Callable[[], bool]:
    return lambda: words in command.stdout.read_text()


# Dies


def test_a_run_that_is_killed_in_a_step_goes_on_by_itself_to_the_same_end(
    forks: Forks, whole: Undisturbed, tiny_model: Path, tmp_path: Path
):
    command = forks.start(*supervised(tmp_path, tiny_model), cwd=tmp_path)
    command.wait_for(said(command, f"step 2/{STEPS}"))
    time.sleep(whole.step_s / 2)
    child_of(command).kill()
    done = command.wait()
    assert done.code == 0, done
    assert (
        "warning: the run's process was killed by SIGKILL (as the kernel does when memory runs out) after st"
        in done.out
    )
    assert "; restart 1 of 3 goes on from step " in done.out
    assert "resuming r after step " in done.out
    assert_same_end(whole, tmp_path / "runs/r")
    assert_gone(pids(tmp_path))


def test_each_way_to_die_is_told_and_survived(forks: Forks, whole: Undisturbed, tiny_model: Path, tmp_path: Path):
    """A fault a process: an exception, an exit, a crash in native code. The restarted process meets the next one."""
    fault = """
faults = [lambda: {}["missing"], lambda: os._exit(137), lambda: os.kill(os.getpid(), signal.SIGSEGV), lambda: None]

def fault(call):
    if call == 2:
        number = pathlib.Path("number")
        count = int(number.read_text()) if number.exists() else 0
        number.write_text(str(count + 1))
        faults[count]()
"""
    done = forks.run(*supervised(tmp_path, tiny_model, fault=fault), cwd=tmp_path)
    assert done.code == 0, done
    for number, (how, step) in enumerate([("ended with exit code 1", 1), ("ended with exit code 137", 2)], 1):
        assert f"process {how} after step {step}; restart {number} of 3 goes on from step {step}" in done.out
    assert "process was killed by SIGSEGV after step 3; restart 3 of 3 goes on from step 3" in done.out
    assert "KeyError: 'missing'" in done.err, "what the run says on stderr is passed on"
    assert_same_end(whole, tmp_path / "runs/r")


def test_a_run_that_dies_at_once_always_ends_with_exit_code_4(forks: Forks, tiny_model: Path, tmp_path: Path):
    fault = 'print("no such device", file=sys.stderr, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)'
    started = time.monotonic()
    done = forks.run(*supervised(tmp_path, tiny_model, "run.restarts=99", fault=fault), cwd=tmp_path)
    assert time.monotonic() - started < 60
    assert done.code == 4
    last = done.err.splitlines()[-1]
    assert last.startswith(
        "lorl: the run's process was killed by SIGKILL (as the kernel does when memory runs out) while"
    )
    assert "where it has ended 3 times in a row; " in last
    assert "its last line on standard error: 'no such device'; there is no checkpoint yet" in last
    assert done.err.count("\n") == 4


def test_when_the_restarts_are_spent_nothing_is_left_but_the_checkpoint(forks: Forks, tiny_model: Path, tmp_path: Path):
    fault = """
def fault(call):
    if call == 2:
        away = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        near = subprocess.Popen(["sleep", "1000"])
        with open("pids", "a") as file:
            file.write(f"{os.getpid()}\\n{away.pid}\\n{near.pid}\\n")
        raise RuntimeError("the device fell off")
"""
    done = forks.run(*supervised(tmp_path, tiny_model, "run.restarts=1", fault=fault), cwd=tmp_path)
    assert done.code == 4
    sentence = (
        "lorl: the run's process ended with exit code 1 after step 2, and run.restarts=1 are spent; its last line on "
        "standard error: 'RuntimeError: the device fell off'; the same command with run.name=r goes on from "
        "runs/r/checkpoints/step-2"
    )
    assert done.err.splitlines()[-1] == sentence
    assert not alive(pids(tmp_path))


def test_a_mistake_of_the_users_is_told_once(forks: Forks, tiny_model: Path, tmp_path: Path):
    done = forks.run(*supervised(tmp_path, tiny_model, fault="def fault("), cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith("lorl: algorithm.path: ")
    assert done.err.count("\n") == 1
    assert "restart" not in done.out


def test_a_run_that_diverged_is_not_tried_again(forks: Forks, tiny_model: Path, tmp_path: Path):
    done = forks.run(*supervised(tmp_path, tiny_model, "rollout.max_mismatch=1e-12"), cwd=tmp_path)
    assert done.code == 3
    assert "restart" not in done.out


# Hangs


def test_a_run_that_hangs_is_killed_and_goes_on_to_the_same_end(
    forks: Forks, whole: Undisturbed, tiny_model: Path, tmp_path: Path
):
    fault = """
def fault(call):
    marker = pathlib.Path("hung")
    if call == 2 and not marker.exists():
        marker.touch()
        time.sleep(1000)
"""
    done = forks.run(*supervised(tmp_path, tiny_model, "run.step_limit_s=4", fault=fault), cwd=tmp_path)
    assert done.code == 0, done
    told = "gave no sign of life for 4 s (run.step_limit_s) after step 1; restart 1 of 3 goes on from step 1"
    assert told in done.out
    assert "own.py" in done.err, "where it hung"
    assert_same_end(whole, tmp_path / "runs/r")
    assert_gone(pids(tmp_path))


# Signals


@pytest.mark.parametrize("everyone", [False, True])
def test_a_signal_saves_and_leaves_with_0(
    forks: Forks, whole: Undisturbed, tiny_model: Path, tmp_path: Path, everyone: bool
):
    argv = supervised(tmp_path, tiny_model)
    command = forks.start(*argv, "checkpoint.every_steps=null", cwd=tmp_path)
    command.wait_for(said(command, f"step 2/{STEPS}"))
    if everyone:  # as schedulers do
        child_of(command).send_signal(signal.SIGTERM)
    command.signal(signal.SIGTERM)
    stopped = command.wait()
    assert stopped.code == 0, stopped
    assert "stopped by SIGTERM after step" in stopped.out
    assert "restart" not in stopped.out
    assert list((tmp_path / "runs/r/checkpoints").glob("step-*"))
    assert forks.run(*argv, cwd=tmp_path).code == 0
    assert_same_end(whole, tmp_path / "runs/r")


SLEEPS = """
def fault(call):
    if call == 2:
        open("sleeping", "w").close()
        time.sleep(1000)
"""


def asleep(forks: Forks, model: Path, folder: Path) -> tuple[Command, set[int]]:
    """A run that sleeps in step 2, and the ids of its processes."""
    command = forks.start(*supervised(folder, model, fault=SLEEPS), cwd=folder)
    command.wait_for((folder / "sleeping").exists)
    return command, {process.pid for process in psutil.Process(command.process).children(recursive=True)}


def test_a_second_signal_leaves_at_once(forks: Forks, tiny_model: Path, tmp_path: Path):
    command, processes = asleep(forks, tiny_model, tmp_path)
    command.signal(signal.SIGINT)
    command.wait_for(said(command, "once more leaves at once"))
    command.signal(signal.SIGINT)
    assert command.wait().code == -signal.SIGINT
    assert not alive(processes)


def test_a_killed_supervisor_leaves_no_run_behind(forks: Forks, tiny_model: Path, tmp_path: Path):
    command, processes = asleep(forks, tiny_model, tmp_path)
    assert len(processes) >= 3, "the run, a fork server and a worker"
    command.signal(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    assert_gone(processes)


def test_ctrl_c_on_a_terminal_that_shows_a_bar(tiny_model: Path, tmp_path: Path):
    def own_terminal() -> None:
        import fcntl

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ours, theirs = os.openpty()
    argv = [LORL, *supervised(tmp_path, tiny_model, "trainer.total_steps=9999")]
    process = subprocess.Popen(
        argv,
        cwd=tmp_path,
        env={**ENVIRONMENT, "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(theirs)
    screen = b""
    while b"step    2/9999" not in screen:
        screen += os.read(ours, 1 << 16)
    os.write(ours, b"\x03")
    while True:
        try:
            screen += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    assert process.wait(60) == 0
    assert b"training \x1b" in screen, "the bar"
    assert b"stopped by SIGINT after step" in screen
    assert list((tmp_path / "runs/r/checkpoints").glob("step-*"))
