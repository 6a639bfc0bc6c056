"""A plan for people, and for programs."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorl.plan.choose import Change, Plan
from lorl.plan.hardware import GIB


def as_text(plan: Plan, change: Change | None, notes: list[str]) -> RenderableType:
    """The table of bytes, host memory, seconds, the verdict and what was assumed."""
    return Group(
        Text(_headline(plan), style="bold"),
        _bytes_table(plan),
        _host_table(plan),
        _seconds_table(plan),
        Text(verdict(plan, change), style="green" if plan.fits else "red"),
        *(Text(f"assumed: {note}", style="dim") for note in notes),
    )


def as_dict(plan: Plan, change: Change | None, notes: list[str]) -> dict[str, Any]:
    """Bytes and seconds under stable names."""
    held = plan.memory
    return {
        "strategy": plan.layout.strategy,
        "shard": plan.layout.shard,
        "engine": plan.demand.engine,
        "engine_gpus": plan.layout.engine,
        "offload": plan.layout.offload,
        "gpus": plan.cluster.world,
        "gpu": plan.cluster.gpu.name,
        "gpu_bytes": held.capacity,
        "bytes": {row.holder: {"sampling": row.sampling, "training": row.training} for row in held.rows},
        "sampling_bytes": held.sampling,
        "training_bytes": held.training,
        "recompute": held.recompute,
        "activations": {"kept": held.without_recompute, "recomputed": held.with_recompute},
        "cache_rests": held.cache.rests,
        "host_bytes": dict(held.host),
        "seconds": {phase.phase: phase.seconds for phase in plan.phases},
        "bound": {phase.phase: phase.bound for phase in plan.phases},
        "seconds_a_step": plan.seconds,
        "fits": plan.fits,
        "change": None if change is None else list(change.settings),
        "assumed": notes,
    }


def verdict(plan: Plan, change: Change | None) -> str:
    """One sentence: it fits, or what to change, or that nothing helps."""
    held = plan.memory
    if plan.fits:
        return f"fits: {_gib(held.peak)} of {_gib(held.capacity)} GiB a GPU at the most, {plan.seconds:,.0f} s a step"
    lacks = f"does not fit: {_gib(held.shortage)} GiB a GPU too much"
    if held.shortage == held.cache.lacks:
        lacks = (
            f"does not fit: rollout.memory_fraction leaves the KV cache {_gib(held.shortage)} GiB short of one sample"
        )
    if change is None:
        return f"{lacks}; no setting helps: take more or larger GPUs, or a smaller model"
    left, engine = change.plan.memory, change.plan.demand.engine
    moved = "" if engine == plan.demand.engine else f", with rollout.engine={engine}"
    return f"{lacks}; {' '.join(change.settings)} makes it {_gib(left.peak)} of {_gib(left.capacity)} GiB{moved}"


def _headline(plan: Plan) -> str:
    shape, cluster = plan.demand.shape, plan.cluster
    nodes = f" on {cluster.nodes} nodes" if cluster.nodes > 1 else ""
    return (
        f"{shape.parameters / 1e9:.2f}B parameters, adapter of {plan.demand.lora.parameters / 1e6:,.1f}M; "
        f"{cluster.world} x {cluster.gpu.name} of {_gib(cluster.gpu.memory)} GiB{nodes}; {plan.layout.name}"
    )


def _bytes_table(plan: Plan) -> Table:
    held = plan.memory
    table = Table("GiB a GPU", title=None)
    for name in ("sampling", "training"):
        table.add_column(name, justify="right")
    for row in held.rows:
        if row.sampling or row.training:
            table.add_row(row.holder, _gib(row.sampling), _gib(row.training))
    table.add_section()
    table.add_row("all", _gib(held.sampling), _gib(held.training))
    table.add_section()
    kept, again = _gib(held.without_recompute), _gib(held.with_recompute)
    table.add_row("activations, layers kept / computed again", "", f"{kept} / {again}")
    return table


def _host_table(plan: Plan) -> Table:
    table = Table("GiB of host memory a node")
    table.add_column("", justify="right")
    for holder, size in plan.memory.host:
        if size:
            table.add_row(holder, _gib(size))
    return table


def _seconds_table(plan: Plan) -> Table:
    table = Table("phase")
    table.add_column("s", justify="right")
    table.add_column("mostly")
    for phase in plan.phases:
        table.add_row(phase.phase, f"{phase.seconds:,.2f}" if phase.seconds >= 0.01 else "<0.01", phase.bound)
    table.add_section()
    table.add_row("step", f"{plan.seconds:,.1f}", "")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size < 0.05 * GIB or size >= 0.1 * GIB else f"{size / GIB:.2f}"
