"""Several ranks sample with vLLM: each with an engine of its own, or all with one over their shards."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "parallel"))  # its helpers, as pytest finds them for its own tests

from comparison import assert_equal_runs
from forked import ForkedRanks

import small_trainer
import vllm_engines
from lorl.rewards.pool import RewardPool
from small_trainer import run, small_config
from vllm_engines import needs_vllm, save_model

pytest_plugins = ["trainer_fixtures"]
pytestmark = needs_vllm

STEPS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", num_key_value_heads=2)


def trained(model: Path, folder: Path, pool: RewardPool, *overrides: str, name: str) -> Path:
    """The run folder of a finished run."""
    config = small_config(
        model,
        folder,
        "model.device=cpu",
        "data.max_prompt_tokens=64",
        "optim.lr=3e-4",
        "algorithm.kl_coef=0.05",
        "rollout.engine=vllm",
        "rollout.memory_fraction=0.004",
        "rollout.max_concurrent=8",
        "rollout.rest=always",
        *overrides,
        name=name,
    )
    with pytest.MonkeyPatch.context() as patch:
        if config.parallel.gpus > 1:
            vllm_engines._no_inspectors()  # of no rank
            patch.setattr(small_trainer, "local_worker", lambda config, *_: ForkedRanks(config))
        _, trainer = run(config, pool, steps=STEPS)
        trainer.workers.close()
    return trainer.folder.path


def test_ranks_with_an_engine_each_train_to_the_numbers_of_one(model: Path, tmp_path: Path, pool: RewardPool) -> None:
    many = trained(model, tmp_path, pool, "rollout.adapter_mode=adapter", "parallel.gpus=2", name="many")
    one = trained(model, tmp_path, pool, "rollout.adapter_mode=adapter", name="one")
    assert_equal_runs(one, many, STEPS)


def test_ranks_that_share_one_engines_parts_train_to_the_numbers_of_one_process(
    model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    many = trained(model, tmp_path, pool, "parallel.strategy=shared", "parallel.gpus=2", name="many")
    one = trained(model, tmp_path, pool, "rollout.adapter_mode=adapter", name="one")
    assert_equal_runs(one, many, STEPS)
