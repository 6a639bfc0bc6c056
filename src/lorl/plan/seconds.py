"""Expected seconds of each phase of a step, from operations, bytes and the rates in `lorl.plan.measured`.

What is not in them: rewards (they run while the rollout does), evaluation, checkpoints, start-up and compilation.
"""

import math
from dataclasses import dataclass

import numpy as np

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
    steps = _Cost({}, _optimizer_step(demand, cluster))
    parts = (training.phase("update", passes), steps.phase("update", demand.minibatches))
    longest = max(parts, key=lambda part: part.seconds)
    phases.append(PhaseSeconds("update", sum(part.seconds for part in parts), longest.bound))
    phases.append(_publish(demand))
    return tuple(phases)


def training_operations(demand: Demand, *, gradient: bool, recompute: bool) -> float:
    """Floating-point operations of one packed token: the frozen base needs no gradient of its weights. A critic's pass
    is taken for the policy's."""
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


def training_share(hidden: int) -> float:
    """Of a GPU's dense bfloat16 rate that forward and backward passes of layers of this width reach."""
    widths, shares = zip(*measured.TRAINING_SHARES, strict=True)
    return float(np.interp(hidden, widths, shares))


def _passes(demand: Demand, cluster: Cluster) -> int:
    """Micro-batches of a rank in one pass over the step."""
    return max(1, math.ceil(demand.packed_tokens / cluster.world / demand.microbatch(cluster.world)))


def _pass(demand: Demand, layout: Layout, cluster: Cluster, *, gradient: bool, recompute: bool) -> _Cost:
    """One micro-batch: products, launches from Python, gathers of the base and activations on their way to the host
    overlap. Ranks that split it wait for what they exchange, and a layer's backward pass for its activations."""
    tokens = demand.packed_tokens / cluster.world / _passes(demand, cluster)
    share = training_share(demand.shape.hidden) if gradient else measured.SCORING_SHARE
    operations = tokens * training_operations(demand, gradient=gradient, recompute=recompute)
    python = measured.PASS_SECONDS_A_LAYER * demand.shape.layers * (1 if gradient else 1 / 3)
    causes = {"products": operations / (share * cluster.gpu.flops), "Python": python}
    gathers = _gathers(demand, layout, cluster, gradient=gradient)
    waits = _exchanges(demand, cluster, tokens, gradient=gradient, recompute=recompute)
    if gradient and demand.activation_offload:
        how = demand.passes_as(math.ceil(tokens), recompute=recompute)
        size = footprint.away_bytes(demand.shape, demand.lora, math.ceil(tokens), how)
        waits["PCIe"] = size / _host_rate(cluster)
        gathers["PCIe"] = gathers.get("PCIe", 0.0) + waits["PCIe"]
    return _Cost(causes | gathers, waits)


def _gathers(demand: Demand, layout: Layout, cluster: Cluster, *, gradient: bool) -> dict[str, float]:
    """Bringing a sharded base together in a pass, and an offloaded one over PCIe."""
    shape, shard = demand.shape, layout.shard
    found = {}
    if size := traffic.gathered_bytes(shape, demand.itemsize, layout, gradient=gradient):
        found["links"] = size / _rate(cluster, shard)
    if layout.offload:
        layers = shape.layers * shape.layer_parameters * demand.itemsize
        found["PCIe"] = (1 + gradient) * layers / shard / _host_rate(cluster)
    return found


def _exchanges(demand: Demand, cluster: Cluster, tokens: float, *, gradient: bool, recompute: bool) -> dict[str, float]:
    """What ranks that split a pass send each other; each of them holds `tokens` tokens of it."""
    ranks = demand.sequence
    if ranks == 1:
        return {}
    how = {"gradient": gradient, "recompute": recompute}
    size = traffic.exchanged_bytes(demand.shape, demand.itemsize, ranks * tokens, ranks, **how)
    return {"links": size / _rate(cluster, ranks)}


def _optimizer_step(demand: Demand, cluster: Cluster) -> dict[str, float]:
    """An all-reduce of the adapters' gradients over all ranks, the only gradients that there are; and moments that come
    from the host and go back."""
    parameters = sum(lora.parameters for lora in demand.learning)
    reduced = traffic.reduced_bytes(parameters * footprint.GRADIENT_BYTES, cluster.world)
    found = {"links": reduced / _rate(cluster, cluster.world)}
    if demand.optimizer_offload:
        found["PCIe"] = 2 * parameters * footprint.ADAMW_BYTES / _host_rate(cluster)
    return found


def _rate(cluster: Cluster, ranks: int) -> float:
    """Bytes a second that each of `ranks` neighbours receives."""
    return measured.LINK_SHARE * cluster.link(ranks)


def _host_rate(cluster: Cluster) -> float:
    """Bytes a second between a GPU and the host, each way."""
    return measured.LINK_SHARE * cluster.gpu.pcie


def _rollout(demand: Demand, layout: Layout, cluster: Cluster, held: Memory) -> _Cost:
    """Each engine's share of the answers, in as many waves as its cache and `max_concurrent` make of them.

    The longest answer is as long as allowed; a step reads the weights once, and the keys of the answers that run. The
    host prepares a step while the GPU is at the last one. The embedded engine's steps bring together what the trainer's
    passes do."""
    shape, gpu, ways = demand.shape, cluster.gpu, layout.engine
    engines = cluster.world // ways
    answers = math.ceil(demand.prompts * demand.samples / engines)
    per_token = footprint.kv_bytes(shape, demand.itemsize, ways)
    own = demand.prompt_tokens / demand.samples + demand.response_tokens  # a prompt's samples share its keys
    capacity = max(1, int(held.cache.wanted / (per_token * own)))
    running = max(1, min(answers, demand.concurrent, capacity))
    steps = max(demand.longest_response, math.ceil(answers * demand.response_tokens / running))
    weights = shape.parameters * demand.itemsize / ways
    keys = answers * demand.response_tokens * (demand.prompt_tokens + demand.response_tokens / 2) * per_token
    reading = (steps * weights + keys) / (measured.HBM_SHARE * gpu.hbm)
    prompts = math.ceil(demand.prompts / engines) * demand.prompt_tokens
    operations = 2 * shape.layers * shape.linear_parameters / ways
    products = prompts * operations / (measured.SCORING_SHARE * gpu.flops)
    decoding = answers * demand.response_tokens * operations / (measured.SCORING_SHARE * gpu.flops)
    layers = measured.LAYER_SECONDS + running * measured.LAYER_SECONDS_A_SAMPLE
    device = {"memory": max(reading, decoding), "kernels": steps * shape.layers * layers}
    overlapping: dict[str, float] = {}
    if demand.engine == "torch":
        gathers = _gathers(demand, layout, cluster, gradient=False)
        overlapping = {cause: steps * seconds for cause, seconds in gathers.items()}
    if ways > 1:
        size = 2 * answers * demand.response_tokens * shape.hidden * demand.itemsize * (ways - 1) / ways
        moved = size / _rate(cluster, ways)
        device["links"] = 2 * shape.layers * (steps * measured.COLLECTIVE_SECONDS + moved)
    overlapping |= {
        "host": steps * running * measured.HOST_SECONDS_A_SAMPLE,
        max(device, key=lambda cause: device[cause]): sum(device.values()),
    }
    return _Cost(overlapping, {"prefill": products})


def _publish(demand: Demand) -> PhaseSeconds:
    """Each rank copies its own masters into its own slots, and proves it by a few answers: nothing crosses a link."""
    return PhaseSeconds("publish", measured.PUBLISH_SECONDS_A_LAYER * demand.shape.layers, "host")
