"""The `lorl` command as tests use it: start it, wait for it, kill it, read what it left."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LORL = Path(sys.executable).with_name("lorl")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
DEADLINE_S = 240.0
MACHINE = ("time/", "throughput/", "memory/", "reward/seconds")  # metrics of the machine, not of the run


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Command:
    """A `lorl` command that runs."""

    forks: "Forks"
    process: int
    stdout: Path
    stderr: Path

    def poll(self) -> int | None:
        return self.forks.ask({"poll": self.process})

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process, number)

    def wait(self) -> Result:
        deadline = time.monotonic() + DEADLINE_S
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise AssertionError(
                    f"no end after {DEADLINE_S:.0f} s\n{self.stdout.read_text()}\n{self.stderr.read_text()}"
                )
            time.sleep(0.01)
        return Result(code, self.stdout.read_text(), self.stderr.read_text())

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds; the command must not end before."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, "what was waited for did not come"
            if (code := self.poll()) is not None:
                raise AssertionError(f"ended with {code} before\n{self.stdout.read_text()}\n{self.stderr.read_text()}")
            time.sleep(0.001)


class Forks:
    """`lorl` processes forked from one that has imported everything (see lorl_forks.py)."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._started = 0
        driver = [sys.executable, str(Path(__file__).with_name("lorl_forks.py"))]
        self._driver = subprocess.Popen(
            driver, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._driver.stdin.write(json.dumps(request) + "\n")
        self._driver.stdin.flush()
        return json.loads(self._driver.stdout.readline())

    def start(self, *argv: object, cwd: Path, file_limit: int | None = None) -> Command:
        """`lorl *argv` in the folder `cwd`. With `file_limit`, writing a file past so many bytes fails."""
        self._started += 1
        stdout, stderr = (self._logs / f"{self._started}.{name}" for name in ("out", "err"))
        stdout.touch()
        stderr.touch()
        job = {"argv": list(map(str, argv)), "cwd": str(cwd), "stdout": str(stdout), "stderr": str(stderr)}
        return Command(self, self.ask({"start": {**job, "file_limit": file_limit}}), stdout, stderr)

    def run(self, *argv: object, cwd: Path, file_limit: int | None = None) -> Result:
        return self.start(*argv, cwd=cwd, file_limit=file_limit).wait()

    def close(self) -> None:
        assert self._driver.stdin is not None
        self._driver.stdin.close()
        self._driver.wait(30)


def run_installed(*argv: object, cwd: Path, **environment: str) -> Result:
    """The installed `lorl`, from its start."""
    done = subprocess.run(
        [LORL, *map(str, argv)],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def write_prompts(path: Path, count: int, **columns: Any) -> Path:
    """JSON lines: `count` short questions with their answers, and `columns` in every row."""
    rows = [{"id": f"q{i}", "prompt": f"{i}+{i}=", "answer": str(2 * i), **columns} for i in range(count)]
    return write_rows(path, rows)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


VARIED_REWARD = """
def compute_score(solution_str, ground_truth):
    return len(set(solution_str)) / 16
"""


def small_run(folder: Path, model: Path, *more: str, name: str = "r", reward: str = VARIED_REWARD) -> list[str]:
    """`train` and its arguments for a run of 3 steps of 2 prompts x 4 samples in `folder`, which it prepares."""
    if not (folder / "train.jsonl").exists():
        write_prompts(folder / "train.jsonl", 8)
        (folder / "reward.py").write_text(reward)
    return [
        "train",
        f"model.path={model}",
        "data.train=train.jsonl",
        "data.prompts_per_step=2",
        "reward.path=reward.py",
        "reward.workers=1",
        "rollout.n=4",
        "rollout.max_response_tokens=12",
        "adapter.rank=4",
        "optim.lr=3e-3",
        "trainer.total_steps=3",
        f"run.name={name}",
        *more,
    ]


def metrics(run: Path) -> list[dict[str, Any]]:
    """What repeats of metrics.jsonl: everything but the machine's numbers."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE)} for row in rows]


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts" / f"step-{step}.jsonl").read_text().splitlines()]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def adapter_sha256(run: Path, step: int) -> str:
    return sha256(run / "checkpoints" / f"step-{step}" / "adapter" / "adapter_model.safetensors")
