"""Where the frozen base lies: the strategies, and which of them a cluster allows."""

from dataclasses import dataclass, replace
from typing import Literal

from lorl.plan.demand import Engine
from lorl.plan.hardware import Cluster
from lorl.plan.shape import Shape

Strategy = Literal["ddp", "fsdp", "fsdp2", "shared"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp", "fsdp2", "shared")
GATHERED_LAYERS = 2  # the one that computes, and the next one on its way
_VOCABULARY_PADDING = 64  # vLLM makes the vocabulary a multiple of it


@dataclass(frozen=True, slots=True)
class Layout:
    """How the base is spread.

    ddp: all of it on each GPU, and the engine reads it there. fsdp, fsdp2: a part on each of `shard` GPUs, gathered
    layer by layer for training, beside a copy that a vLLM has in parts on the same GPUs. shared: vLLM's tensor-parallel
    parts on `shard` GPUs are the trainer's as well. With either, an embedded engine on each GPU reads the trainer's
    parts. `offload`: the layers of the trainer's part lie in host memory.
    """

    strategy: Strategy
    shard: int = 1  # GPUs over which the trainer's base is spread
    engine: int = 1  # GPUs of one tensor-parallel engine
    offload: bool = False

    def samples_with(self, engine: Engine) -> bool:
        """Whether it is a layout for this engine: the embedded one is of one GPU, a vLLM of all that hold its parts, of
        layers that are not streamed."""
        if self.streamed:
            return engine == "torch"
        return self.engine == (self.shard if engine == "vllm" else 1)

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
    these are given.

    `shard_size` is how many GPUs a base in parts covers. With a `strategy`, None means all of them, as it does in a
    run; without one, a vLLM covers a node or an even part of it, and parts for the embedded engine a node or
    everything. Streamed layers, which the embedded engine waits for with every token, are there only where `offload` is
    True."""
    if strategy is not None and shard_size is None:
        shard_size = cluster.world  # what a run does whose strategy is named
    whole = [shard_size] if shard_size else sorted({cluster.gpus, cluster.world})
    engines = [n for n in whole if deals_evenly(shape, n)] if shard_size else vllm_sizes(shape, cluster)
    vllms, embedded = ([n for n in sizes if n > 1 and cluster.world % n == 0] for sizes in (engines, whole))
    spreads = [*((n, n) for n in vllms), *((n, 1) for n in embedded)]
    parts = [Layout(kind, *spread) for kind in ("fsdp2", "fsdp") for spread in spreads]
    found = [Layout("ddp"), *(Layout("shared", n, n) for n in vllms), *parts]
    found += [Layout("shared", n) for n in embedded]
    found += [replace(one, offload=True) for one in (Layout("ddp"), *parts)]
    offered = [one for one in found if (not one.streamed if offload is None else one.offload is offload)]
    return [one for one in offered if strategy in (None, one.strategy)]


def vllm_sizes(shape: Shape, cluster: Cluster) -> list[int]:
    """Numbers of GPUs, up to a node's, that one vLLM can be of."""
    return [n for n in range(1, cluster.gpus + 1) if cluster.gpus % n == 0 and deals_evenly(shape, n)]


def deals_evenly(shape: Shape, ranks: int) -> bool:
    """Whether tensor parallelism gives each of `ranks` ranks as much as any other, as a vLLM wants it: heads, inner
    units, rows of the vocabulary (padded), and heads of keys and values, of which several ranks may have the same."""
    padded = -(-shape.vocabulary // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
    shares = shape.kv_heads % ranks == 0 or ranks % shape.kv_heads == 0
    return shares and not (shape.heads % ranks or shape.ffn % ranks or padded % ranks)
