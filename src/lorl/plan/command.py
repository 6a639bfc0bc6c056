"""`lorl plan`: from a run's configuration and the command line's words to a printed plan."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lorl.errors import UserError, nearest
from lorl.plan.choose import EngineOn, choose, smallest_change
from lorl.plan.demand import Engine, demand_of
from lorl.plan.hardware import Cluster, make_cluster
from lorl.plan.layout import STRATEGIES, Layout, Strategy
from lorl.plan.render import as_dict, as_text

if TYPE_CHECKING:
    from lorl.config import RunConfig


def run(
    config: "RunConfig",
    *,
    gpus: int | None,
    gpu: str,
    gpu_memory: str | None,
    bandwidths: Sequence[str],
    strategy: str | None,
    as_json: bool,
    engine_on: "Callable[[RunConfig], EngineOn]",
) -> int:
    """Prints the plan. Returns 0, or 2 where the run does not fit. Raises UserError for words that mean nothing.

    `engine_on` says of a run which layouts it can be started in, for `auto`; a strategy that is named is planned in any
    case.
    """
    nodes = config.parallel.nodes
    cluster = make_cluster(config.parallel.gpus * nodes if gpus is None else gpus, nodes, gpu, gpu_memory, bandwidths)
    wanted = _strategy(config.parallel.strategy if strategy is None else strategy)
    demand, notes = demand_of(config)
    offload = None if wanted is None else False
    spread = config.parallel.model_copy(update={"gpus": cluster.gpus, "nodes": cluster.nodes})
    startable = _vllm_alone if config.rollout.engine == "vllm" else None
    if wanted is None:
        startable = engine_on(config.model_copy(update={"parallel": spread}))
    plan = choose(demand, cluster, wanted, offload, startable)
    if plan is None:
        raise UserError(_nowhere(config, wanted, demand.engine, cluster))
    change = None if plan.fits else smallest_change(demand, cluster, wanted, offload, startable)
    if plan.layout.streamed and demand.engine != "torch":
        notes.append("the embedded engine samples: with parallel.param_offload=true vLLM has no base to read")
    notes.append(_utilisation(cluster))
    if as_json:
        sys.stdout.write(json.dumps(as_dict(plan, change, notes)) + "\n")
    else:
        from rich.console import Console

        Console().print(as_text(plan, change, notes))
    return 0 if plan.fits else UserError.exit_code


def _vllm_alone(layout: Layout) -> Engine | None:
    return "vllm" if layout.samples_with("vllm") else None


def _nowhere(config: "RunConfig", wanted: Strategy | None, engine: Engine, cluster: Cluster) -> str:
    """Why there is no layout for this run."""
    if not config.parallel.param_offload or wanted in ("fsdp", "fsdp2"):
        lacks = (
            "there is one; use ddp, or more --gpus"
            if cluster.world == 1
            else f"rollout.engine={engine} cannot deal this model out evenly over so many; choose another "
            "parallel.shard_size, or ddp"
        )
        return f"--strategy {wanted} spreads the base over the GPUs of a node, and {lacks}"
    offload = "parallel.param_offload=true, which keeps the base in host memory"
    if wanted == "shared":
        return f"--strategy shared keeps the base where the engine reads it, against {offload}; use --strategy fsdp2"
    if config.adapter.dora:
        return f"adapter.dora=true reads whole weights, against {offload}; use one"
    return (
        f"rollout.engine=vllm reads the base on the device, against {offload}; use rollout.engine=torch, or --strategy "
        "fsdp2 over several GPUs, where vLLM has a copy of its own"
    )


def _strategy(name: str) -> Strategy | None:
    if name in ("auto", "local"):
        return None if name == "auto" else "ddp"
    for strategy in STRATEGIES:
        if name == strategy:
            return strategy
    raise UserError(f"--strategy {name}: {nearest(name, ['auto', *STRATEGIES])}")


def _utilisation(cluster: Cluster) -> str:
    from lorl.plan import measured

    return (
        f"{cluster.gpu.name} at {measured.TRAINING_SHARE:.0%} of its bfloat16 rate in training, "
        f"{measured.SCORING_SHARE:.0%} in scoring (measured on an H100 at 1.5B), links at {measured.LINK_SHARE:.0%} "
        "(not measured)"
    )
