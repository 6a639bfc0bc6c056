"""Offloading moves bytes and changes none: whole runs with and without it end with the same adapters."""

from pathlib import Path

import pytest
from test_ranks import trained

from lorl import settings
from lorl.errors import UserError
from lorl.parallel import start
from lorl.rewards.pool import RewardPool
from small_trainer import small_config

pytest_plugins = ["trainer_fixtures"]

STEPS = 3
PPO = ["algorithm.advantage=gae", "critic.lr=1e-3", "algorithm.kl_coef=0.05", "model.gradient_checkpointing=true"]
ALL = ["parallel.param_offload=true", "parallel.optimizer_offload=true", "model.activation_offload=true"]


def checkpoint(run: Path) -> dict[str, bytes]:
    """The adapters and the optimizers' state of the last step."""
    files = sorted((run / f"checkpoints/step-{STEPS}").rglob("*.safetensors"))
    assert len(files) >= 3
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param([], id="local"),
        pytest.param(["parallel.gpus=2"], id="ddp"),
        pytest.param(["parallel.gpus=2", "parallel.strategy=fsdp"], id="fsdp"),
        pytest.param(["parallel.gpus=2", "parallel.strategy=fsdp2"], id="fsdp2"),
    ],
)
def test_an_offloaded_run_is_the_run_byte_for_byte(
    keys: list[str], tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    keys = [*PPO, *keys]
    kept = trained(small_config(tiny_model, tmp_path, *keys, name="kept"), pool, STEPS, STEPS)
    away = trained(small_config(tiny_model, tmp_path, *keys, *ALL, name="away"), pool, STEPS, STEPS)
    assert checkpoint(away) == checkpoint(kept)


@pytest.mark.parametrize(
    ("key", "words"),
    [("rollout.engine=vllm", "rollout.engine=vllm reads the base"), ("adapter.dora=true", "dora=true reads whole")],
)
def test_what_reads_the_base_on_the_device_is_refused(key: str, words: str) -> None:
    config = settings.load(None, ["parallel.param_offload=true", key])
    with pytest.raises(UserError, match=words):
        start.check(config)
