"""The plan beside what was seen on GPUs: memory within 10%, and the seconds it was calibrated with within a tenth."""

from pathlib import Path
from typing import Literal

import pytest

from lorl.plan import footprint, measured
from lorl.plan.choose import make_plan
from lorl.plan.demand import Demand, demand_of, with_mean_lengths
from lorl.plan.footprint import Pass
from lorl.plan.hardware import GIB, GPUS, Cluster
from lorl.plan.layout import Layout
from lorl.plan.lora import lora_on
from lorl.plan.memory import GRADIENTS, MASTERS, OPTIMIZER
from lorl.plan.seconds import training_operations, training_share
from lorl.plan.shape import find_shape
from lorl.settings import load
from training_peak import training_peak_bytes

SHAPE = find_shape("qwen2.5-1.5b")
LORA = lora_on(SHAPE, 32, "all-linear")
ONE = Cluster(GPUS["h100"], 1)


def run_of(*overrides: str) -> Demand:
    return demand_of(load(None, ["model.path=qwen2.5-1.5b", *overrides]))[0]


@pytest.mark.parametrize(
    ("tokens", "eager", "recompute", "gib"),  # docs/performance.md, "The training pass on the GPU": 256 + 512 x 8
    [
        (4352, False, False, 12.4),
        (8704, False, False, 20.8),
        (17_408, False, False, 37.6),
        (8704, False, True, 4.7),
        (8704, True, False, 26.5),
        (17_408, True, False, 48.8),
    ],
)
def test_training_passes(tokens: int, eager: bool, recompute: bool, gib: float) -> None:
    how = Pass(2, eager=eager, recompute=recompute)
    held = training_peak_bytes(SHAPE, LORA, tokens, tokens * 16 // 17, how, "cuda")
    base, adapter = SHAPE.parameters * 2, LORA.parameters * (footprint.MASTER_BYTES + footprint.GRADIENT_BYTES)
    assert (held + base + adapter) / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_plan_counts_such_a_pass(recompute: bool) -> None:
    """What a run leaves to training is the peak that the other tests hold to what is seen."""
    demand = run_of("parallel.microbatch_tokens=4352", f"model.gradient_checkpointing={recompute}", "rollout.n=16")
    how = demand.passes_as(4352, recompute=recompute)
    peak = training_peak_bytes(SHAPE, LORA, 4352, 4352, how, "cuda")
    assert make_plan(demand, Layout("ddp"), ONE).memory.cache.training == peak


def test_ppo_takes_what_two_more_adapters_take(tmp_path: Path) -> None:
    """docs/performance.md, "One base for everything": 22.5 GiB with critic and reward model, 21.8 without."""
    (tmp_path / "adapter_config.json").write_text('{"r": 32, "target_modules": "all-linear"}')

    def adapters(*words: str) -> int:
        held = make_plan(run_of(*words), Layout("ddp"), ONE).memory
        return sum(held.row(holder).training for holder in (MASTERS, GRADIENTS, OPTIMIZER))

    ppo = adapters("algorithm.advantage=gae", f"reward_model.path={tmp_path}")
    assert (ppo - adapters()) / GIB == pytest.approx(22.5 - 21.8, abs=0.1)


def test_an_engine_with_the_largest_cache_it_takes_by_itself() -> None:
    """vLLM at 1.5B beside an idle policy took 36.61 GiB, 0.4 of the device's 79.1 for its cache."""
    held = make_plan(run_of("rollout.memory_fraction=0.4"), Layout("ddp"), ONE).memory
    engine = ("base", "engine's adapter slots", "engine's graphs and buffers", "KV cache")
    assert sum(held.row(holder).sampling for holder in engine) / GIB == pytest.approx(36.61, rel=0.1)


def test_a_whole_step() -> None:
    """docs/performance.md, "A whole GRPO step on the GPU": torch held 38.8 GiB, 0.4 of the device in the KV cache."""
    keys = ["data.prompts_per_step=32", "data.max_prompt_tokens=264", "rollout.max_response_tokens=512", "rollout.n=8"]
    demand = run_of(*keys, "parallel.microbatch_tokens=17408", "rollout.memory_fraction=0.4")
    held = make_plan(demand, Layout("ddp"), ONE).memory
    ours = held.training - held.row("CUDA, NCCL, fragmentation").training
    assert ours / GIB == pytest.approx(38.8, rel=0.1)


def test_passes_take_the_time_that_they_were_calibrated_with() -> None:
    demand = with_mean_lengths(run_of(), 256, 512)
    for tokens, gradient, rate, share in (
        (17_408, True, 50_536, training_share(1536)),
        (17_408, False, 96_000, measured.SCORING_SHARE),
    ):
        operations = tokens * training_operations(demand, gradient=gradient, recompute=False)
        assert operations / (share * ONE.gpu.flops) == pytest.approx(tokens / rate, rel=0.05)
    assert pytest.approx(4352 / 23_556, rel=0.01) == 28 * measured.PASS_SECONDS_A_LAYER


def test_a_rollout_takes_the_time_that_it_was_calibrated_with() -> None:
    """docs/performance.md, "vLLM on the trainer's weights": 30,860 tokens/s at batch 256, 256 + 512 tokens."""
    demand = run_of("data.prompts_per_step=32", "rollout.n=8", "rollout.max_response_tokens=512")
    plan = make_plan(with_mean_lengths(demand, 256, 512), Layout("ddp"), ONE)
    seconds = {phase.phase: phase.seconds for phase in plan.phases}
    assert seconds["rollout"] == pytest.approx(256 * 512 / 30_860, rel=0.05)
    assert seconds["publish"] == pytest.approx(0.204, rel=0.01)


LENGTHS = ("data.max_prompt_tokens=264", "rollout.max_response_tokens=512", "rollout.ignore_eos=true")


@pytest.mark.parametrize(
    ("model", "keys", "gib", "rollout", "update"),  # docs/performance.md, "The plan beside what was measured"
    [
        (
            "qwen2.5-7b",
            ["data.prompts_per_step=8", "rollout.max_concurrent=64", "parallel.microbatch_tokens=8704"],
            57.5,
            4.64,
            2.17,
        ),
        (
            "qwen2.5-32b",
            ["data.prompts_per_step=8", "rollout.max_concurrent=64", "parallel.microbatch_tokens=4096"],
            77.3,
            18.6,
            14.0,
        ),
    ],
)
def test_whole_runs_of_one_gpu(model: str, keys: list[str], gib: float, rollout: float, update: float) -> None:
    demand = run_of(f"model.path={model}", "rollout.n=8", *LENGTHS, *keys)
    plan = make_plan(with_mean_lengths(demand, 256, 512), Layout("ddp"), ONE)
    seconds = {phase.phase: phase.seconds for phase in plan.phases}
    assert plan.memory.peak / GIB == pytest.approx(gib, rel=0.05)
    assert seconds["rollout"] == pytest.approx(rollout, rel=0.1)
    assert seconds["update"] == pytest.approx(update, rel=0.1)


@pytest.mark.parametrize(
    ("model", "prompts", "tokens", "gib"),  # docs/performance.md, the same place
    [
        ("qwen2.5-1.5b", 32, 17_408, 45.7),
        ("qwen2.5-1.5b", 32, 8192, 27.4),
        ("qwen2.5-7b", 8, 8192, 54.9),
    ],
)
def test_memory_in_use_is_what_was_planned(model: str, prompts: int, tokens: int, gib: float) -> None:
    keys = [f"data.prompts_per_step={prompts}", f"rollout.max_concurrent={8 * prompts}"]
    demand = run_of(f"model.path={model}", "rollout.n=8", *LENGTHS, *keys, f"parallel.microbatch_tokens={tokens}")
    assert make_plan(demand, Layout("ddp"), ONE).memory.peak / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(
    ("strategy", "gib", "rollout", "update"), [("shared", 67.0, 18.5, 18.7), ("fsdp2", 84.3, 19.3, 18.1)]
)
def test_whole_runs_of_four_gpus(
    strategy: Literal["shared", "fsdp2"], gib: float, rollout: float, update: float
) -> None:
    """docs/performance.md, "32B on four GPUs"."""
    keys = ["data.prompts_per_step=64", "rollout.n=5", "rollout.max_concurrent=320", "rollout.memory_fraction=0.25"]
    reference = ["parallel.optimizer_offload=true", "rollout.max_batched_tokens=1536"]
    demand = run_of("model.path=qwen2.5-32b", *LENGTHS, *keys, *reference)
    four = Cluster(GPUS["h200"], 4)
    plan = make_plan(with_mean_lengths(demand, 256, 512), Layout(strategy, 4, 4), four)
    seconds = {phase.phase: phase.seconds for phase in plan.phases}
    assert plan.memory.peak / GIB == pytest.approx(gib, rel=0.05)
    assert seconds["rollout"] == pytest.approx(rollout, rel=0.1)
    assert seconds["update"] == pytest.approx(update, rel=0.1)


def test_a_pass_that_recomputes_its_layers_takes_as_much_longer_as_it_did() -> None:
    """docs/performance.md: 335 ms instead of 218 for 8,704 tokens."""
    demand = with_mean_lengths(run_of(), 256, 512)
    kept, again = (training_operations(demand, gradient=True, recompute=recompute) for recompute in (False, True))
    assert again / kept == pytest.approx(335 / 218, rel=0.15)
