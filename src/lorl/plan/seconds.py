"""Expected seconds of each phase of a step, from operations, bytes and the rates in `lorl.plan.measured`.

What is not in them: rewards (they run while the rollout does), evaluation, checkpoints, start-up and compilation.
"""

import math
from dataclasses import dataclass

from lorl.plan import footprint, measured, traffic
from lorl.plan.demand import Demand
from lorl.plan.hardware import Cluster
from lorl.plan.layout import Layout
from lorl.plan.memory import Memory


@dataclass(frozen=True, slots=True)
class PhaseSeconds:
    """One phase, and what most of it is spent on."""

    phase: str
    seconds: float
    bound: str


@dataclass(frozen=True, slots=True)
class _Cost:
    """Seconds by cause. Causes that overlap count as the longest of them."""

    overlapping: dict[str, float]
    serial: dict[str, float]

    def phase(self, name: str, times: float = 1.0) -> PhaseSeconds:
        both = (self.overlapping, self.serial)
        causes = {cause: sum(part.get(cause, 0.0) for part in both) for cause in self.overlapping | self.serial}
        seconds = max(self.overlapping.values(), default=0.0) + sum(self.serial.values())
        return PhaseSeconds(name, times * seconds, max(causes, key=lambda cause: causes[cause]) if seconds else "-")


def step_seconds(demand: Demand, layout: Layout, cluster: Cluster, held: Memory) -> tuple[PhaseSeconds, ...]:
    """Rollout, log-probabilities (where the objective reads any), update and publish, in the step's order."""
    phases = [_rollout(demand, layout, cluster, held).phase("rollout")]
    if demand.scorings:
        scoring = _pass(demand, layout, cluster, gradient=False, recompute=False)
        phases.append(scoring.phase("log-probabilities", demand.scorings * _passes(demand, cluster)))
    training = _pass(demand, layout, cluster, gradient=True, recompute=held.recompute)
    passes = (demand.epochs + demand.critic_epochs) * _passes(demand, cluster)
    update = training.phase("update", passes)
    reduce = demand.minibatches * _reduce_seconds(demand, cluster)
    phases.append(PhaseSeconds("update", update.seconds + reduce, update.bound if update.seconds > reduce else "links"))
    phases.append(_publish(demand))
    return tuple(phases)


def training_operations(demand: Demand, *, gradient: bool, recompute: bool) -> float:
    """Floating-point operations of one packed token: the frozen base needs no gradient of its weights."""
    shape, lora = demand.shape, demand.lora
    base = 2 * shape.layers * shape.linear_parameters
    adapter = 2 * lora.parameters
    context = demand.prompt_tokens + demand.response_tokens / 2
    attention = 4 * context * shape.queries * shape.layers
    head = 2 * shape.embedding_parameters * demand.sampled_tokens / demand.packed_tokens
    if not gradient:
        return base + adapter + attention + head
    again = base + adapter + attention if recompute else 0
    return 2 * base + 3 * adapter + 3.5 * attention + (2 + demand.entropy) * head + again


def _passes(demand: Demand, cluster: Cluster) -> int:
    """Micro-batches of a rank in one pass over the step."""
    return max(1, math.ceil(demand.packed_tokens / cluster.world / demand.microbatch(cluster.world)))


def _pass(demand: Demand, layout: Layout, cluster: Cluster, *, gradient: bool, recompute: bool) -> _Cost:
    """One micro-batch: products, launches from Python and gathers of the base overlap; ranks that split it wait for
    what they exchange."""
    tokens = demand.packed_tokens / cluster.world / _passes(demand, cluster)
    share = measured.TRAINING_SHARE if gradient else measured.SCORING_SHARE
    operations = tokens * training_operations(demand, gradient=gradient, recompute=recompute)
    python = measured.PASS_SECONDS_A_LAYER * demand.shape.layers * (1 if gradient else 1 / 3)
    causes = {"products": operations / (share * cluster.gpu.flops), "Python": python}
    gathers = _gathers(demand, layout, cluster, gradient=gradient)
    exchanges = _exchanges(demand, cluster, tokens, gradient=gradient, recompute=recompute)
    return _Cost(causes | gathers, exchanges)


def _gathers(demand: Demand, layout: Layout, cluster: Cluster, *, gradient: bool) -> dict[str, float]:
    """Bringing a sharded base together in a pass, and an offloaded one over PCIe."""
    shape, shard = demand.shape, layout.shard
    found = {}
    if size := traffic.gathered_bytes(shape, demand.itemsize, layout, gradient=gradient):
        found["links"] = size / _rate(cluster, shard)
    if layout.offload:
        layers = shape.layers * shape.layer_parameters * demand.itemsize
        found["PCIe"] = (1 + gradient) * layers / shard / (measured.LINK_SHARE * cluster.gpu.pcie)
    return found


def _exchanges(demand: Demand, cluster: Cluster, tokens: float, *, gradient: bool, recompute: bool) -> dict[str, float]:
    """What ranks that split a pass send each other; each of them holds `tokens` tokens of it."""
    ranks = demand.sequence
    if ranks == 1:
        return {}
    how = {"gradient": gradient, "recompute": recompute}
    size = traffic.exchanged_bytes(demand.shape, demand.itemsize, ranks * tokens, ranks, **how)
    return {"links": size / _rate(cluster, ranks)}


def _reduce_seconds(demand: Demand, cluster: Cluster) -> float:
    """An all-reduce of the adapter's gradients over all ranks: the only gradients that there are."""
    size = demand.learning * demand.lora.parameters * footprint.GRADIENT_BYTES
    return traffic.reduced_bytes(size, cluster.world) / _rate(cluster, cluster.world)


def _rate(cluster: Cluster, ranks: int) -> float:
    """Bytes a second that each of `ranks` neighbours receives."""
    return measured.LINK_SHARE * cluster.link(ranks)


def _rollout(demand: Demand, layout: Layout, cluster: Cluster, held: Memory) -> _Cost:
    """Each engine's share of the answers, in as many waves as its cache and `max_concurrent` make of them.

    The longest answer is as long as allowed; a step reads the weights once, and the keys of the answers that run."""
    shape, gpu, ways = demand.shape, cluster.gpu, layout.engine
    engines = cluster.world // ways
    answers = math.ceil(demand.prompts * demand.samples / engines)
    per_token = footprint.kv_bytes(shape, demand.itemsize, ways)
    capacity = max(1, held.cache.wanted // (per_token * (demand.prompt_tokens + demand.response_tokens)))
    running = max(1, min(answers, demand.concurrent, capacity))
    steps = max(demand.longest_response, math.ceil(answers * demand.response_tokens / running))
    weights = shape.parameters * demand.itemsize / ways
    keys = answers * demand.response_tokens * (demand.prompt_tokens + demand.response_tokens / 2) * per_token
    reading = (steps * weights + keys) / (measured.HBM_SHARE * gpu.hbm)
    prompts = math.ceil(demand.prompts / engines) * demand.prompt_tokens
    operations = 2 * shape.layers * shape.linear_parameters / ways
    products = prompts * operations / (measured.SCORING_SHARE * gpu.flops)
    decoding = answers * demand.response_tokens * operations / (measured.SCORING_SHARE * gpu.flops)
    serial = {"memory": max(reading, decoding), "host": steps * measured.DECODE_SECONDS, "prefill": products}
    if ways > 1:
        size = 2 * answers * demand.response_tokens * shape.hidden * demand.itemsize * (ways - 1) / ways
        moved = size / _rate(cluster, ways)
        serial["links"] = 2 * shape.layers * (steps * measured.COLLECTIVE_SECONDS + moved)
    return _Cost({}, serial)


def _publish(demand: Demand) -> PhaseSeconds:
    """Each rank copies its own masters into its own slots, and proves it by a few answers: nothing crosses a link."""
    return PhaseSeconds("publish", measured.PUBLISH_SECONDS_A_LAYER * demand.shape.layers, "host")
