"""`lorl train` on vLLM, supervised: its engine raises, its process is killed, and hangs; the run ends as it should."""

from pathlib import Path

from lorl_command import metrics, rollouts, run_installed, small_run
from vllm_engines import needs_vllm, save_model

pytestmark = needs_vllm

STEPS = 4
OWN = ("algorithm.path=own.py", "algorithm.advantage=own")

# An algorithm file runs in the trainer's process. What this one does to the engine, once each: process 1 runs out of
# memory in its second rollout and is killed in the attempt after it, process 2 hangs in its second.
FAULTS = """
import os, pathlib, signal, time
import torch
from lorl.algorithms.registry import advantage
from lorl.rollout.vllm.engine import VllmEngine

sample = VllmEngine._sample
rollouts = 0

def once(name):
    marker = pathlib.Path(name)
    return not marker.exists() and marker.write_text("") == 0

def fault(self, requests, *args, **kwargs):
    global rollouts
    rollouts += len(requests) > 1  # a publish is proved with one
    for completion in sample(self, requests, *args, **kwargs):
        yield completion
        if len(requests) > 1 and rollouts > 1:
            if once("raised"):
                raise torch.OutOfMemoryError("CUDA out of memory")
            if once("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            if once("hung"):
                time.sleep(1000)

VllmEngine._sample = fault
"""
ADVANTAGE = """
from lorl.algorithms.registry import advantage

@advantage("own", source="ours")
def own(inputs):
    "A = R"
    return inputs.rewards[inputs.layout.sequence]
"""


def run(folder: Path, model: Path, own: str, *more: str) -> Path:
    folder.mkdir()
    (folder / "own.py").write_text(own)
    keys = (f"trainer.total_steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep=null", "model.device=cpu")
    done = run_installed(*small_run(folder, model, *keys, *OWN, *more), cwd=folder)
    assert done.code == 0, done
    return folder / "runs" / "r"


def samples(run_folder: Path) -> list[list[object]]:
    return [
        sorted((row["prompt"], row["sample"], row["completion"], row["reward"]) for row in rollouts(run_folder, step))
        for step in range(1, STEPS + 1)
    ]


def test_a_run_whose_engine_raises_is_killed_and_hangs(tmp_path: Path) -> None:
    model = save_model(tmp_path / "llama")
    expected = run(tmp_path / "torch", model, ADVANTAGE, "rollout.engine=torch")
    vllm = (
        "rollout.engine=vllm",
        "rollout.adapter_mode=adapter",
        "rollout.memory_fraction=0.002",
        "data.max_prompt_tokens=64",
    )
    supervised = ("run.restarts=3", "run.step_limit_s=15")
    found = run(tmp_path / "vllm", model, FAULTS + ADVANTAGE, *vllm, *supervised)
    assert all((tmp_path / "vllm" / name).exists() for name in ("raised", "killed", "hung"))
    assert samples(found) == samples(expected)
    assert [row["step"] for row in metrics(found) if row["step"]] == list(range(1, STEPS + 1))
