"""Bytes in one node's host memory: the processes, and what a run keeps there so that its GPUs need not hold it.

What is copied to a GPU lies in pinned memory, of which torch gives out powers of two.
"""

from lorl.plan import footprint
from lorl.plan.demand import Demand
from lorl.plan.footprint import Pass
from lorl.plan.hardware import GIB, Cluster
from lorl.plan.layout import Layout
from lorl.plan.lora import Lora

PROCESS_BYTES = 4 * GIB  # Python, torch, CUDA and vLLM of one rank; assumed, not measured
_ALIGNMENT = 256  # of a streamed layer's parameters (lorl.policy.streaming)

OFFLOADED_BASE = "offloaded base"
OFFLOADED_OPTIMIZER = "offloaded optimizer"
OFFLOADED_ACTIVATIONS = "offloaded activations"
MODEL_FILES = "the model's files in /dev/shm"


def host_rows(demand: Demand, layout: Layout, cluster: Cluster, how: Pass, tokens: int) -> tuple[tuple[str, int], ...]:
    """Of one node, by holder. `how` and `tokens`: of a rank's largest training pass."""
    gpus = cluster.gpus
    parameters = sum(lora.parameters for lora in demand.adapters)
    moments = sum(optimizer_bytes(lora) for lora in demand.learning) if demand.optimizer_offload else 0
    saved = parameters * (footprint.MASTER_BYTES + footprint.ADAMW_BYTES)
    return (
        ("processes", gpus * PROCESS_BYTES),
        (MODEL_FILES, demand.shm_files),
        (OFFLOADED_BASE, gpus * base_bytes(demand, layout) if layout.offload else 0),
        (OFFLOADED_OPTIMIZER, gpus * moments),
        (OFFLOADED_ACTIVATIONS, gpus * activation_bytes(demand, how, tokens) if how.away else 0),
        ("a checkpoint's copy of adapters and optimizer", saved),
    )


def base_bytes(demand: Demand, layout: Layout) -> int:
    """A rank's part of the base's layers: one block a layer, with fsdp2 one a parameter. FSDP1 pins as much again, for
    gradients that a frozen base never has."""
    tensors, n = demand.shape.layer_tensors, demand.itemsize
    if layout.streamed:
        layer = pinned(sum(-(-rows * columns * n // _ALIGNMENT) * _ALIGNMENT for rows, columns in tensors))
    elif layout.strategy == "fsdp":
        layer = 2 * pinned(-(-demand.shape.layer_parameters // layout.shard) * n)
    else:
        layer = sum(pinned(-(-rows // layout.shard) * columns * n) for rows, columns in tensors)
    return demand.shape.layers * layer


def optimizer_bytes(lora: Lora) -> int:
    """AdamW's two moments of one adapter."""
    return sum(2 * pinned(size * footprint.ADAMW_BYTES // 2) for size in lora.tensors)


def activation_bytes(demand: Demand, how: Pass, tokens: int) -> int:
    """What a rank's layers keep of a pass, with the adapter that keeps most: their inputs where they are recomputed."""
    shape = demand.shape
    if how.recompute:
        return shape.layers * pinned(tokens * shape.hidden * how.itemsize)
    return max(
        sum(
            pinned(tokens * size)
            for adapted in lora.layers
            for size in footprint.layer_kept_tensors(shape, adapted, lora.rank, how)
        )
        for lora in demand.learning
    )


def pinned(size: int) -> int:
    """What a tensor of `size` bytes takes of pinned memory."""
    return 1 << (size - 1).bit_length() if size else 0
