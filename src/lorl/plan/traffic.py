"""Bytes that ranks send each other in a step: each of N ranks as many as any other, and receives as many.

`lorl.plan.seconds` divides them by the links' rates; `benchmarks/traffic.py` holds them to what a loopback device sent.
"""

import math

from lorl.plan.layout import Layout
from lorl.plan.shape import Shape


def gathered_bytes(shape: Shape, itemsize: int, layout: Layout, *, gradient: bool) -> float:
    """In a pass over a base in parts: its layers, forwards and (`gradient`) backwards. fsdp and fsdp2 have the
    embedding and the head whole; shared gathers each of them once a pass, a tied one twice."""
    if layout.strategy == "ddp":
        return 0.0
    whole = (1 + gradient) * shape.layers * shape.layer_parameters * itemsize
    if layout.strategy == "shared":
        whole += 2 * shape.embedding_parameters * itemsize
    return whole * (layout.shard - 1) / layout.shard


def reduced_bytes(size: int, ranks: int) -> float:
    """In an all-reduce of `size` bytes: every rank's parts to the one that adds them, and the sums to every rank."""
    return 2 * size * (ranks - 1) / ranks


def exchanged_bytes(
    shape: Shape, itemsize: int, tokens: float, ranks: int, *, gradient: bool, recompute: bool
) -> float:
    """In a pass over `tokens` packed tokens that `ranks` ranks split (`lorl.parallel.ulysses`): each layer's queries,
    keys, values and output of the attention, backwards their gradients, and all once more where layers are recomputed.

    The states that the head reads are not counted: holders and readers go through the batch in the same order, so that
    few of them move.
    """
    repeats = ranks // math.gcd(ranks, shape.kv_heads)
    width = 2 * shape.queries + 2 * repeats * shape.keys
    whole = tokens * shape.layers * width * itemsize * (1 + gradient * (1 + recompute))
    return whole / ranks * (ranks - 1) / ranks
