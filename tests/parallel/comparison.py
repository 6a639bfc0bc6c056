"""What it takes for two runs to be equal: the samples exactly, adapters and metrics within rounding."""

import math
from pathlib import Path

from safetensors.torch import load_file

from lorl.checkpoint import ADAPTER_TENSORS
from lorl_command import metrics, rollouts

ERROR = 1e-5  # in float32, after five steps at ten times a full fine-tune's learning rate


def assert_equal_runs(left: Path, right: Path, step: int) -> None:
    files = sorted((left / f"checkpoints/step-{step}").glob(f"*/{ADAPTER_TENSORS}"))
    assert files
    for file in files:
        ours, theirs = load_file(file), load_file(right / f"checkpoints/step-{step}" / file.parent.name / file.name)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert float((value - theirs[name]).abs().max()) <= ERROR, (file.parent.name, name)
    for ours, theirs in zip(metrics(left), metrics(right), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            # Norms of gradients are tens here: their error is relative. A maximum over tokens is of one token.
            assert math.isclose(value, theirs[name], rel_tol=ERROR, abs_tol=3 * ERROR), (ours["step"], name)
    for number in range(1, step + 1):
        assert samples(left, number) == samples(right, number)


def samples(run: Path, step: int) -> list[tuple[str, int, str, float]]:
    return [(row["prompt_id"], row["sample"], row["completion"], row["reward"]) for row in rollouts(run, step)]
