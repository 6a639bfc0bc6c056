"""Bytes on one GPU and in one node's host memory, by what holds them, while a run samples and while it trains."""

from dataclasses import dataclass, replace

from lorl.plan import footprint
from lorl.plan.demand import Demand
from lorl.plan.hardware import RESERVE, Cluster
from lorl.plan.host import host_rows
from lorl.plan.layout import GATHERED_LAYERS, Layout

BASE = "base"
COPY = "engine's own copy of the base"
MASTERS = "adapters, float32 masters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
SLOTS = "engine's adapter slots"
ENGINE = "engine's graphs and buffers"
FOLD = "what undoes a fold"
OTHERS = "in use already"
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
    recompute: bool
    without_recompute: int  # activations that a pass keeps where it does not recompute
    with_recompute: int
    fold: int  # what folding the adapter into the base takes while sampling, whether the run folds or not

    @property
    def can_fold(self) -> bool:
        """Whether rollouts can fold the adapter beside the KV cache that is wanted."""
        return self.row(FOLD).sampling > 0 or self.sampling + self.fold <= self.capacity

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
        """Bytes that a GPU, or a KV cache for one sample, lacks; negative: that are left."""
        return max(self.peak - self.capacity, self.cache.smallest - self.cache.most, self.cache.lacks)

    @property
    def has_cache(self) -> bool:
        """Whether the KV cache that is asked for can be had."""
        return self.cache.smallest <= self.cache.wanted <= self.cache.most

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity and self.has_cache

    def row(self, holder: str) -> Row:
        return next(row for row in self.rows if row.holder == holder)


def memory(demand: Demand, layout: Layout, cluster: Cluster, others: int = 0) -> Memory:
    """The table of one layout; `others` are bytes of a device that are in use before the run. `demand.recompute="auto"`
    recomputes where activations would not fit the GPU, whether they are to stay there or not: bringing a layer's back
    over PCIe takes longer than computing them again."""
    if demand.recompute != "auto":
        return _memory(demand, layout, cluster, others, recompute=demand.recompute)
    plain = _memory(replace(demand, activation_offload=False), layout, cluster, others, recompute=False)
    held = plain.row(ACTIVATIONS).training
    crowded = held > footprint.SPARE * (plain.capacity - plain.training + held) or not plain.has_cache
    return _memory(demand, layout, cluster, others, recompute=crowded)


def _memory(demand: Demand, layout: Layout, cluster: Cluster, others: int, *, recompute: bool) -> Memory:
    shape, n = demand.shape, demand.itemsize
    tokens = demand.microbatch(cluster.world)
    how = demand.passes_as(tokens, recompute=recompute)
    base, copy = _base_bytes(demand, layout)
    worst, decoding = _worst_moment(demand, layout, tokens, how), _gathered_in_decoding(demand, layout)
    learning = sum(lora.parameters for lora in demand.learning)
    masters = sum(lora.parameters for lora in demand.adapters) * footprint.MASTER_BYTES
    gradients = learning * footprint.GRADIENT_BYTES
    moments = 0 if demand.optimizer_offload else learning * footprint.ADAMW_BYTES
    vllm = demand.engine == "vllm"
    slots = footprint.slot_bytes(shape, demand.lora.rank, n, demand.slots, layout.engine) if vllm else 0
    engine = _engine_bytes(demand, layout) if vllm else 0
    fold = footprint.fold_bytes(demand.lora, n) if vllm and layout == Layout("ddp") else 0
    reserve = int(RESERVE * cluster.gpu.memory)
    rows = [
        Row(BASE, base, base),
        Row(COPY, copy, copy),
        Row(MASTERS, masters, masters),
        Row(GRADIENTS, gradients, gradients),
        Row(OPTIMIZER, moments, moments + worst.optimizer),
        Row(SLOTS, slots, slots),
        Row(ENGINE, engine, engine),
        Row(FOLD, fold if demand.folds else 0, 0),
        Row("reward model of its own", demand.classifier, demand.classifier),
        Row("CUDA, NCCL, fragmentation", reserve, reserve),
        Row(OTHERS, others, others),
    ]
    per_token = footprint.kv_bytes(shape, n, layout.engine)
    total, fraction = cluster.gpu.memory, demand.memory_fraction
    cache = footprint.kv_cache(
        room=total - sum(row.sampling for row in rows) - decoding,
        training=worst.total,
        sampling=decoding + (fold if demand.folds else 0),
        asked=None if fraction is None else int(fraction * total),
        usual=footprint.usual_cache(total, demand.device),
        smallest=per_token * (demand.longest + footprint.SPARE_TOKENS),
        fullest=footprint.fullest_cache(per_token, demand.concurrent, demand.longest, demand.device),
        rest=demand.rest if vllm else "always",
        share=footprint.SPARE if demand.recompute == "auto" and not recompute else 1.0,  # beyond it, it would recompute
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
        recompute=recompute,
        without_recompute=_activations(demand, tokens, demand.passes_as(tokens, recompute=False)),
        with_recompute=_activations(demand, tokens, demand.passes_as(tokens, recompute=True)),
        fold=fold,
    )


def _activations(demand: Demand, tokens: int, how: footprint.Pass) -> int:
    """Of the adapter whose pass holds most: the policy and a critic have theirs one after the other."""
    return max(footprint.activation_bytes(demand.shape, lora, tokens, how) for lora in demand.learning)


def _engine_bytes(demand: Demand, layout: Layout) -> int:
    """vLLM's graphs and buffers on a GPU; on a CPU there is nothing like them."""
    if demand.device == "cpu":
        return 0
    rows = min(demand.concurrent, demand.prompts * demand.samples)
    return footprint.engine_bytes(demand.shape, demand.itemsize, demand.engine_tokens, rows, layout.engine)


def _base_bytes(demand: Demand, layout: Layout) -> tuple[int, int]:
    """The trainer's part of the base on a GPU, and the engine's copy where it has one."""
    whole = demand.parameters * demand.itemsize
    if layout.strategy in ("ddp", "shared") and not layout.offload:
        return -(-whole // layout.shard), 0
    # The ends are read out of order, and so whole on each rank (lorl.parallel.sharding, .policy.streaming).
    ends = (demand.shape.parameters - demand.shape.layers * demand.shape.layer_parameters) * demand.itemsize
    layers = whole - ends
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
    """A layer's backward pass, the policy's head, or a step of an optimizer whose moments have come for it. None of
    them goes on beside another, and adapters take their steps one by one."""
    shape = demand.shape
    kept = footprint.kept_bytes(shape, demand.lora, tokens, how)
    head = footprint.head_moment_bytes(shape, tokens, how, demand.device)
    layers, weight = _gathered(demand, layout)
    moments = [_Moment(_activations(demand, tokens, how), gathered=layers), _Moment(kept, head, weight)]
    if demand.optimizer_offload:
        largest = max(lora.parameters for lora in demand.learning)
        moments.append(_Moment(optimizer=largest * footprint.ADAMW_BYTES))
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
