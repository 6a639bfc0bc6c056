"""`kill -9` of a rank in every phase of a step: `run.restarts` brings the run back to the numbers of one never killed.

Which phase a rank is in is read off its process title, which Ray sets to the method that it runs, and off the folder of
a checkpoint that is being written. What a kill hit is then what the run says of it.
"""

import importlib.util
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from comparison import assert_equal_runs

from lorl import checkpoint
from lorl_command import DEADLINE_S, Command, Forks, adapter_sha256, metrics, small_run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

PHASES = ("rollout", "log-probabilities", "update", "save")
SAID = {"generating": "rollout", "logprobs": "log-probabilities", "updating": "update", "saving": "save"}
RANKS = 2


def command(folder: Path, model: Path, steps: int, *more: str, name: str) -> list[str]:
    keys = ["optim.lr=3e-4", "algorithm.kl_coef=0.05", "checkpoint.every_steps=1", "checkpoint.keep=null"]
    return small_run(folder, model, *keys, f"trainer.total_steps={steps}", *more, name=name)


@dataclass(slots=True)
class Killer:
    """Kills ranks of a supervised run, and counts what it hit."""

    running: Command
    run: Path
    hit: Counter[str] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)  # ranks' process ids, of all incarnations

    def kill(self, phase: str, victim: int, delay_s: float = 0.0) -> None:
        """Kills one of the ranks that there are after another step, `delay_s` into the next `phase`."""
        ranks = self._ranks()
        done = steps_done(self.run)
        self.running.wait_for(lambda: steps_done(self.run) > done)
        told = self.running.stderr.read_text().count(" died while ")
        pid = ranks[victim % RANKS]
        self._wait_for(phase, pid)
        time.sleep(delay_s)
        saving = bool(half_written(self.run))
        os.kill(pid, signal.SIGKILL)
        self.running.wait_for(lambda: self.running.stderr.read_text().count(" died while ") > told)
        said = re.findall(r" died while (\w+)", self.running.stderr.read_text())[-1]
        self.hit["save" if saving else SAID.get(said, said)] += 1

    def _ranks(self) -> list[int]:
        """The process ids of the ranks of an incarnation that no kill has hit, once they all exist."""
        found: list[int] = []
        deadline = time.monotonic() + DEADLINE_S
        while len(found) < RANKS:
            assert time.monotonic() < deadline, "the ranks do not come"
            time.sleep(0.1)  # looking is work, and so is starting
            with suppress(psutil.NoSuchProcess):
                below = psutil.Process(self.running.process).children(recursive=True)
                found = sorted(p.pid for p in below if p.pid not in self.seen and method(p.pid) is not None)
        self.seen.update(found)
        return found

    def _wait_for(self, phase: str, pid: int) -> None:
        """Until the rank `pid` is in `phase`, from its beginning."""
        deadline = time.monotonic() + DEADLINE_S
        recent = ["", ""]  # the methods that the rank ran last, without the times between them
        while not self._begins(phase, *recent):
            assert time.monotonic() < deadline, f"no {phase}"
            now = method(pid)
            assert now is not None, f"the rank ended before its {phase}"
            if now and now != recent[1]:
                recent = [recent[1], now]

    def _begins(self, phase: str, before: str, now: str) -> bool:
        """What a rank is called for after its rollout is log-probabilities; after its update, to publish and save."""
        if phase == "save":
            return bool(half_written(self.run))
        wanted = {"rollout": "generate", "log-probabilities": "call", "update": "update"}[phase]
        return now == wanted and (phase != "log-probabilities" or before == "generate")


def method(pid: int) -> str | None:
    """The method that a rank runs, "" between two; None: no such process, or no rank."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = re.match(r"ray::Rank(?:\.(\w+))?", title)
    return None if found is None else found[1] or ""


def half_written(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".tmp-step-*"))


def steps_done(run: Path) -> int:
    try:
        return sum(json.loads(line)["step"] > 0 for line in (run / "metrics.jsonl").read_text().splitlines())
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def killed(
    forks: Forks, model: Path, folder: Path, kills: Sequence[tuple[str, int, float]], *more: str
) -> tuple[Counter[str], Path]:
    """A supervised run that is killed `kills` times (phase, rank, delay) and has to finish. What was hit, and the run.

    Two steps a kill: one to be sure of a checkpoint, one to be hit.
    """
    steps = 3 * len(kills) + 2
    spread = [f"parallel.gpus={RANKS}", "parallel.strategy=ddp", f"run.restarts={len(kills)}", *more]
    running = forks.start(*command(folder, model, steps, *spread, name="r"), cwd=folder)
    killer = Killer(running, folder / "runs/r")
    for phase, rank, delay_s in kills:
        killer.kill(phase, rank, delay_s)
    done = running.wait()
    assert done.code == 0, done
    assert done.out.count("; restart ") == len(kills)
    assert not [pid for pid in killer.seen if method(pid) is not None], "no rank is left behind"
    for step in range(1, steps + 1):
        checkpoint.load(folder / f"runs/r/checkpoints/step-{step}")  # manifest, sizes, hashes
    return killer.hit, folder / "runs/r"


def test_a_rank_killed_in_each_phase_comes_back_to_the_same_numbers(
    forks: Forks, tiny_model: Path, tmp_path: Path
) -> None:
    hit, run = killed(forks, tiny_model, tmp_path, [(phase, i, 0.0) for i, phase in enumerate(PHASES)])
    assert set(hit) == set(PHASES)
    steps = len(metrics(run))
    whole = forks.run(*command(tmp_path, tiny_model, steps, name="whole"), cwd=tmp_path)
    assert whole.code == 0, whole
    assert_equal_runs(tmp_path / "runs/whole", run, steps)


LONGEST_S = {"rollout": 0.06, "log-probabilities": 0.015, "update": 0.06, "save": 0.012}


@pytest.mark.slow
def test_kills_all_over_each_phase(forks: Forks, tiny_model: Path, tmp_path: Path) -> None:
    """Four moments of each phase, each rank in turn: to the byte what two ranks come to that nobody kills. Once with
    nobody to restart it, on the rank that is left."""
    moments = [(phase, i, LONGEST_S[phase] * i / 4) for i in range(4) for phase in PHASES]
    hit, run = killed(forks, tiny_model, tmp_path, moments)
    print("kills by what they hit:", dict(hit))
    assert set(hit) >= set(PHASES)
    steps = len(metrics(run))
    two = [f"parallel.gpus={RANKS}", "parallel.strategy=ddp"]
    whole = forks.run(*command(tmp_path, tiny_model, steps, *two, name="whole"), cwd=tmp_path)
    assert whole.code == 0, whole
    assert adapter_sha256(tmp_path / "runs/whole", steps) == adapter_sha256(run, steps)
    assert metrics(tmp_path / "runs/whole") == metrics(run)

    argv = command(tmp_path, tiny_model, 8, name="left")
    running = forks.start(*argv, *two, cwd=tmp_path)
    Killer(running, tmp_path / "runs/left").kill("update", 1)
    assert running.wait().code == 4
    alone = forks.run(*argv, "resume=auto", cwd=tmp_path)
    assert alone.code == 0, alone
    assert "resuming left after step" in alone.out
    short = forks.run(*command(tmp_path, tiny_model, 8, name="short"), cwd=tmp_path)
    assert short.code == 0, short
    assert_equal_runs(tmp_path / "runs/short", tmp_path / "runs/left", 8)
