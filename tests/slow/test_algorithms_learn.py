"""Each algorithm learns: SmolLM2-135M sorts three numbers, and its reward rises within a dozen steps.

A run takes two to three minutes on two cores; `pytest -m slow -k grpo` picks one.
"""

import io
from pathlib import Path
from statistics import fmean

import learning_cases
import pytest

from lorl import settings
from lorl.setup import train
from lorl.tracking.console import Console


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    learning_cases.write_task(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", learning_cases.ALGORITHMS)
def test_the_reward_rises(name: str, smollm2: str, task: Path, tmp_path: Path) -> None:
    overrides = learning_cases.overrides(name, model=smollm2, task=task, runs=tmp_path)
    assert train(settings.load(None, overrides), Console(io.StringIO())) is not None
    rewards = learning_cases.rewards(tmp_path / name)
    assert len(rewards) == learning_cases.STEPS
    assert fmean(rewards[-3:]) > fmean(rewards[:3]), rewards
