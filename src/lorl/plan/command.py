"""`lorl plan`: from a run's configuration and the command line's words to a printed plan."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lorl.errors import UserError, nearest
from lorl.plan.choose import EngineOn, choose, smallest_change
from lorl.plan.demand import Demand, Engine, demand_of
from lorl.plan.hardware import Cluster, make_cluster
from lorl.plan.layout import STRATEGIES, Layout, Strategy, vllm_sizes
from lorl.plan.render import as_dict, as_text
from lorl.plan.seconds import training_share
from lorl.plan.shape import Shape

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

    `engine_on` says of a run which layouts it can be started in, for `auto`, or raises UserError where it is none; a
    strategy that is named is planned in any case.
    """
    nodes = config.parallel.nodes
    cluster = make_cluster(config.parallel.gpus * nodes if gpus is None else gpus, nodes, gpu, gpu_memory, bandwidths)
    wanted = _strategy(config.parallel.strategy if strategy is None else strategy)
    demand, notes = demand_of(config)
    offload = None if wanted is None else False
    spread = config.parallel.model_copy(update={"gpus": cluster.gpus, "nodes": cluster.nodes, "strategy": "auto"})
    startable = _vllm_alone if config.rollout.engine == "vllm" else None
    if wanted is None:
        startable = engine_on(config.model_copy(update={"parallel": spread}))
    plan = choose(demand, cluster, wanted, offload, startable)
    if plan is None:
        raise UserError(_nowhere(config, wanted, demand, cluster))
    change = None if plan.fits else smallest_change(demand, cluster, wanted, offload, startable)
    if plan.demand.engine != demand.engine:
        why = "with parallel.param_offload=true vLLM has no base to read"
        notes.append(f"the embedded engine samples: {why if plan.layout.streamed else 'with vLLM no layout fits'}")
    notes.append(_utilisation(cluster, demand.shape))
    if as_json:
        sys.stdout.write(json.dumps(as_dict(plan, change, notes)) + "\n")
    else:
        from rich.console import Console

        Console().print(as_text(plan, change, notes))
    return 0 if plan.fits else UserError.exit_code


def _vllm_alone(layout: Layout) -> Engine | None:
    return "vllm" if layout.samples_with("vllm") else None


def _nowhere(config: "RunConfig", wanted: Strategy | None, demand: Demand, cluster: Cluster) -> str:
    """Why there is no layout for this run."""
    if wanted in ("fsdp", "fsdp2") or (wanted == "shared" and not config.parallel.param_offload):
        if cluster.world == 1:
            return f"--strategy {wanted} spreads the base over several GPUs, and there is one; use ddp, or more --gpus"
        size = demand.shard_size or cluster.world
        asked = f"--strategy {wanted} spreads the base over {size} of {cluster.world} GPUs"
        even = " or ".join(str(n) for n in vllm_sizes(demand.shape, cluster) if n > 1)
        instead = f"parallel.shard_size={even} would do" if even else "use ddp, or rollout.engine=torch"
        return f"{asked}, and rollout.engine={demand.engine} cannot deal this model out evenly so; {instead}"
    offload = "parallel.param_offload=true, which keeps the base in host memory"
    if wanted == "shared":
        return f"--strategy shared keeps the base where the engine reads it, against {offload}; use --strategy fsdp2"
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


def _utilisation(cluster: Cluster, shape: Shape) -> str:
    from lorl.plan import measured

    return (
        f"{cluster.gpu.name} at {training_share(shape.hidden):.0%} of its bfloat16 rate in training, "
        f"{measured.SCORING_SHARE:.0%} in scoring (measured on H100s), links at {measured.LINK_SHARE:.0%} (not "
        "measured)"
    )
