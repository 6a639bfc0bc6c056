"""parallel.strategy=auto: the layout that the plan takes for a run, among those that the run can be started with.

    GPUs            the simplest layout that fits their memory and is about as fast as the fastest (`lorl.plan.choose`)
    CPU processes   ddp, unless a node's ranks need more memory together than is free there: then the first that fits

Which layouts there are is asked of the schema, of `check_combination` and of what vLLM says of its kernels, so
that a strategy that they learn is chosen here as well.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from lorl.config import ParallelConfig, RunConfig
from lorl.errors import UserError
from lorl.parallel.combinations import check_combination
from lorl.plan.choose import ABOUT, Plan, choose, make_plan
from lorl.plan.demand import Demand, Engine, demand_of
from lorl.plan.hardware import GIB, Cluster, described_gpu
from lorl.plan.layout import Layout
from lorl.plan.shape import Shape
from lorl.policy.load import load_shape, pick_device, pick_dtype
from lorl.rollout.vllm import launch, versions

PLANNED: tuple[Engine, ...] = ("vllm", "torch")  # rollout.engine=auto: the first that a layout works with


@dataclass(frozen=True, slots=True)
class Device:
    """What one rank's part of a run has to fit."""

    gpu: str | None  # its name; None: a CPU process
    memory: int  # bytes: the GPU's, or of what is free on the node this rank's part


def this_device(config: RunConfig) -> Device:
    """Of the rank that this process is."""
    from lorl.environment import free_memory

    if pick_device(config.model).type != "cuda":
        return Device(None, free_memory() // config.parallel.gpus)
    found = torch.cuda.get_device_properties(0)
    return Device(found.name, found.total_memory)


def settle(config: RunConfig, devices: Sequence[Device]) -> tuple[RunConfig, str]:
    """`config` with a strategy in place of auto, and a line for the user: which, and why.

    Args:
        devices: of all ranks; the smallest decides.
    """
    smallest = min(devices, key=lambda device: device.memory)
    engine: Engine = "vllm" if config.rollout.engine == "vllm" else "torch"  # where the plan does not choose one
    try:
        demand = _demand(config, smallest)
    except UserError as error:  # a run that the plan has no formulas for is still a run
        return _with(config, Layout("ddp"), engine), f"parallel.strategy=auto: ddp with {engine}, unplanned: {error}"
    parallel = config.parallel
    cluster = Cluster(described_gpu(smallest.gpu, smallest.memory), parallel.gpus, parallel.nodes)
    engines = _engines_here(smallest)
    about = ABOUT if smallest.gpu else math.inf  # the plan knows no CPU's seconds
    offload = None if smallest.gpu else False  # a CPU process has no other memory to go to
    on_gpus = smallest.gpu is not None
    allowed = engine_on(config, engines, on_gpus=on_gpus)
    plan = choose(demand, cluster, offload=offload, engine_on=allowed, about=about)
    if plan is None:  # why the simplest layout does not start is what the user has to know
        _check(config, Layout("ddp"), engine, on_gpus=on_gpus)
        raise AssertionError("ddp is a layout that starts, and was not chosen")
    settled = _with(config, plan.layout, plan.demand.engine)
    why = f"parallel.strategy=auto: {_why(plan, smallest)}"
    if smallest.gpu and config.rollout.engine == "auto":
        why += f"; rollout.engine=auto: {plan.demand.engine}"
    return settled, why


def plannable(config: RunConfig) -> Callable[[Layout], Engine | None]:
    """`engine_on`, for `lorl plan`. Raises UserError where the run is refused whatever the layout."""
    check_combination(config)
    if config.rollout.engine == "vllm":
        _check_kernels(config, parts=False)
    return engine_on(config)


def engine_on(
    config: RunConfig, engines: Sequence[Engine] = PLANNED, *, on_gpus: bool = True
) -> Callable[[Layout], Engine | None]:
    """For `choose`: the engine that samples on a layout if this run can be started in it, else None. Where
    rollout.engine is auto, the first of `engines` that can."""
    asked: Sequence[Any] = engines if config.rollout.engine == "auto" else [config.rollout.engine]

    def engine(layout: Layout) -> Engine | None:
        return next((engine for engine in asked if starts(layout, engine)), None)

    def starts(layout: Layout, engine: Engine) -> bool:
        if not layout.samples_with(engine):
            return False
        try:
            _check(config, layout, engine, on_gpus=on_gpus)
        except (UserError, ValidationError):
            return False
        return True

    return engine


def _check(config: RunConfig, layout: Layout, engine: Engine, *, on_gpus: bool) -> None:
    """Raises UserError, or the schema's ValidationError, where the run can't be started so."""
    check_combination(_with(config, layout, engine))
    if engine == "vllm" and on_gpus:
        _check_kernels(config, parts=layout.engine > 1)


def _check_kernels(config: RunConfig, *, parts: bool) -> None:
    """What vLLM says of adapters in this dtype when it starts on GPUs."""
    gpu = torch.device("cuda")
    launch.check_mode(config.rollout.adapter_mode, gpu, pick_dtype(config.model, gpu), parts=parts)


def _with(config: RunConfig, layout: Layout, engine: Engine) -> RunConfig:
    """The run in this layout. Raises ValidationError where the schema has no such setting."""
    parallel = config.parallel
    changes: dict[str, Any] = {"strategy": layout.strategy}
    if 1 < layout.shard < parallel.gpus * parallel.nodes:
        changes["shard_size"] = layout.shard
    if layout.offload:
        changes["param_offload"] = True
    settled = ParallelConfig.model_validate(parallel.model_dump() | changes)
    rollout = config.rollout.model_copy(update={"engine": engine})
    return config.model_copy(update={"parallel": settled, "rollout": rollout})


def _demand(config: RunConfig, device: Device) -> Demand:
    kind = "cpu" if device.gpu is None else "cuda"
    return demand_of(config, Shape.of(load_shape(config.model)), device=kind)[0]


def _engines_here(device: Device) -> tuple[Engine, ...]:
    return PLANNED if device.gpu is not None and versions.known() else ("torch",)


def _why(plan: Plan, device: Device) -> str:
    """The chosen layout, and what speaks for it or against ddp, the simplest one."""
    each = "a process" if device.gpu is None else "a GPU"
    room = f"{plan.memory.capacity / GIB:.1f} GiB {each}"
    simplest = Layout("ddp", offload=plan.demand.offload)
    if plan.layout == simplest:
        lacks = "" if plan.fits else "; nothing fits, and this lacks least: `lorl plan` says what helps"
        return f"{simplest.name}, which takes {_needed(plan)} of {room}{lacks}"
    ddp = make_plan(plan.demand, simplest, plan.cluster)
    if ddp.fits:
        return f"{plan.layout.name}, planned at {plan.seconds:.3g} s a step where ddp takes {ddp.seconds:.3g}"
    lacks = "" if plan.fits else f"; nothing fits, and this lacks least ({_needed(plan)}): `lorl plan` says what helps"
    return f"{plan.layout.name}, since ddp needs {_needed(ddp)} of {room}{lacks}"


def _needed(plan: Plan) -> str:
    held = plan.memory
    return f"{max(held.peak, held.capacity + held.shortage) / GIB:.1f}"
