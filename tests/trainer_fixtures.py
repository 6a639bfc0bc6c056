"""Fixtures of tests that train the tiny model in this process; their `pytest_plugins` name this file."""

from collections.abc import Iterator

import pytest
import torch

from lorl.config import RewardConfig
from lorl.rewards.pool import RewardPool
from small_trainer import RULE


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardPool]:
    """Grades by RULE. Torch gets one thread: products of this size only wait for a second one."""
    torch.set_num_threads(1)
    rule = tmp_path_factory.mktemp("rule") / "rule.py"
    rule.write_text(RULE)
    with RewardPool(RewardConfig(path=str(rule), workers=1)) as pool:
        yield pool
