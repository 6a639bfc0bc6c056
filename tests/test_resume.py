"""Whatever ends a run, a signal, a kill or a full disk, the same command goes on to the same end."""

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorl import checkpoint
from lorl.checkpoint import ADAPTER_TENSORS, MANIFEST
from lorl_command import Forks, adapter_sha256, metrics, rollouts, run_installed, sha256, small_run, write_prompts

STEPS = 8
# Everything that draws or carries over: dropout, shuffling, evaluation, a reference, minibatches, a schedule.
EVERYTHING = (
    f"trainer.total_steps={STEPS}",
    "trainer.eval_every=3",
    "data.val=val.jsonl",
    "eval.success=0.5",
    "checkpoint.every_steps=1",
    "adapter.dropout=0.1",
    "algorithm.kl_coef=0.01",
    "algorithm.minibatch_prompts=1",
    "optim.schedule=cosine",
    "optim.warmup_steps=2",
)


@dataclass(frozen=True, slots=True)
class Uninterrupted:
    """The run that every interrupted one must equal."""

    run: Path
    step_s: float


def copy_of(folder: Path, model: Path) -> list[str]:
    """The command of the uninterrupted run, set up in another folder."""
    write_prompts(folder / "val.jsonl", 3)
    return small_run(folder, model, *EVERYTHING)


@pytest.fixture(scope="module")
def whole(forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    folder = tmp_path_factory.mktemp("whole")
    command = forks.start(*copy_of(folder, tiny_model), cwd=folder)
    command.wait_for(lambda: steps_done(folder / "runs/r") >= 1)
    first = time.monotonic()
    assert command.wait().code == 0
    return Uninterrupted(folder / "runs/r", (time.monotonic() - first) / STEPS)


def steps_done(run: Path) -> int:
    """Steps whose metrics are written (the line of step 0 is the evaluation before)."""
    try:
        return sum(json.loads(line)["step"] > 0 for line in (run / "metrics.jsonl").read_text().splitlines())
    except (FileNotFoundError, json.JSONDecodeError):  # a line that is being written
        return 0


def assert_same_end(whole: Uninterrupted, run: Path) -> None:
    assert adapter_sha256(run, STEPS) == adapter_sha256(whole.run, STEPS)
    optimizer = Path(f"checkpoints/step-{STEPS}/optimizer.safetensors")
    assert sha256(run / optimizer) == sha256(whole.run / optimizer)
    assert metrics(run) == metrics(whole.run)
    for step in range(1, STEPS + 1):
        assert rollouts(run, step) == rollouts(whole.run, step)
    ends = [json.loads((path / "summary.json").read_text()) for path in (run, whole.run)]
    for end in ends:
        del end["seconds"]
    assert ends[0] == ends[1]


def assert_all_readable(run: Path) -> None:
    for folder in (run / "checkpoints").glob("step-*"):
        checkpoint.load(folder)  # manifest, sizes, hashes, safetensors, JSON


# Killed


EARLY = ("run folder", "reading prompts ...", "reading prompts: done", "loading", "evaluating before training (3)")


def moments(whole: Uninterrupted, count: int) -> Iterator[tuple[str, float]]:
    """`count` moments over a run: when it has said these words, and so many seconds later. A quarter of them lie
    before the first step; the others are spread over the steps but the last, which a kill might come too late for, and
    fall at different points of them."""
    early = count // 4
    for i in range(early):
        yield EARLY[i * len(EARLY) // early], 0.0
    for i in range(count - early):
        steps = 1 + i * (STEPS - 3) // (count - early - 1)
        yield f"step {steps}/{STEPS}", whole.step_s * ((i * 0.38) % 1.0)


def kill_and_resume(forks: Forks, whole: Uninterrupted, model: Path, folder: Path, words: str, delay: float) -> None:
    """One kill -9 and the same command again, which must come to the same end."""
    folder.mkdir()
    argv, run = copy_of(folder, model), folder / "runs/r"
    command = forks.start(*argv, cwd=folder)
    command.wait_for(lambda: words in command.stdout.read_text())
    time.sleep(delay)
    command.signal(signal.SIGKILL)
    killed = command.wait()
    assert killed.code == -signal.SIGKILL, "the run was over before the kill; the moment proves nothing"
    assert_all_readable(run)
    saved = [path.name for path in (run / "checkpoints").glob("step-*")]
    again = forks.run(*argv, cwd=folder)
    assert again.code == 0, again
    if saved:
        assert f"resuming r after step {max(int(name.removeprefix('step-')) for name in saved)}" in again.out
    assert_same_end(whole, run)
    assert not list((run / "checkpoints").glob(".*")), "what the killed process left half-written is gone"


def kill_at_all(forks: Forks, whole: Uninterrupted, model: Path, folder: Path, count: int) -> None:
    for number, (words, delay) in enumerate(moments(whole, count)):
        kill_and_resume(forks, whole, model, folder / str(number), words, delay)


def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_end(
    forks: Forks, whole: Uninterrupted, tiny_model: Path, tmp_path: Path
):
    kill_at_all(forks, whole, tiny_model, tmp_path, 6)


@pytest.mark.slow
def test_twenty_kills(forks: Forks, whole: Uninterrupted, tiny_model: Path, tmp_path: Path):
    kill_at_all(forks, whole, tiny_model, tmp_path, 20)


def test_a_kill_in_the_middle_of_a_save(forks: Forks, whole: Uninterrupted, tiny_model: Path, tmp_path: Path):
    argv, run = copy_of(tmp_path, tiny_model), tmp_path / "runs/r"

    def half_written() -> list[Path]:
        return list((run / "checkpoints").glob(f".tmp-step-*-{command.process}"))

    for _ in range(STEPS - 2):  # such a folder lives for some milliseconds: a kill may come late
        command = forks.start(*argv, cwd=tmp_path)
        command.wait_for(lambda: bool(half_written()))
        command.signal(signal.SIGKILL)
        assert command.wait().code == -signal.SIGKILL
        if half_written():
            break
    assert half_written(), "no kill fell into a save"
    assert_all_readable(run)
    assert forks.run(*argv, cwd=tmp_path).code == 0
    assert_same_end(whole, run)


def test_a_checkpoint_that_was_damaged_afterwards_is_passed_over(
    forks: Forks, whole: Uninterrupted, tiny_model: Path, tmp_path: Path
):
    argv, run = copy_of(tmp_path, tiny_model), tmp_path / "runs/r"
    command = forks.start(*argv, cwd=tmp_path)
    command.wait_for(lambda: len(list((run / "checkpoints").glob("step-*"))) >= 2)
    command.signal(signal.SIGKILL)
    command.wait()
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    weights = newest / "adapter" / ADAPTER_TENSORS
    weights.write_bytes(weights.read_bytes()[:-100])
    again = run_installed(*argv, cwd=tmp_path)  # not a fork: with a hash seed of its own, for instance
    assert again.code == 0, again
    assert f"checkpoint {newest.relative_to(tmp_path)} is damaged" in again.err
    assert_same_end(whole, run)


# Asked to stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_and_the_run_goes_on_later(
    forks: Forks, whole: Uninterrupted, tiny_model: Path, tmp_path: Path, number: signal.Signals
):
    argv, run = copy_of(tmp_path, tiny_model), tmp_path / "runs/r"
    argv.append("checkpoint.every_steps=null")  # so that what is saved was saved for the signal
    command = forks.start(*argv, cwd=tmp_path)
    command.wait_for(lambda: steps_done(run) >= 3)
    command.signal(number)
    stopped = command.wait()
    assert stopped.code == 0, stopped
    assert f"{number.name}: finishing this step, then saving; once more leaves at once" in stopped.out
    assert f"stopped by {number.name} after step" in stopped.out
    assert not (run / "summary.json").exists()
    done = steps_done(run)
    assert checkpoint.verify(run / f"checkpoints/step-{done}")["step"] == done
    again = forks.run(*argv, cwd=tmp_path)
    assert again.code == 0, again
    assert f"resuming r after step {done}" in again.out
    assert_same_end(whole, run)


SLOW_REWARD = """
import time
def compute_score(solution_str, ground_truth):
    time.sleep(20)
    return 1.0
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once(forks: Forks, tiny_model: Path, tmp_path: Path, number: signal.Signals):
    argv = small_run(tmp_path, tiny_model, "reward.deadline_s=100", reward=SLOW_REWARD)
    command = forks.start(*argv, cwd=tmp_path)
    command.wait_for(lambda: (tmp_path / "runs/r/metrics.jsonl").exists())
    time.sleep(0.5)  # now in the first step, which takes 160 s
    command.signal(number)
    command.wait_for(lambda: "once more leaves at once" in command.stdout.read_text())
    second = time.monotonic()
    command.signal(number)
    assert command.wait().code == -number
    assert time.monotonic() - second < 10


def test_the_killed_run_leaves_no_process_behind(forks: Forks, tiny_model: Path, tmp_path: Path):
    import psutil

    argv = small_run(tmp_path, tiny_model, "reward.deadline_s=100", reward=SLOW_REWARD)
    command = forks.start(*argv, cwd=tmp_path)
    below = psutil.Process(command.process)
    command.wait_for(lambda: len(below.children(recursive=True)) >= 2)  # the fork server and a worker
    left = below.children(recursive=True)
    command.signal(signal.SIGKILL)
    command.wait()
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive


# Full disk


def checkpoint_bytes(whole: Uninterrupted) -> int:
    """Size of the largest file of a checkpoint."""
    manifest = json.loads((whole.run / f"checkpoints/step-{STEPS}" / MANIFEST).read_text())
    return max(entry["bytes"] for entry in manifest["files"].values())


def test_a_full_disk_keeps_the_run_going_and_the_old_checkpoint_whole(
    forks: Forks, whole: Uninterrupted, tiny_model: Path, tmp_path: Path
):
    argv, run = copy_of(tmp_path, tiny_model), tmp_path / "runs/r"
    command = forks.start(*argv, "trainer.total_steps=2", cwd=tmp_path)
    assert command.wait().code == 0
    before = {path.name: path.read_bytes() for path in (run / "checkpoints/step-2").rglob("*") if path.is_file()}
    full = forks.run(*argv, cwd=tmp_path, file_limit=checkpoint_bytes(whole) // 2)
    assert full.code == 4
    assert "Traceback" not in full.err
    assert full.err.startswith("lorl: ")
    assert full.err.count("\n") == 1
    assert f"step {STEPS} was not saved" in full.err
    assert "earlier checkpoints are whole" in full.err
    for step in range(3, STEPS):
        assert f"warning: step {step} was not saved" in full.out
        assert f"step {step}/{STEPS}" in full.out, "the run goes on"
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name != "step-1"] == ["step-2"]
    after = {path.name: path.read_bytes() for path in (run / "checkpoints/step-2").rglob("*") if path.is_file()}
    assert after == before
    again = forks.run(*argv, cwd=tmp_path)  # room was made
    assert again.code == 0, again


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    forks: Forks, whole: Uninterrupted, tiny_model: Path, tmp_path: Path
):
    """A save that failed is tried again after the next step, whatever checkpoint.every_steps says."""
    argv, run = copy_of(tmp_path, tiny_model), tmp_path / "runs/r"
    blocked = run / "checkpoints"
    command = forks.start(*argv, "checkpoint.every_steps=2", "checkpoint.keep=8", cwd=tmp_path)
    command.wait_for(lambda: (run / "metrics.jsonl").exists())
    blocked.write_text("no folder can be made here")
    command.wait_for(lambda: "warning: step 2 was not saved" in command.stdout.read_text())
    blocked.unlink()
    done = command.wait()
    assert done.code == 0, done
    assert "step 3 was not saved" in done.out or (blocked / "step-3").exists(), "the next step tries again"
    assert_same_end(whole, run)
