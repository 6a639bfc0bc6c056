"""A whole plan, the strategy that a run should take, and what to change in one that does not fit. Pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from lorl.plan.demand import Demand, Engine
from lorl.plan.hardware import Cluster
from lorl.plan.layout import Layout, Strategy, deals_evenly, layouts, vllm_sizes
from lorl.plan.memory import Memory, memory
from lorl.plan.seconds import PhaseSeconds, step_seconds

EngineOn = Callable[[Layout], Engine | None]
"""The engine that samples on a layout; None: the run cannot take that layout."""

OPTIMIZER_OFFLOAD, ACTIVATION_OFFLOAD = "parallel.optimizer_offload", "model.activation_offload"
ABOUT = 1.05  # seconds that differ by less are the same: estimates are no better than that
_FRACTIONS = tuple(percent / 100 for percent in (80, 70, 60, 50, 40, 30, 25, 20, 15, 10, 8, 6, 5, 4, 3, 2, 1))


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run takes in one layout."""

    demand: Demand
    layout: Layout
    cluster: Cluster
    memory: Memory
    phases: tuple[PhaseSeconds, ...]

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.memory.fits


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that make a run fit, as `key=value`, and the plan with them."""

    settings: tuple[str, ...]
    plan: Plan


def make_plan(demand: Demand, layout: Layout, cluster: Cluster) -> Plan:
    """What the run takes in this layout. vLLM reads no streamed layers: the embedded engine samples them."""
    if layout.streamed:
        demand = replace(demand, engine="torch")
    held = memory(demand, layout, cluster)
    return Plan(demand, layout, cluster, held, step_seconds(demand, layout, cluster, held))


def choose(
    demand: Demand,
    cluster: Cluster,
    strategy: Strategy | None = None,
    offload: bool | None = None,
    engine_on: EngineOn | None = None,
    about: float = ABOUT,
) -> Plan | None:
    """The simplest plan that fits and takes less than `about` times as long as the fastest that does; where none fits,
    the one that lacks least. Simpler layouts come first in `layouts`. Another engine than the demand's is taken only
    where nothing fits with that one: the seconds are vLLM's, and the embedded engine's on a GPU are many times as long.

    `strategy`, `offload` and `engine_on` narrow the choice, and so does a demand whose base is to lie in host memory;
    without `engine_on`, it is among the layouts for the demand's engine, and streamed ones. None: there is no such
    layout on this cluster.
    """
    found = layouts(demand.shape, cluster, strategy, True if demand.offload else offload, demand.shard_size)
    sampled = [(layout, engine_on(layout) if engine_on else _engine(demand, layout)) for layout in found]
    plans = [make_plan(replace(demand, engine=engine), layout, cluster) for layout, engine in sampled if engine]
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        fitting = [plan for plan in fitting if plan.demand.engine == demand.engine] or fitting
        fastest = min(plan.seconds for plan in fitting)
        return next(plan for plan in fitting if plan.seconds <= fastest * about)
    return min(plans, key=lambda plan: plan.memory.shortage, default=None)


def _engine(demand: Demand, layout: Layout) -> Engine | None:
    return demand.engine if layout.samples_with(demand.engine) else "torch" if layout.streamed else None


def smallest_change(
    demand: Demand,
    cluster: Cluster,
    strategy: Strategy | None,
    offload: bool | None,
    engine_on: EngineOn | None = None,
) -> Change | None:
    """For a run that does not fit: the first single change that helps, or else as few as do together, mild before
    strong. None: nothing helps.

    No change touches what is computed: smaller micro-batches, recomputation, the cache's rest and size, what may wait
    in host memory, and then where the base lies. What keeps the demand's engine comes before what does not.
    """
    start = _State(demand, strategy, offload, engine_on)
    keeping = replace(start, engine_on=lambda layout: _kept_engine(start, layout))
    return _smallest_change(keeping, cluster) or _smallest_change(start, cluster)


def _kept_engine(start: "_State", layout: Layout) -> Engine | None:
    engine = start.engine_on(layout) if start.engine_on else _engine(start.demand, layout)
    return engine if engine == start.demand.engine else None


def _smallest_change(start: "_State", cluster: Cluster) -> Change | None:
    steps = _steps(start, cluster)
    for step in steps:
        for edit in step:
            if (plan := edit.on(start).plan(cluster)) is not None and plan.fits:
                return Change(edit.settings, plan)
    strongest = [step[-1] for step in steps]
    for count in range(2, len(strongest) + 1):
        edits = strongest[:count]
        if _fits(start, edits, cluster):
            return _mildest(start, edits, steps, cluster)
    return None


@dataclass(frozen=True, slots=True)
class _State:
    demand: Demand
    strategy: Strategy | None
    offload: bool | None
    engine_on: EngineOn | None

    def plan(self, cluster: Cluster) -> Plan | None:
        return choose(self.demand, cluster, self.strategy, self.offload, self.engine_on)


@dataclass(frozen=True, slots=True)
class _Edit:
    """One change of a run's settings, as `key=value`."""

    settings: tuple[str, ...]
    on: Callable[[_State], _State]


def _steps(start: _State, cluster: Cluster) -> list[list[_Edit]]:
    """The changes in the order in which they are tried, each with its values from mild to strong."""
    demand = start.demand
    halves = [demand.microbatch_tokens >> power for power in range(1, demand.microbatch_tokens.bit_length())]
    halves = [tokens for tokens in halves if tokens >= demand.longest_share]
    steps = [
        [_LEAVE_FOLD] if _folds_by_choice(demand) else [],
        [_demand_edit("parallel.microbatch_tokens", n, microbatch_tokens=n) for n in halves],
        [] if demand.recompute is True else [_demand_edit("model.gradient_checkpointing", "true", recompute=True)],
        [] if demand.rest == "always" else [_demand_edit("rollout.rest", "always", rest="always")],
        [] if demand.memory_fraction is None else _fraction_edits(demand.memory_fraction),
        [] if demand.optimizer_offload else [_demand_edit(OPTIMIZER_OFFLOAD, "true", optimizer_offload=True)],
        [] if demand.activation_offload else [_demand_edit(ACTIVATION_OFFLOAD, "true", activation_offload=True)],
    ]
    if start.strategy is not None:
        steps += [[_spread_edit("fsdp2", demand, cluster)], [_spread_edit("shared", demand, cluster)]]
    if not (start.offload or demand.offload):
        steps.append([_OFFLOAD])
        if start.strategy is not None:  # parts that an engine reads can't go
            steps.append([_both(_spread_edit("fsdp2", demand, cluster), _OFFLOAD)])
    return [step for step in steps if step]


def _fraction_edits(fraction: float) -> list[_Edit]:
    """Smaller fractions, and then what rollouts can fill of what is left: a fraction can also be too small."""
    smaller = [part for part in _FRACTIONS if part < fraction]
    edits = [_demand_edit("rollout.memory_fraction", part, memory_fraction=part) for part in smaller]
    return [*edits, _demand_edit("rollout.memory_fraction", "null", memory_fraction=None)]


def _demand_edit(key: str, value: object, **fields: Any) -> _Edit:
    return _Edit((f"{key}={value}",), lambda state: replace(state, demand=replace(state.demand, **fields)))


def _spread_edit(strategy: Strategy, demand: Demand, cluster: Cluster) -> _Edit:
    """Over all GPUs, or over as many as one vLLM can be of. Parts of the base are not folded into."""
    found = _Edit((f"parallel.strategy={strategy}",), lambda state: replace(state, strategy=strategy))
    if _folds_by_choice(demand):
        found = _both(found, _LEAVE_FOLD)
    if demand.engine == "torch" or demand.shard_size or deals_evenly(demand.shape, cluster.world):
        return found
    size = max(vllm_sizes(demand.shape, cluster))
    return _both(found, _demand_edit("parallel.shard_size", size, shard_size=size)) if size > 1 else found


def _folds_by_choice(demand: Demand) -> bool:
    return demand.folds and demand.itemsize == 2  # vLLM has no adapter kernels for float32 on a GPU


_LEAVE_FOLD = _demand_edit("rollout.adapter_mode", "adapter", folds=False)
_OFFLOAD = _Edit(("parallel.param_offload=true",), lambda state: replace(state, offload=True))


def _both(first: _Edit, second: _Edit) -> _Edit:
    return _Edit((*first.settings, *second.settings), lambda state: second.on(first.on(state)))


def _fits(start: _State, edits: Sequence[_Edit], cluster: Cluster) -> bool:
    plan = _applied(start, edits).plan(cluster)
    return plan is not None and plan.fits


def _applied(start: _State, edits: Sequence[_Edit]) -> _State:
    return reduce(lambda state, edit: edit.on(state), edits, start)


def _mildest(start: _State, edits: list[_Edit], steps: list[list[_Edit]], cluster: Cluster) -> Change:
    """Of edits that fit together, without those that are not needed and each no stronger than it must be."""
    for edit in list(edits):
        without = [one for one in edits if one is not edit]
        if _fits(start, without, cluster):
            edits = without
    for place, edit in enumerate(edits):
        step = next(step for step in steps if edit in step)
        for milder in step:
            swapped = [*edits[:place], milder, *edits[place + 1 :]]
            if _fits(start, swapped, cluster):
                edits = swapped
                break
    plan = _applied(start, edits).plan(cluster)
    assert plan is not None
    named = [setting for edit in edits for setting in edit.settings]
    settings = {setting.partition("=")[0]: setting for setting in named}  # the last strategy is what counts
    return Change(tuple(settings.values()), plan)
