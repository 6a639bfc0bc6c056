"""Bytes on one GPU and in one node's host memory, by what holds them, while a run samples and while it trains."""

from dataclasses import dataclass, replace

from lorl.plan import footprint
from lorl.plan.demand import Demand
from lorl.plan.hardware import RESERVE, Cluster
from lorl.plan.host import host_rows
from lorl.plan.layout import GATHERED_LAYERS, Layout

ACTIVATIONS = "activations of a micro-batch"
GATHERED = "gathered layers of the base"


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
    """The table of one layout. `demand.recompute="auto"` recomputes where activations would not fit the GPU, whether
    they are to stay there or not: bringing a layer's back over PCIe takes longer than computing them again."""
    if demand.recompute != "auto":
        return _memory(demand, layout, cluster, recompute=demand.recompute)
    plain = _memory(replace(demand, activation_offload=False), layout, cluster, recompute=False)
    held = plain.row(ACTIVATIONS).training
    crowded = held > footprint.SPARE * (plain.capacity - plain.training + held) or not plain.has_cache
    return _memory(demand, layout, cluster, recompute=crowded)


def _memory(demand: Demand, layout: Layout, cluster: Cluster, *, recompute: bool) -> Memory:
    shape, lora, n = demand.shape, demand.lora, demand.itemsize
    how, tokens = demand.passes_as(recompute=recompute), demand.microbatch(cluster.world)
    base, copy = _base_bytes(demand, layout)
    worst, decoding = _worst_moment(demand, layout, tokens, how), _gathered_in_decoding(demand, layout)
    learning, adapters = demand.learning, demand.learning + demand.frozen
    masters = adapters * lora.parameters * footprint.MASTER_BYTES
    gradients = learning * lora.parameters * footprint.GRADIENT_BYTES
    moments = 0 if demand.optimizer_offload else learning * lora.parameters * footprint.ADAMW_BYTES
    vllm = demand.engine == "vllm"
    slots = footprint.slot_bytes(shape, lora, n, demand.slots, layout.engine) if vllm else 0
    rows = min(demand.concurrent, demand.prompts * demand.samples)
    engine = footprint.engine_bytes(shape, n, demand.engine_tokens, rows, layout.engine) if vllm else 0
    reserve = int(RESERVE * cluster.gpu.memory)
    rows = [
        Row("base", base, base),
        Row("engine's own copy of the base", copy, copy),
        Row("adapters, float32 masters", masters, masters),
        Row("gradients", gradients, gradients),
        Row("optimizer", moments, moments + worst.optimizer),
        Row("engine's adapter slots", slots, slots),
        Row("engine's graphs and buffers", engine, engine),
        Row("CUDA, NCCL, fragmentation", reserve, reserve),
    ]
    per_token = footprint.kv_bytes(shape, n, layout.engine)
    smallest = per_token * (demand.longest + footprint.SPARE_TOKENS)
    room = cluster.gpu.memory - sum(row.sampling for row in rows) - decoding
    cache = footprint.kv_cache(
        total=cluster.gpu.memory,
        room=room,
        training=worst.total - decoding,
        fraction=demand.memory_fraction,
        smallest=smallest,
        fullest=footprint.fullest_cache(per_token, demand.concurrent, demand.longest),
        rest=demand.rest if vllm else "always",
    )
    rows += [
        Row("KV cache", cache.wanted, 0 if cache.rests else cache.wanted),
        Row(ACTIVATIONS, 0, worst.activations),
        Row("log-probability head's chunks", 0, worst.head),
        Row(GATHERED, decoding, worst.gathered),
    ]
    return Memory(
        rows=tuple(rows),
        host=host_rows(demand, layout, cluster, how, tokens),
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
    if layout.strategy in ("ddp", "shared") and not layout.offload:
        return -(-whole // layout.shard), 0
    layers = demand.shape.layers * demand.shape.layer_parameters * demand.itemsize
    ends = whole - layers  # read out of order, and so whole on each rank (lorl.parallel.sharding, .policy.streaming)
    copy = -(-whole // layout.engine) if demand.engine == "vllm" else 0  # the embedded engine reads the trainer's
    return ends + (0 if layout.offload else -(-layers // layout.shard)), copy


@dataclass(frozen=True, slots=True)
class _Moment:
    """What training holds at one time, beyond what is always there."""

    activations: int = 0
    head: int = 0
    gathered: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.head + self.gathered + self.optimizer


def _worst_moment(demand: Demand, layout: Layout, tokens: int, how: footprint.Pass) -> _Moment:
    """A layer's backward pass, the head, or a step of an optimizer whose moments have come for it. None of them goes
    on beside another, and adapters take their steps one by one."""
    shape = demand.shape
    kept = footprint.kept_bytes(shape, demand.lora, tokens, how)
    layer = footprint.layer_moment_bytes(shape, demand.lora, tokens, how)
    head = footprint.head_moment_bytes(shape, tokens, how, "cuda")
    layers, weight = _gathered(demand, layout)
    moments = [_Moment(kept + layer, gathered=layers), _Moment(kept, head, weight)]
    if demand.optimizer_offload:
        moments.append(_Moment(optimizer=demand.lora.parameters * footprint.ADAMW_BYTES))
    return max(moments, key=lambda moment: moment.total)


def _gathered(demand: Demand, layout: Layout) -> tuple[int, int]:
    """What a pass brings to a GPU: while it is in the layers, and for the head."""
    if not layout.offload and (layout.strategy == "ddp" or layout.shard == 1):
        return 0, 0
    layers = GATHERED_LAYERS * demand.shape.layer_parameters * demand.itemsize
    head = demand.shape.embedding_parameters * demand.itemsize if layout.strategy == "shared" else 0
    return layers, head


def _gathered_in_decoding(demand: Demand, layout: Layout) -> int:
    """The embedded engine's passes over the base are as the trainer's."""
    return max(_gathered(demand, layout)) if demand.engine == "torch" else 0
