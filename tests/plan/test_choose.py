"""Which strategy a plan takes, what it says of one that does not fit, and that bytes add up."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorl.plan.choose import Plan, choose, make_plan, smallest_change
from lorl.plan.demand import Demand, Engine, demand_of
from lorl.plan.hardware import GIB, GPUS, Cluster
from lorl.plan.layout import STRATEGIES, Layout, Strategy, layouts, vllm_sizes
from lorl.plan.memory import ACTIVATIONS, FOLD
from lorl.settings import load

EIGHT = Cluster(replace(GPUS["h100"], memory=80 * 10**9), 8)


def run_of(*overrides: str) -> Demand:
    return demand_of(load(None, list(overrides)))[0]


def chosen(demand: Demand, cluster: Cluster, strategy: Strategy | None = None) -> Plan:
    plan = choose(demand, cluster, strategy, None if strategy is None else False)
    assert plan is not None
    return plan


def test_a_small_model_is_whole_on_each_gpu() -> None:
    plan = chosen(run_of("model.path=qwen2.5-1.5b"), EIGHT)
    assert plan.layout == Layout("ddp")
    assert plan.fits


def test_72b_on_eight_gpus_shares_the_engines_shards() -> None:
    demand = run_of("model.path=qwen2.5-72b")
    plan = chosen(demand, EIGHT)
    assert plan.layout == Layout("shared", 8, 8)
    assert plan.fits
    assert plan.memory.row("base").training / 1e9 == pytest.approx(18.2, abs=0.1)
    assert plan.memory.row("engine's own copy of the base").training == 0
    assert not chosen(demand, EIGHT, "ddp").fits


def test_plain_fsdp2_has_eighths_of_the_layers_beside_the_engines_eighth_of_all() -> None:
    demand = run_of("model.path=qwen2.5-72b")
    whole = make_plan(demand, Layout("ddp"), EIGHT).memory.row("base").sampling
    ends = 2 * (2 * 152_064 * 8192 + 8192)  # embeddings, head and last norm, in bfloat16
    held = make_plan(demand, Layout("fsdp2", 8, 8), EIGHT).memory
    assert held.row("engine's own copy of the base").sampling == pytest.approx(whole / 8, rel=1e-9)
    assert held.row("base").sampling == pytest.approx(ends + (whole - ends) / 8, rel=1e-9)
    offloaded = make_plan(demand, Layout("fsdp2", 8, 8, offload=True), EIGHT).memory
    assert offloaded.row("base").training == ends
    assert whole - ends < dict(offloaded.host)["offloaded base"] < 1.1 * (whole - ends)  # pinned: powers of two


def test_the_embedded_engine_reads_the_trainers_parts() -> None:
    held = make_plan(replace(run_of("model.path=qwen2.5-72b"), engine="torch"), Layout("fsdp2", 8), EIGHT).memory
    assert held.row("engine's own copy of the base").sampling == 0


def test_only_layouts_with_an_engine_are_chosen() -> None:
    demand = run_of("model.path=qwen2.5-72b")
    plan = choose(demand, EIGHT, engine_on=lambda layout: "torch" if layout == Layout("fsdp", 8, 1) else None)
    assert plan is not None
    assert (plan.layout, plan.demand.engine) == (Layout("fsdp", 8, 1), "torch")
    assert choose(demand, EIGHT, engine_on=lambda _: None) is None


def test_the_embedded_engine_samples_on_gpus_only_where_nothing_fits_with_vllm() -> None:
    demand, two = run_of("model.path=qwen2.5-7b", "data.prompts_per_step=128"), Cluster(GPUS["h100"], 2)

    def engine_on(layout: Layout) -> Engine | None:
        return "vllm" if layout.samples_with("vllm") else "torch" if layout.strategy != "shared" else None

    plan = choose(demand, two, engine_on=engine_on)
    assert plan is not None
    assert plan.demand.engine == "vllm"
    only = choose(demand, two, engine_on=lambda layout: "torch" if layout.samples_with("torch") else None)
    assert only is not None
    assert only.demand.engine == "torch"


def test_the_fastest_that_fits_is_chosen() -> None:
    demand = run_of("model.path=qwen2.5-14b")
    plan = chosen(demand, EIGHT)
    others = [make_plan(demand, layout, EIGHT) for layout in layouts(demand.shape, EIGHT)]
    assert plan.fits
    assert all(plan.seconds <= 1.05 * other.seconds for other in others if other.fits)


def test_layers_are_recomputed_only_where_keeping_them_does_not_fit() -> None:
    assert not chosen(run_of("model.path=qwen2.5-1.5b"), EIGHT).memory.recompute
    plan = chosen(run_of("model.path=qwen2.5-72b"), EIGHT)
    assert plan.memory.recompute
    assert plan.memory.row(ACTIVATIONS).training == plan.memory.with_recompute < plan.memory.without_recompute


ONE = Cluster(GPUS["h100"], 1)
CASES: list[tuple[list[str], Cluster, Strategy | None, tuple[str, ...]]] = [
    (
        ["model.path=qwen2.5-7b", "model.gradient_checkpointing=false", "parallel.microbatch_tokens=16384"],
        ONE,
        "ddp",
        ("parallel.microbatch_tokens=8192",),
    ),
    (
        [
            "model.path=qwen2.5-32b",
            "model.gradient_checkpointing=false",
            "parallel.microbatch_tokens=1536",
            "rollout.memory_fraction=0.02",
            "rollout.adapter_slots=1",
        ],
        ONE,
        "ddp",
        ("model.gradient_checkpointing=true",),
    ),
    (
        [
            "model.path=qwen2.5-7b",
            "model.gradient_checkpointing=true",
            "parallel.microbatch_tokens=2048",
            "rollout.memory_fraction=0.74",
            "rollout.rest=never",
        ],
        ONE,
        "ddp",
        ("rollout.rest=always",),
    ),
    (["model.path=qwen2.5-7b", "rollout.memory_fraction=0.9"], ONE, "ddp", ("rollout.memory_fraction=0.7",)),
    (["model.path=qwen2.5-72b"], EIGHT, "ddp", ("parallel.strategy=fsdp2",)),
]


@pytest.mark.parametrize(("overrides", "cluster", "strategy", "named"), CASES, ids=lambda case: str(case)[:40])
def test_the_first_setting_that_helps_is_named(
    overrides: list[str], cluster: Cluster, strategy: Strategy | None, named: tuple[str, ...]
) -> None:
    demand = run_of(*overrides)
    assert not chosen(demand, cluster, strategy).fits
    change = smallest_change(demand, cluster, strategy, False)
    assert change is not None
    assert change.settings == named
    assert change.plan.fits


def test_a_named_setting_of_the_configuration_works_when_it_is_set() -> None:
    for overrides, cluster, strategy, named in CASES:
        if not named[0].startswith("parallel.strategy"):
            assert chosen(run_of(*overrides, *named), cluster, strategy).fits


def test_changes_are_combined_where_none_is_enough() -> None:
    overrides = [
        "model.path=qwen2.5-32b",
        "model.gradient_checkpointing=false",
        "rollout.memory_fraction=0.3",
        "rollout.rest=never",
        "data.max_prompt_tokens=512",
    ]
    demand = run_of(*overrides)
    assert not chosen(demand, ONE, "ddp").fits
    change = smallest_change(demand, ONE, "ddp", False)
    assert change is not None
    assert change.plan.fits
    assert len(change.settings) > 1
    for left_out in change.settings:
        rest = [setting for setting in change.settings if setting != left_out]
        assert not chosen(run_of(*overrides, *rest), ONE, "ddp").fits
    assert chosen(run_of(*overrides, *change.settings), ONE, "ddp").fits


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["model.path=qwen2.5-7b", "rollout.memory_fraction=0.01", "rollout.max_response_tokens=31000"],
            ("rollout.memory_fraction=null",),
        ),
        (
            ["model.path=qwen2.5-32b", "rollout.memory_fraction=0.3", "rollout.max_response_tokens=8192"],
            ("rollout.memory_fraction=0.1", "parallel.optimizer_offload=true"),
        ),
    ],
    ids=["holds no sample", "the smallest would hold none"],
)
def test_a_fraction_is_changed_to_one_that_holds_a_sample(overrides: list[str], named: tuple[str, ...]) -> None:
    demand = run_of(*overrides)
    held = chosen(demand, ONE, "ddp").memory
    assert held.shortage > 0
    change = smallest_change(demand, ONE, "ddp", False)
    assert change is not None
    assert change.settings == named
    assert change.plan.fits


@pytest.mark.parametrize("concurrent", [32, 64, 128, 192, 256, 320, 512])
def test_a_cache_rests_where_activations_can_then_be_kept(concurrent: int) -> None:
    keys = ["model.path=qwen2.5-7b", "data.prompts_per_step=128", "rollout.n=8", "rollout.max_response_tokens=1024"]
    auto, always = (
        make_plan(run_of(*keys, f"rollout.max_concurrent={concurrent}", f"rollout.rest={rest}"), Layout("ddp"), ONE)
        for rest in ("auto", "always")
    )
    assert not auto.memory.recompute
    assert auto.seconds == always.seconds
    assert auto.memory.cache.rests == (concurrent >= 192)


def test_a_fold_has_room_of_its_own_where_it_is_asked_for_and_is_left_where_there_is_none() -> None:
    h100 = Cluster(GPUS["h100"], 1)
    keys = ["rollout.memory_fraction=null", "data.prompts_per_step=8", "rollout.n=8", "parallel.microbatch_tokens=4096"]
    small = make_plan(run_of("model.path=qwen2.5-1.5b", *keys), Layout("ddp"), h100).memory
    assert small.can_fold
    assert small.row(FOLD).sampling == 0  # the run may, and that there is room is all it needs
    large = make_plan(run_of("model.path=qwen2.5-32b", *keys), Layout("ddp"), h100).memory
    assert large.fits
    assert not large.can_fold
    folding = run_of("model.path=qwen2.5-32b", "rollout.adapter_mode=fold", *keys)
    asked = make_plan(folding, Layout("ddp"), h100).memory
    change = smallest_change(folding, h100, None, None)
    assert change is not None
    assert change.settings == ("rollout.adapter_mode=adapter",)
    assert asked.can_fold
    assert asked.row(FOLD).sampling == asked.fold > 8 * GIB
    assert asked.row(FOLD).training == 0
    assert asked.cache.most == large.cache.most - asked.fold


def test_a_cache_beside_folds_rests_where_activations_can_then_be_kept() -> None:
    keys = ["model.path=qwen2.5-7b", "data.prompts_per_step=128", "rollout.n=8", "rollout.max_response_tokens=1024"]
    keys += ["rollout.max_concurrent=64", "rollout.adapter_mode=fold"]
    cluster = Cluster(replace(GPUS["h100"], memory=70 * GIB), 1)
    held = make_plan(run_of(*keys), Layout("ddp"), cluster).memory
    assert held.cache.rests
    assert not held.recompute


def test_a_base_in_parts_is_advised_without_the_fold_that_it_refuses() -> None:
    change = smallest_change(run_of("model.path=qwen2.5-72b", "rollout.adapter_mode=fold"), EIGHT, "ddp", False)
    assert change is not None
    assert change.settings == ("parallel.strategy=fsdp2", "rollout.adapter_mode=adapter")


def test_what_nothing_helps_is_said() -> None:
    small = Cluster(replace(GPUS["h100"], memory=8 * GIB), 1)
    assert smallest_change(run_of("model.path=qwen2.5-72b"), small, None, None) is None


def without_cache(plan: Plan) -> int:
    return plan.memory.training - plan.memory.row("KV cache").training


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(["qwen2.5-0.5b", "qwen2.5-7b", "llama-3.1-70b", "gemma-3-1b"]),
    strategy=st.sampled_from(STRATEGIES),
    tokens=st.sampled_from([2048, 8192, 32_768]),
    gigabytes=st.integers(16, 200),
    gpus=st.sampled_from([2, 4, 8]),
    nodes=st.integers(1, 4),
)
def test_bytes_add_up_and_more_of_anything_never_takes_less(
    model: str, strategy: Strategy, tokens: int, gigabytes: int, gpus: int, nodes: int
) -> None:
    demand = run_of(f"model.path={model}", f"parallel.microbatch_tokens={tokens}", "data.prompts_per_step=1024")
    cluster = Cluster(replace(GPUS["h100"], memory=gigabytes * 10**9), gpus, nodes)
    for layout in layouts(demand.shape, cluster, strategy):
        plan = make_plan(demand, layout, cluster)
        held = plan.memory
        assert all(row.sampling >= 0 and row.training >= 0 for row in held.rows if row.holder != "KV cache")
        assert held.sampling == sum(row.sampling for row in held.rows)
        assert held.fits == (held.shortage <= 0 and held.has_cache)
        assert all(phase.seconds > 0 for phase in plan.phases)
        larger = make_plan(replace(demand, microbatch_tokens=2 * tokens, recompute=held.recompute), layout, cluster)
        assert without_cache(larger) >= without_cache(plan)


def test_ranks_that_split_a_pass_hold_a_share_of_a_long_sample() -> None:
    keys = ["model.path=qwen2.5-7b", "data.max_prompt_tokens=1024", "rollout.max_response_tokens=64512"]
    whole, split = (run_of(*keys, f"parallel.sequence={ranks}") for ranks in (1, 4))
    assert (whole.microbatch(8), split.microbatch(8)) == (65536, 16384)
    held, shared = (make_plan(demand, Layout("ddp"), EIGHT).memory.row(ACTIVATIONS) for demand in (whole, split))
    assert shared.training < held.training / 3


def test_ranks_that_split_a_pass_wait_for_what_they_send_each_other() -> None:
    demand = run_of("model.path=qwen2.5-7b", "parallel.sequence=4")
    slow = replace(EIGHT, gpu=replace(EIGHT.gpu, nvlink=2e9))
    fast, waiting = (make_plan(demand, Layout("ddp"), cluster).phases for cluster in (EIGHT, slow))
    bound, seconds = ({phase.phase: getattr(phase, name) for phase in waiting} for name in ("bound", "seconds"))
    assert bound["update"] == "links"
    assert seconds["update"] > 2 * next(phase.seconds for phase in fast if phase.phase == "update")
    assert seconds["rollout"] == next(phase.seconds for phase in fast if phase.phase == "rollout")


def test_ranks_that_split_a_pass_sample_with_the_embedded_engine() -> None:
    """Under a named strategy too: the plan is of the engine that the run takes."""
    plan = chosen(run_of("model.path=qwen2.5-7b", "parallel.sequence=2"), EIGHT, "fsdp2")
    assert (plan.demand.engine, plan.layout) == ("torch", Layout("fsdp2", 8))


def test_the_objective_decides_which_passes_there_are() -> None:
    on_policy = run_of("model.path=qwen2.5-7b")
    assert on_policy.scorings == 0
    assert [phase.phase for phase in chosen(on_policy, EIGHT).phases] == ["rollout", "update", "publish"]
    anchored = run_of("model.path=qwen2.5-7b", "algorithm.kl_coef=0.01", "algorithm.epochs=2")
    assert anchored.scorings == 2
    ppo = run_of("model.path=qwen2.5-7b", "algorithm.advantage=gae")
    assert (ppo.learning, ppo.scorings) == ((ppo.lora, ppo.lora), 1)
    seconds = {phase.phase: phase.seconds for phase in chosen(ppo, EIGHT).phases}
    assert seconds["update"] > 1.9 * next(p.seconds for p in chosen(on_policy, EIGHT).phases if p.phase == "update")


def test_a_lone_gpu_has_nobody_to_share_with() -> None:
    assert choose(run_of("model.path=qwen2.5-7b"), ONE, "shared") is None


def test_a_named_strategy_spreads_over_nodes_as_its_run_does() -> None:
    nodes = Cluster(EIGHT.gpu, 8, nodes=2)
    big = run_of("model.path=qwen2.5-72b", "rollout.engine=vllm")
    named = choose(big, nodes, "fsdp2", False)
    assert named is not None
    assert named.layout == Layout("fsdp2", 16, 16)
    change = smallest_change(big, nodes, "ddp", False)
    assert change is not None
    assert change.settings == ("parallel.strategy=fsdp2",)
    assert choose(run_of("model.path=qwen2.5-7b"), nodes, "fsdp2", False) is None, "16 ranks cannot share 28 heads"


def test_a_base_is_spread_over_as_many_gpus_as_one_vllm_can_be_of() -> None:
    """28 heads are no 8 equal shares, and a run that names its strategy alone spreads over all 8."""
    demand, small = run_of("model.path=qwen2.5-7b"), replace(EIGHT, gpu=replace(EIGHT.gpu, memory=18 * GIB))
    change = smallest_change(demand, small, "ddp", False)
    assert change is not None
    assert change.settings == ("parallel.strategy=fsdp2", "parallel.shard_size=4")
    assert change.plan.layout == Layout("fsdp2", 4, 4)
    assert change.plan.fits


def test_what_vllm_cannot_deal_out_is_no_layout() -> None:
    shape = replace(run_of("model.path=qwen2.5-7b").shape, heads=12, kv_heads=3, ffn=1536, vocabulary=49_152)
    assert vllm_sizes(shape, replace(EIGHT, gpus=4)) == [1], "neither 2 nor 4 ranks share 3 heads of keys"
    assert vllm_sizes(shape, replace(EIGHT, gpus=6)) == [1, 3, 6]
    assert vllm_sizes(replace(shape, vocabulary=151_936), replace(EIGHT, gpus=6)) == [1], "rows of its vocabulary"
