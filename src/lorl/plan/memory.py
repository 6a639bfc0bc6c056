"""Bytes on one GPU and in one node's host memory, by what holds them, while a run samples and while it trains."""

from dataclasses import dataclass

from lorl.plan import footprint
from lorl.plan.demand import Demand
from lorl.plan.hardware import GIB, RESERVE, Cluster
from lorl.plan.layout import GATHERED_LAYERS, Layout

CUDA_GRAPHS = 1 * GIB  # vLLM's graphs and their pool; see ENGINE in lorl.plan.measured
PROCESS_BYTES = 4 * GIB  # of host memory: Python, torch, CUDA and vLLM of one rank; assumed, not measured
SPARE = 0.8  # share of the free memory that kept activations may take before layers are recomputed (policy.layers)

ACTIVATIONS = "activations of a micro-batch"


@dataclass(frozen=True, slots=True)
class Row:
    """What one holder takes of a GPU in each phase."""

    holder: str
    sampling: int
    training: int


@dataclass(frozen=True, slots=True)
class Memory:
    """A plan's bytes. `fits` also asks that the KV cache holds a sample."""

    rows: tuple[Row, ...]
    host: tuple[tuple[str, int], ...]  # of one node
    capacity: int  # of a GPU
    cache: footprint.Cache
    smallest_cache: int
    recompute: bool
    without_recompute: int  # activations that a pass keeps where it does not recompute
    with_recompute: int

    @property
    def sampling(self) -> int:
        return sum(row.sampling for row in self.rows)

    @property
    def training(self) -> int:
        return sum(row.training for row in self.rows)

    @property
    def peak(self) -> int:
        return max(self.sampling, self.training)

    @property
    def shortage(self) -> int:
        """Bytes that a GPU lacks; negative: that are left."""
        return max(self.peak - self.capacity, self.smallest_cache - self.cache.most)

    @property
    def has_cache(self) -> bool:
        """Whether the KV cache that is asked for can be had."""
        return self.smallest_cache <= self.cache.wanted <= self.cache.most

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity and self.has_cache

    def row(self, holder: str) -> Row:
        return next(row for row in self.rows if row.holder == holder)


def memory(demand: Demand, layout: Layout, cluster: Cluster) -> Memory:
    """The table of one layout. `demand.recompute="auto"` recomputes where the pass would not fit otherwise."""
    if demand.recompute != "auto":
        return _memory(demand, layout, cluster, recompute=demand.recompute)
    plain = _memory(demand, layout, cluster, recompute=False)
    held = plain.row(ACTIVATIONS).training
    crowded = held > SPARE * (plain.capacity - plain.training + held) or not plain.has_cache
    return _memory(demand, layout, cluster, recompute=True) if crowded else plain


def _memory(demand: Demand, layout: Layout, cluster: Cluster, *, recompute: bool) -> Memory:
    shape, lora, n = demand.shape, demand.lora, demand.itemsize
    how, tokens = demand.passes_as(recompute=recompute), demand.microbatch(cluster.world)
    base, copy = _base_bytes(demand, layout)
    kept = footprint.kept_bytes(shape, lora, tokens, how)
    layer, head, gathered = _worst_moment(demand, layout, tokens, how)
    learning, adapters = demand.learning, demand.learning + demand.frozen
    masters = adapters * lora.parameters * footprint.MASTER_BYTES
    gradients = learning * lora.parameters * footprint.GRADIENT_BYTES
    moments = learning * lora.parameters * footprint.ADAMW_BYTES
    vllm = demand.engine == "vllm"
    slots = footprint.slot_bytes(shape, lora, n, demand.slots, layout.engine) if vllm else 0
    engine = _engine_bytes(demand, layout) if vllm else 0
    reserve = int(RESERVE * cluster.gpu.memory)
    rows = [
        Row("base", base, base),
        Row("engine's own copy of the base", copy, copy),
        Row("adapters, float32 masters", masters, masters),
        Row("gradients", gradients, gradients),
        Row("optimizer", moments, moments),
        Row("engine's adapter slots", slots, slots),
        Row("engine's graphs and buffers", engine, engine),
        Row("CUDA, NCCL, fragmentation", reserve, reserve),
    ]
    per_token = footprint.kv_bytes(shape, n, layout.engine)
    smallest = per_token * (demand.longest + footprint.SPARE_TOKENS)
    training = kept + layer + head + gathered
    room = cluster.gpu.memory - sum(row.training for row in rows)
    cache = footprint.kv_cache(
        total=cluster.gpu.memory,
        room=room,
        training=training,
        fraction=demand.memory_fraction,
        smallest=smallest,
        fullest=footprint.fullest_cache(per_token, demand.concurrent, demand.longest),
        rest=demand.rest if vllm else "always",
    )
    rows += [
        Row("KV cache", cache.wanted, 0 if cache.rests else cache.wanted),
        Row(ACTIVATIONS, 0, kept + layer),
        Row("log-probability head's chunks", 0, head),
        Row("gathered layers of the base", 0, gathered),
    ]
    return Memory(
        rows=tuple(rows),
        host=_host(demand, layout, cluster),
        capacity=cluster.gpu.memory,
        cache=cache,
        smallest_cache=smallest,
        recompute=recompute,
        without_recompute=footprint.activation_bytes(shape, lora, tokens, demand.passes_as(recompute=False)),
        with_recompute=footprint.activation_bytes(shape, lora, tokens, demand.passes_as(recompute=True)),
    )


def _base_bytes(demand: Demand, layout: Layout) -> tuple[int, int]:
    """The trainer's part of the base on a GPU, and the engine's copy where it has one."""
    whole = demand.shape.parameters * demand.itemsize
    if layout.strategy in ("ddp", "shared"):
        return -(-whole // layout.shard), 0
    layers = demand.shape.layers * demand.shape.layer_parameters * demand.itemsize
    ends = whole - layers  # read out of order, and so whole on each rank (lorl.parallel.sharding)
    copy = -(-whole // layout.engine) if demand.engine == "vllm" else 0  # the embedded engine reads the trainer's
    return ends + (0 if layout.offload else -(-layers // layout.shard)), copy


def _worst_moment(demand: Demand, layout: Layout, tokens: int, how: footprint.Pass) -> tuple[int, int, int]:
    """(layer's backward, head's chunks, gathered weights) of the moment at which their sum is largest.

    The head and the worst layer are never at work together.
    """
    shape, n = demand.shape, demand.itemsize
    sharded = layout.strategy != "ddp" and (layout.shard > 1 or layout.offload)
    in_layer = footprint.layer_moment_bytes(shape, demand.lora, tokens, how)
    in_head = footprint.head_moment_bytes(shape, tokens, how, "cuda")
    layers = GATHERED_LAYERS * shape.layer_parameters * n if sharded else 0
    head = shape.embedding_parameters * n if sharded and layout.strategy == "shared" else 0
    if in_layer + layers >= in_head + head:
        return in_layer, 0, layers
    return 0, in_head, head


def _engine_bytes(demand: Demand, layout: Layout) -> int:
    """vLLM's graphs, the activations of its largest pass, and its logits."""
    shape, n = demand.shape, demand.itemsize
    wide = 2 * max(1, shape.ffn // layout.engine) + 4 * shape.hidden + shape.queries // layout.engine
    logits = 3 * 4 * min(demand.concurrent, demand.prompts * demand.samples) * shape.vocabulary
    return CUDA_GRAPHS + demand.engine_tokens * wide * n + logits


def _host(demand: Demand, layout: Layout, cluster: Cluster) -> tuple[tuple[str, int], ...]:
    parameters = (demand.learning + demand.frozen) * demand.lora.parameters
    layers = demand.shape.layers * demand.shape.layer_parameters * demand.itemsize
    offloaded = layers * cluster.gpus // layout.shard if layout.offload else 0
    return (
        ("processes", cluster.gpus * PROCESS_BYTES),
        ("offloaded base", offloaded),
        (
            "a checkpoint's copy of adapters and optimizer",
            parameters * (footprint.MASTER_BYTES + footprint.ADAMW_BYTES),
        ),
    )
