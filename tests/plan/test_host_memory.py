"""What lies in host memory instead of a GPU's: the plan's bytes against what the offloading code holds, on the CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_footprint import DEEP_NARROW, QWEN_LIKE, PeakBytes, base_storages, build, one_tree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig, OptimConfig
from lorl.optim import make_optimizer, optimizer_tensors
from lorl.plan import footprint, host
from lorl.plan.choose import choose, make_plan, smallest_change
from lorl.plan.demand import Demand, demand_of
from lorl.plan.footprint import Pass
from lorl.plan.hardware import GIB, GPUS, Cluster
from lorl.plan.host import MODEL_FILES, OFFLOADED_ACTIVATIONS, OFFLOADED_BASE, OFFLOADED_OPTIMIZER
from lorl.plan.layout import GATHERED_LAYERS, Layout
from lorl.plan.memory import ACTIVATIONS, GATHERED
from lorl.plan.shape import BUILT_IN, Shape
from lorl.policy import activations, shared_memory, streaming
from lorl.policy.load import TRAINED, load_base, load_policy
from lorl.settings import load
from lorl_command import Forks
from training_peak import training_peak_bytes

ONE, EIGHT = Cluster(GPUS["h100"], 1), Cluster(GPUS["h100"], 8)


def run_of(*overrides: str, model: str = "qwen2.5-7b") -> Demand:
    return demand_of(load(None, [f"model.path={model}", *overrides]))[0]


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, which has no other memory."""
    monkeypatch.setattr(host, "pinned", lambda size: size)


def test_pinned_memory_comes_in_powers_of_two() -> None:
    """torch's CachingHostAllocator, unless PYTORCH_ALLOC_CONF says otherwise."""
    assert [host.pinned(size) for size in (0, 1, 1024, 1025, 3 * GIB)] == [0, 1, 1024, 2048, 4 * GIB]


# The base's layers


@pytest.mark.usefixtures("unpinned")
def test_streamed_layers_are_on_the_host_and_two_of_them_on_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Any] = []
    present: list[int] = []

    class Seen(streaming._Weights):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

        def fetch(self) -> None:
            super().fetch()
            present.append(sum(weights._there.size() for weights in made))

    monkeypatch.setattr(streaming, "_Weights", Seen)
    folder = save_tiny_model(tmp_path / "model", "qwen2", num_hidden_layers=6, tie_word_embeddings=False)
    model = ModelConfig(path=str(folder))
    base: Any = load_base(model)
    whole = sum(parameter.nbytes for parameter in base.parameters())
    in_layers = sum(parameter.nbytes for parameter in base.model.layers.parameters())
    streaming.stream_layers(base, torch.device("cpu"))
    policy = load_policy(model, AdapterConfig(rank=4), seed=0, base=base)
    policy.logprobs(one_tree(), adapter=TRAINED).logprobs.sum().backward()

    demand = replace(run_of(model=str(folder)), itemsize=4)
    held = make_plan(demand, Layout("ddp", offload=True), ONE).memory
    assert dict(held.host)[OFFLOADED_BASE] == sum(weights._host.size() for weights in made)
    assert held.row("base").training == held.row("base").sampling == whole - in_layers
    assert held.row(GATHERED).sampling == GATHERED_LAYERS * in_layers // 6
    assert max(present) == pytest.approx(held.row(GATHERED).sampling, rel=0.01)  # rounded up to what torch aligns to


def test_each_rank_has_a_host_copy_of_streamed_layers_and_a_share_of_sharded_ones() -> None:
    demand = run_of()
    layers_bytes = demand.shape.layers * demand.shape.layer_parameters * 2
    copies = {
        kind: dict(make_plan(demand, Layout(kind, shard, offload=True), EIGHT).memory.host)[OFFLOADED_BASE]
        for kind, shard in (("ddp", 1), ("fsdp2", 8), ("fsdp", 8))
    }
    assert 8 * layers_bytes <= copies["ddp"] < 8 * layers_bytes * 1.2
    assert layers_bytes <= copies["fsdp2"] < layers_bytes * 2, "each parameter is pinned by itself"
    assert copies["fsdp"] == pytest.approx(2 * copies["ddp"] / 8, rel=0.01)  # torch pins a gradient beside each part


def test_a_base_that_is_to_lie_on_the_host_is_planned_there() -> None:
    """`parallel.strategy=auto` and `lorl plan` ask the same function."""
    plan = choose(run_of("parallel.param_offload=true"), ONE)
    assert plan is not None
    assert (plan.layout, plan.demand.engine) == (Layout("ddp", offload=True), "torch")
    assert choose(run_of("parallel.param_offload=true"), EIGHT, "shared") is None
    kept, away = (choose(run_of(*keys), ONE) for keys in ([], ["parallel.param_offload=true", "rollout.engine=torch"]))
    assert kept is not None
    assert away is not None
    assert away.memory.row("base").training < kept.memory.row("base").training / 4
    assert away.seconds > 5 * kept.seconds, "every token waits for all layers to come over PCIe"
    assert {phase.phase: phase.bound for phase in away.phases}["rollout"] == "PCIe"


def test_nobody_gets_streamed_layers_unasked_but_they_are_offered_where_nothing_else_helps() -> None:
    demand = run_of(model="qwen2.5-72b")
    plan = choose(demand, ONE)
    assert plan is not None
    assert not plan.fits
    change = smallest_change(demand, ONE, None, None)
    assert change is not None
    assert change.settings == ("parallel.param_offload=true",)
    assert change.plan.layout == Layout("ddp", offload=True)
    two = Cluster(GPUS["h100"], 2)
    named = smallest_change(replace(demand, engine="torch"), two, "shared", False)
    assert named is not None, "the parts of a shared base can't go anywhere, those of fsdp2 can"
    assert named.settings == ("parallel.strategy=fsdp2", "parallel.param_offload=true")


# The optimizer


@pytest.mark.usefixtures("unpinned")
def test_an_optimizer_on_the_host_is_on_the_gpu_for_its_step_alone() -> None:
    policy, shape, lora = build("qwen2", QWEN_LIKE, rank=8, recompute=False, targets="all-linear", dtype=torch.float32)
    parameters = policy.parameters(TRAINED)
    optimizer = make_optimizer(parameters, OptimConfig(), hosted=True)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [t for name, t in optimizer_tensors(optimizer, list(parameters)).items() if not name.endswith("/step")]
    demand = replace(run_of("algorithm.advantage=gae"), shape=shape, lora=lora, critic=lora)
    assert host.optimizer_bytes(lora) == sum(tensor.nbytes for tensor in moments)

    kept, away = (
        make_plan(replace(demand, optimizer_offload=hosted), Layout("ddp"), EIGHT).memory for hosted in (False, True)
    )
    both = 2 * host.optimizer_bytes(lora)  # the policy's and the critic's
    assert (kept.row("optimizer").sampling, away.row("optimizer").sampling) == (both, 0)
    assert away.training == kept.training - both, "activations take more than a step's moments"
    assert dict(away.host)[OFFLOADED_OPTIMIZER] == 8 * both
    short = replace(demand, optimizer_offload=True, microbatch_tokens=1, prompts=1, samples=1, longest_response=1)
    few = make_plan(replace(short, longest_prompt=1), Layout("ddp"), EIGHT).memory
    assert few.row("optimizer").training == host.optimizer_bytes(lora), "one adapter's at a time"
    assert few.row(ACTIVATIONS).training == 0


def test_moments_that_come_and_go_take_their_time() -> None:
    kept, away = (choose(run_of("adapter.rank=512", *keys), ONE) for keys in ([], ["parallel.optimizer_offload=true"]))
    assert kept is not None
    assert away is not None
    moved = 2 * 8 * kept.demand.lora.parameters / (0.8 * ONE.gpu.pcie)
    assert away.seconds - kept.seconds == pytest.approx(moved * kept.demand.minibatches, rel=1e-6)


# Activations


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("model_type", "sizes"), [("qwen2", QWEN_LIKE), ("llama", DEEP_NARROW)])
def test_activations_that_leave_are_those_that_the_plan_says(
    model_type: str, sizes: dict[str, Any], recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the peak of what is on the device, for which a copy in host memory is out of sight."""
    how = {"recompute": recompute, "targets": "all-linear", "dtype": torch.float32, "offload": True}
    policy, shape, lora = build(model_type, sizes, rank=8, **how)
    sent: list[int] = []

    def send(tensor: Tensor) -> Any:
        with _disable_current_modes():
            away = activations._Away(tensor.clone(), tensor.device, None)
        sent.append(away.host.nbytes)
        return away

    monkeypatch.setattr(activations, "_send", send)
    monkeypatch.setattr(activations, "_fetch", lambda kept: kept if isinstance(kept, Tensor) else kept.host.clone())
    forest = one_tree()
    tokens, targets = forest.tokens.numel(), forest.distinct()[0].numel()
    with PeakBytes(base_storages(policy)) as seen:
        policy.logprobs(forest, adapter=TRAINED).logprobs.sum().backward()
    demand = replace(run_of(), shape=shape, lora=lora, itemsize=4)
    passes = Pass(4, eager=True, recompute=recompute, away=True, span=tokens)
    assert host.activation_bytes(demand, passes, tokens) == pytest.approx(sum(sent), rel=0.1)
    assert footprint.away_bytes(shape, lora, tokens, passes) == pytest.approx(sum(sent), rel=0.1)
    peak = training_peak_bytes(shape, lora, tokens, targets, passes, "cpu")
    assert 0.7 * peak < seen.peak < 1.1 * peak  # a copy is there at once; on a GPU another layer's may be on its way


def test_layers_are_recomputed_where_their_activations_would_not_fit_the_gpu_wherever_they_go() -> None:
    """As `lorl.policy.layers` decides it."""
    for model, recompute in (("qwen2.5-1.5b", False), ("qwen2.5-32b", True)):
        demand = run_of("model.activation_offload=true", "parallel.microbatch_tokens=2048", model=model)
        kept = make_plan(replace(demand, activation_offload=False), Layout("ddp"), ONE)
        away = make_plan(demand, Layout("ddp"), ONE)
        assert kept.memory.recompute == away.memory.recompute == recompute
        assert away.memory.row(ACTIVATIONS).training < kept.memory.row(ACTIVATIONS).training
        assert dict(away.memory.host)[OFFLOADED_ACTIVATIONS] > 0
        assert away.seconds > kept.seconds


@pytest.mark.parametrize(
    ("gib", "keys", "setting"),
    [
        (20.2, ["adapter.rank=64", "parallel.microbatch_tokens=512"], "parallel.optimizer_offload=true"),
        (
            21.2,
            ["rollout.max_response_tokens=8192", "parallel.optimizer_offload=true"],
            "model.activation_offload=true",
        ),
    ],
)
def test_what_may_wait_on_the_host_is_offered_before_the_base(gib: float, keys: list[str], setting: str) -> None:
    strict = ["model.gradient_checkpointing=true", "rollout.rest=always", "data.max_prompt_tokens=256"]
    small = Cluster(replace(GPUS["h100"], memory=int(gib * GIB)), 1)
    for overrides, change in (([], (setting,)), ([setting], None)):
        demand = run_of(*strict, *keys, *overrides)
        plan = choose(demand, small, "ddp", False)
        assert plan is not None
        assert plan.fits == (change is None)
        if change:
            found = smallest_change(demand, small, "ddp", False)
            assert found is not None
            assert found.settings == change


# The model's files


def test_a_nodes_copy_of_the_models_files_is_as_large_as_the_one_that_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, copies = save_tiny_model(tmp_path / "model"), tmp_path / "shm"
    copies.mkdir()
    monkeypatch.setattr(shared_memory, "ROOT", copies)
    monkeypatch.setattr(shared_memory, "_leave_remover", lambda copy: None)
    copy = shared_memory.shared(folder)
    demand = run_of("model.use_shm=true", model=str(folder))
    made = sum(file.stat().st_size for file in copy.iterdir() if file.name != shared_memory._MANIFEST)
    held = make_plan(demand, Layout("ddp"), EIGHT).memory
    assert dict(held.host)[MODEL_FILES] == demand.shm_files == made
    assert run_of("model.use_shm=true", "model.random_weights=true", model=str(folder)).shm_files == 0


def test_files_that_are_not_at_hand_are_taken_for_bfloat16_and_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BUILT_IN["qwen2.5-7b"]))
    for path in (tmp_path, "qwen2.5-7b"):
        demand, notes = demand_of(load(None, [f"model.path={path}", "model.use_shm=true"]))
        assert demand.shm_files == 2 * Shape.of(BUILT_IN["qwen2.5-7b"]).parameters
        assert any("model.use_shm" in note for note in notes)


# The command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--strategy", "shared"), "--strategy shared keeps the base where the engine reads it"),
        (("--strategy", "ddp", "rollout.engine=vllm"), "rollout.engine=vllm reads the base on the device"),
        (("rollout.engine=vllm", "--gpus", "1"), "rollout.engine=vllm reads the base on the device"),
        (("adapter.dora=true",), "adapter.dora=true reads whole weights"),
        (("--strategy", "fsdp2", "--gpus", "1"), "--strategy fsdp2 spreads the base over several GPUs"),
    ],
)
def test_what_does_not_go_with_a_base_on_the_host_is_refused(
    forks: Forks, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    common = ("model.path=qwen2.5-7b", "parallel.param_offload=true")
    result = forks.run("plan", *common, *(words if "--gpus" in words else (*words, "--gpus", "2")), cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_the_tables_show_what_lies_on_the_host(forks: Forks, tmp_path: Path) -> None:
    keys = ("parallel.param_offload=true", "parallel.optimizer_offload=true", "model.activation_offload=true")
    result = forks.run("plan", "model.path=qwen2.5-7b", "model.use_shm=true", *keys, cwd=tmp_path)
    assert result.code == 0, result.err
    offloaded = (MODEL_FILES, OFFLOADED_BASE, OFFLOADED_OPTIMIZER, OFFLOADED_ACTIVATIONS)
    for said in (*offloaded, "ddp, offloaded", "the embedded engine samples"):
        assert said in result.out
