"""A vLLM is started with the KV cache that `lorl plan` promises. The GPU is a number of bytes here."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from lorl.plan.choose import make_plan
from lorl.plan.demand import demand_of
from lorl.plan.footprint import CPU_CACHE
from lorl.plan.hardware import GIB, GPUS, Cluster
from lorl.plan.layout import Layout
from lorl.plan.memory import BASE, ENGINE, MASTERS, OTHERS, SLOTS, Memory
from lorl.plan.shape import BUILT_IN, find_shape
from lorl.policy import adapters
from lorl.policy.load import pick_dtype
from lorl.policy.sharing import empty_model
from lorl.rollout.vllm import opening
from lorl.settings import load

H100 = GPUS["h100"]
GPU = torch.device("cuda")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a run of a model that the plan knows by name is started with, on a GPU of which `free` bytes are free."""

    def plan_on_device(
        name: str, keys: list[str], free: int = H100.memory, lora: LoraConfig | None = None, device: torch.device = GPU
    ) -> Memory:
        (tmp_path / "config.json").write_text(json.dumps(BUILT_IN[name]))
        config = load(None, [f"model.path='{tmp_path}'", "model.random_weights=true", "rollout.engine=vllm", *keys])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, H100.memory))
        model = empty_model(config.model, pick_dtype(config.model, device))
        ranks = config.parallel.gpus * config.parallel.nodes
        ways = None if config.parallel.strategy in ("auto", "local", "ddp") else config.parallel.shard_size or ranks
        return opening.planned(config, model, device, lora or adapters.configured(config.adapter), ways)

    return plan_on_device


SHORT = ["data.max_prompt_tokens=512", "rollout.max_response_tokens=1024"]


@pytest.mark.parametrize(
    ("name", "layout", "gpus", "keys"),
    [
        ("qwen2.5-1.5b", Layout("ddp"), 1, []),
        ("qwen2.5-1.5b", Layout("ddp"), 1, ["adapter.rank=24", "adapter.target_modules=[q_proj,v_proj]"]),
        ("qwen2.5-1.5b", Layout("ddp"), 1, ["adapter.target_modules=[q_proj]", "rollout.adapter_slots=3"]),
        ("qwen2.5-1.5b", Layout("ddp"), 1, ["algorithm.advantage=gae", "rollout.memory_fraction=0.7"]),
        ("qwen2.5-1.5b", Layout("ddp"), 1, ["model.dtype=float32", "rollout.adapter_mode=fold"]),
        ("qwen2.5-7b", Layout("ddp"), 1, []),
        ("qwen2.5-7b", Layout("ddp"), 4, ["parallel.strategy=ddp", "parallel.microbatch_tokens=65536"]),
        ("qwen2.5-7b", Layout("ddp"), 1, ["parallel.optimizer_offload=true", "adapter.rank=256"]),
        ("qwen2.5-7b", Layout("ddp"), 1, ["model.activation_offload=true", "model.gradient_checkpointing=false"]),
        ("qwen2.5-7b", Layout("ddp"), 1, ["rollout.rest=never", "model.gradient_checkpointing=true"]),
        ("gemma-3-1b", Layout("ddp"), 1, ["algorithm.entropy_coef=0.01"]),
        (
            "qwen2.5-32b",
            Layout("ddp"),
            1,
            [*SHORT, "parallel.microbatch_tokens=4096", "rollout.max_concurrent=64"],
        ),
        ("qwen2.5-32b", Layout("shared", 4, 4), 4, ["parallel.strategy=shared"]),
        ("qwen2.5-72b", Layout("shared", 8, 8), 8, ["parallel.strategy=shared"]),
        ("qwen2.5-32b", Layout("shared", 4, 4), 8, ["parallel.strategy=shared", "parallel.shard_size=4"]),
        ("qwen2.5-32b", Layout("fsdp2", 4, 4), 4, ["parallel.strategy=fsdp2"]),
        (
            "qwen2.5-32b",
            Layout("fsdp2", 4, 4, offload=True),
            4,
            ["parallel.strategy=fsdp2", "parallel.param_offload=true", "rollout.memory_fraction=0.5"],
        ),
    ],
)
def test_the_kv_cache_is_what_the_plan_promised(name: str, layout: Layout, gpus: int, keys: list[str], started) -> None:
    held: Memory = started(name, [*keys, f"parallel.gpus={gpus}"])
    config = load(None, [f"model.path={name}", "rollout.engine=vllm", *keys])
    promised = make_plan(demand_of(config)[0], layout, Cluster(H100, gpus)).memory
    assert held.cache.wanted == pytest.approx(promised.cache.wanted, rel=0.01)
    assert held.cache.rests == promised.cache.rests
    assert (held.recompute, held.fits) == (promised.recompute, promised.fits)
    assert held.peak == pytest.approx(promised.peak, rel=0.01)


def test_what_others_hold_is_left_to_them(started) -> None:
    keys = ["rollout.max_concurrent=4096"]
    empty, crowded = started("qwen2.5-7b", keys), started("qwen2.5-7b", keys, H100.memory - 40 * GIB)
    assert crowded.row(OTHERS).training == 40 * GIB
    assert empty.cache.room - crowded.cache.room >= 40 * GIB - (empty.cache.training - crowded.cache.training)
    assert crowded.cache.wanted < empty.cache.wanted
    assert crowded.peak <= crowded.capacity


def test_a_cpu_has_no_other_memory_and_computes_eagerly(started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_memory", lambda device, ranks: (60 * GIB, 64 * GIB))
    cpu = torch.device("cpu")
    plain = started("smollm2-135m", [], device=cpu)
    away = started("smollm2-135m", ["parallel.optimizer_offload=true", "model.activation_offload=true"], device=cpu)
    assert plain.rows == away.rows
    assert plain.row(ENGINE).sampling == 0
    assert plain.row(BASE).sampling == 4 * find_shape("smollm2-135m").parameters, "float32"
    assert 0 < plain.cache.wanted <= CPU_CACHE < started("smollm2-135m", []).cache.wanted
    half = started("smollm2-135m", ["model.dtype=bfloat16"], device=cpu)
    assert half.cache.training > plain.cache.training / 2, "a CPU compiles nothing"


def test_slots_are_of_a_rank_that_vllm_has_and_of_all_linear_layers(started) -> None:
    few = started("qwen2.5-1.5b", ["adapter.rank=24", "adapter.target_modules=[q_proj]"])
    many = started("qwen2.5-1.5b", ["adapter.rank=32"])
    assert few.row(SLOTS) == many.row(SLOTS)
    assert few.row(MASTERS).training < many.row(MASTERS).training


def test_an_adapter_beyond_the_layers_is_counted_on_all_of_them(started) -> None:
    """`lorl plan` refuses names that it does not know; a run has asked the model itself."""
    keys = ["adapter.rank=16"]
    known = started("qwen2.5-1.5b", keys)
    head = started("qwen2.5-1.5b", keys, lora=LoraConfig(r=16, target_modules=["q_proj", "lm_head"]))
    ranks = started(
        "qwen2.5-1.5b", keys, lora=LoraConfig(r=8, rank_pattern={"q_proj": 16}, target_modules="all-linear")
    )
    assert known.rows == head.rows == ranks.rows
