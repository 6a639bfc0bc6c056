"""Training over Ray, through the installed command's own code: real actors, gloo between CPU processes."""

import importlib.util
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from comparison import assert_equal_runs

from lorl_command import Command, Forks, small_run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

STEPS = 5
# On rank 1 of a group, the loss calls `fault(number)` of the update.
FAULTY_LOSS = """
import time
import torch.distributed as dist
from lorl.algorithms.policy_losses import reinforce
from lorl.algorithms.registry import policy_loss

calls = 0

@policy_loss("faulty", source="ours")
def faulty(logprobs, old_logprobs, advantages, layout):
    "-A log pi"
    global calls
    calls += 1
    if calls == 2 and dist.is_initialized() and dist.get_rank() == 1:
        time.sleep(600)
    return reinforce(logprobs, old_logprobs, advantages, layout)
"""


def command(folder: Path, model: Path, *more: str, name: str) -> list[str]:
    return small_run(folder, model, "optim.lr=3e-4", f"trainer.total_steps={STEPS}", *more, name=name)


def test_sharded_bases_over_ray_train_to_the_numbers_of_one_process(
    forks: Forks, tiny_model: Path, tmp_path: Path
) -> None:
    keys = ["algorithm.advantage=gae", "critic.lr=1e-3", "algorithm.kl_coef=0.05"]
    one = forks.run(*command(tmp_path, tiny_model, *keys, name="one"), cwd=tmp_path)
    assert one.code == 0, one
    for strategy in ("fsdp", "fsdp2", "shared"):
        spread = [*keys, "parallel.gpus=2", f"parallel.strategy={strategy}"]
        many = forks.run(*command(tmp_path, tiny_model, *spread, name=strategy), cwd=tmp_path)
        assert many.code == 0, many
        assert "2 ranks on CPU processes, each with a share of each layer" in many.out
        assert strategy == "shared" or "MiB, by mapping it" in many.out
        assert_equal_runs(tmp_path / "runs/one", tmp_path / "runs" / strategy, STEPS)


def test_a_killed_rank_or_driver_ends_the_run_and_one_rank_goes_on_to_the_same_numbers(
    forks: Forks, tiny_model: Path, tmp_path: Path
) -> None:
    keys = ["checkpoint.every_steps=1", "trainer.total_steps=10", "algorithm.kl_coef=0.05"]
    whole = forks.run(*command(tmp_path, tiny_model, *keys, name="whole"), cwd=tmp_path)
    assert whole.code == 0, whole
    argv, run = command(tmp_path, tiny_model, *keys, "model.use_shm=true", name="r"), tmp_path / "runs/r"
    copies = Path(f"/dev/shm/lorl-{os.getuid()}")

    running = forks.start(*argv, "parallel.gpus=2", cwd=tmp_path)
    running.wait_for(lambda: steps_done(run) >= 2)
    cluster = processes_below(running)
    victim = next(process for process in cluster if process.name().startswith("ray::Rank"))
    victim.send_signal(signal.SIGKILL)
    ended = running.wait()
    assert ended.code == 4, ended
    assert "lorl: the process of rank" in ended.err
    assert_gone(cluster)

    running = forks.start(*argv, "parallel.gpus=2", cwd=tmp_path)
    running.wait_for(lambda: steps_done(run) >= 4)
    cluster = processes_below(running)
    assert list(copies.glob("*/model.safetensors"))
    running.signal(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert_gone(cluster)
    deadline = time.monotonic() + 20
    while list(copies.glob("*/model.safetensors")):
        assert time.monotonic() < deadline, "nobody removed the copy of the model"
        time.sleep(0.1)

    alone = forks.run(*argv, cwd=tmp_path)
    assert alone.code == 0, alone
    assert "resuming r after step" in alone.out
    assert_equal_runs(tmp_path / "runs/whole", run, 10)


def test_a_rank_that_hangs_ends_the_run_with_its_name_and_the_call(
    forks: Forks, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(FAULTY_LOSS)
    keys = ["algorithm.path=own.py", "algorithm.policy_loss=faulty", "parallel.collective_limit_s=3"]
    running = forks.start(*command(tmp_path, tiny_model, *keys, "parallel.gpus=2", name="r"), cwd=tmp_path)
    running.wait_for(lambda: steps_done(tmp_path / "runs/r") >= 1)
    cluster = processes_below(running)
    ended = running.wait()
    assert ended.code == 4, ended
    last = ended.err.strip().splitlines()[-1]
    assert "rank 0 waited" in last
    assert "rank 1 did not come" in last
    assert "'policy gradients'" in last or "'mismatch'" in last
    assert_gone(cluster)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["parallel.strategy=local"], "parallel.strategy=local"),
        (["parallel.strategy=fsdp2", "rollout.adapter_mode=fold"], "rollout.adapter_mode=fold"),
        (["parallel.strategy=ddp", "rollout.engine=vllm", "parallel.param_offload=true"], "strategy=fsdp2"),
        (["parallel.sequence=2", "rollout.engine=vllm"], "parallel.sequence"),
        (["parallel.strategy=shared", "adapter.dora=true"], "adapter.dora"),
        (["parallel.strategy=shared", "rollout.adapter_mode=fold"], "rollout.adapter_mode=fold"),
        (["parallel.strategy=shared", "parallel.param_offload=true"], "parallel.param_offload"),
        (["parallel.strategy=fsdp", "adapter.dora=true"], "adapter.dora"),
        (["parallel.strategy=fsdp2", "parallel.shard_size=3"], "does not divide the 2 ranks"),
        (["parallel.strategy=fsdp2", "adapter.dora=true"], "adapter.dora"),
    ],
)
def test_what_many_ranks_do_not_do_is_one_sentence(
    keys: list[str], words: str, forks: Forks, tiny_model: Path, tmp_path: Path
) -> None:
    ended = forks.run(*command(tmp_path, tiny_model, *keys, "parallel.gpus=2", name="r"), cwd=tmp_path)
    assert ended.code == 2
    assert words in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def steps_done(run: Path) -> int:
    try:
        return sum(json.loads(line)["step"] > 0 for line in (run / "metrics.jsonl").read_text().splitlines())
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def processes_below(running: Command) -> list[psutil.Process]:
    found = psutil.Process(running.process).children(recursive=True)
    assert sum(process.name().startswith("ray::Rank") for process in found) == 2
    return found


def assert_gone(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 20
    while left := [process for process in processes if alive(process)]:
        assert time.monotonic() < deadline, f"left behind: {[describe(process) for process in left]}"
        time.sleep(0.1)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def describe(process: psutil.Process) -> Any:
    try:
        return process.pid, process.cmdline()[:4]
    except psutil.NoSuchProcess:
        return process.pid
