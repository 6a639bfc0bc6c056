"""Where the frozen base lies: the strategies, and which of them a cluster allows."""

from dataclasses import dataclass, replace
from typing import Literal

from lorl.plan.hardware import Cluster
from lorl.plan.shape import Shape

Strategy = Literal["ddp", "fsdp", "fsdp2", "shared"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp", "fsdp2", "shared")
GATHERED_LAYERS = 2  # the one that computes, and the next one on its way


@dataclass(frozen=True, slots=True)
class Layout:
    """How the base is spread.

    ddp: all of it on each GPU, and the engine reads it there. fsdp, fsdp2: a part on each of `shard` GPUs, gathered
    layer by layer for training, beside a copy that `engine` GPUs hold for sampling. shared: the engine's
    tensor-parallel parts on `shard` GPUs are the trainer's as well. `offload`: the layers of the trainer's part lie in
    host memory.
    """

    strategy: Strategy
    shard: int = 1  # GPUs over which the trainer's base is spread
    engine: int = 1  # GPUs of one tensor-parallel engine
    offload: bool = False

    @property
    def streamed(self) -> bool:
        """Whether each GPU copies all layers from the host, one after the other, for every pass, the engine's too."""
        return self.strategy == "ddp" and self.offload

    @property
    def name(self) -> str:
        parts = [self.strategy]
        if self.strategy != "ddp":
            parts.append(f"base over {self.shard}")
        if self.strategy in ("fsdp", "fsdp2"):
            parts.append(f"engine over {self.engine}")
        return ", ".join([*parts, *(["offloaded"] if self.offload else [])])


def layouts(
    shape: Shape,
    cluster: Cluster,
    strategy: Strategy | None = None,
    offload: bool | None = None,
    shard_size: int | None = None,
) -> list[Layout]:
    """All layouts that split the model evenly, simpler ones first; of one strategy, and with or without offload, where
    these are given. Engines stay within a node; a sharded base covers `shard_size` GPUs, or a node or everything.
    Streamed layers, which the embedded engine waits for with every token, are there only where `offload` is True."""
    ways = tensor_parallel_ways(shape, cluster)
    sizes = (cluster.gpus, cluster.world) if shard_size is None else (shard_size,)
    shards = sorted({n for n in sizes if n > 1})
    found = [Layout("ddp"), *(Layout("shared", n, n) for n in ways if n > 1 and shard_size in (None, n))]
    parts = [Layout(kind, shard, engine) for kind in ("fsdp2", "fsdp") for shard in shards for engine in ways]
    found += [*parts, Layout("ddp", offload=True), *(replace(one, offload=True) for one in parts)]
    offered = [one for one in found if (not one.streamed if offload is None else one.offload is offload)]
    return [one for one in offered if strategy in (None, one.strategy)]


def tensor_parallel_ways(shape: Shape, cluster: Cluster) -> list[int]:
    """Powers of two that divide a node's GPUs, the heads and the inner size."""
    powers = [2**i for i in range(cluster.gpus.bit_length())]
    return [n for n in powers if cluster.gpus % n == 0 and shape.heads % n == 0 and shape.ffn % n == 0]
