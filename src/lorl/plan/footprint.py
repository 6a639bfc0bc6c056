"""Bytes that training and sampling hold, from a model's shape: the formulas of the plan, which is a run's budget too.

What a layer keeps for its backward pass is an enumeration of the tensors that autograd saves: tests/plan compares it
with what autograd does save. `eager` is torch as it runs on a CPU; otherwise the layers are compiled (a GPU in half
precision), and the activation function is computed again from what is kept anyway: which tensors the compiler keeps is
inferred from what an H100's passes took at 1.5B, and holds there to 1% (5% with recomputation).
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

from lorl.plan.lora import Lora, lora_on, slot_rank
from lorl.plan.shape import Projection, Shape
from lorl.policy.logprobs import CHUNK_BYTES

BLOCK_TOKENS = {"cuda": 16, "cpu": 128}  # of vLLM's cache
SPARE = 0.8  # share of the free memory that kept activations may take; else layers are recomputed
SPARE_TOKENS = 512  # beyond the samples: a publish's proof
MASTER_BYTES = 4  # float32, whatever the base's dtype
GRADIENT_BYTES = 4
ADAMW_BYTES = 8  # two float32 moments
FOLD_LOST = 0.05  # share of the weights that a fold remembers one by one: 0.034 seen where deltas are 4% of them
CUDA_GRAPHS = 2**30  # vLLM's graphs and their pool
CPU_CACHE = 4 * 2**30  # of vLLM at most, where rollout.memory_fraction is not set: a laptop does other things too


@dataclass(frozen=True, slots=True)
class Pass:
    """How a training pass computes."""

    itemsize: int  # bytes of the base's dtype
    eager: bool
    recompute: bool  # only the layers' inputs are kept, and a layer is computed again when its gradient is due
    entropy: bool = False
    away: bool = False  # what layers keep waits in host memory (`lorl.policy.activations`)
    span: int = 0  # tokens of the trees that dense masks are made for (a CPU's attention); 0: none are

    @property
    def cast(self) -> bool:
        """Whether float32 masters and norms are cast from and to the base's dtype."""
        return self.itemsize < MASTER_BYTES


def layer_kept_tensors(shape: Shape, adapted: tuple[Projection, ...], rank: int, how: Pass) -> list[int]:
    """Bytes a token of each tensor that one layer with these adapted projections keeps for the backward pass."""
    n = how.itemsize
    norm = 4 if how.eager and how.cast else n  # eagerly, a norm keeps the float32 copy that it works on
    read = {one.reads for one in adapted}  # inputs of adapted projections, which A's gradient needs
    hidden = [norm] * shape.norms + [n] * (("attention_norm" in read) + ("ffn_norm" in read))
    queries, keys = [n, n], [n, n]  # attention's queries and output, its keys and values
    if how.eager and "attention" in read:
        queries.append(n)  # the output, laid out anew
    if shape.qk_norm:
        queries.append(norm)
        keys.append(norm)
    ffn = [n] * (2 + how.eager + ("product" in read))  # gate and up, activated gate, product
    wide = ((hidden, shape.hidden), (queries, shape.queries), (keys, shape.keys), (ffn, shape.ffn))
    small = [rank * n] * len(adapted) + [4 * shape.heads] + [4] * (shape.norms if how.eager else 0) + [how.span * n]
    return [size * width for sizes, width in wide for size in sizes] + small


def layer_kept_bytes(shape: Shape, adapted: tuple[Projection, ...], rank: int, how: Pass) -> int:
    """Of one token in one layer."""
    return sum(layer_kept_tensors(shape, adapted, rank, how))


def kept_bytes(shape: Shape, lora: Lora, tokens: int, how: Pass) -> int:
    """On the device, of a pass over `tokens` packed tokens, at the end of its forward half."""
    ends = (4 if how.cast else how.itemsize) * shape.hidden + 2 * shape.head_dim * how.itemsize  # final norm, rotations
    casts = how.itemsize * lora.parameters if how.cast else 0
    if how.away:
        return tokens * (ends + how.span) + casts
    if how.recompute:
        return tokens * (shape.layers * shape.hidden * how.itemsize + ends + how.span) + casts
    kinds = Counter(lora.layers)
    layers = sum(count * layer_kept_bytes(shape, adapted, lora.rank, how) for adapted, count in kinds.items())
    return tokens * (layers + ends) + casts


def away_bytes(shape: Shape, lora: Lora, tokens: int, how: Pass) -> int:
    """What a pass that is `how.away` keeps in host memory."""
    return kept_bytes(shape, lora, tokens, replace(how, away=False)) - kept_bytes(shape, lora, tokens, how)


def layer_moment_bytes(shape: Shape, lora: Lora, tokens: int, how: Pass) -> int:
    """What the pass holds at its worst layer, beyond `kept_bytes`: gradients, and a layer that is recomputed or comes
    back from the host. Those that leave for it are one in the making and one on its way."""
    gradients = how.itemsize * (2 * shape.ffn + 2 * shape.hidden)
    layer = max(layer_kept_bytes(shape, adapted, lora.rank, how) for adapted in set(lora.layers))
    if how.recompute:
        return tokens * (gradients + layer + (how.itemsize * shape.hidden if how.away else 0))
    return tokens * (max(gradients + layer, 2 * layer) if how.away else gradients)


def activation_bytes(shape: Shape, lora: Lora, tokens: int, how: Pass) -> int:
    """What a pass holds at its worst layer."""
    return kept_bytes(shape, lora, tokens, how) + layer_moment_bytes(shape, lora, tokens, how)


def head_moment_bytes(shape: Shape, targets: int, how: Pass, device: str) -> int:
    """What the log-probabilities of `targets` tokens hold at their worst: states, directions, and a chunk's arrays."""
    row = max(4, how.itemsize) * shape.vocabulary  # `linear_logits`
    rows = min(targets, max(1, CHUNK_BYTES[device] // max(row, 1)))
    wide = 4 if how.eager else how.itemsize
    arrays = row + (2 + 2 * how.entropy) * wide * shape.vocabulary
    return rows * arrays + targets * how.itemsize * shape.hidden * (2 + how.entropy)


def kv_bytes(shape: Shape, itemsize: int, ways: int = 1) -> int:
    """Keys and values of one token over all layers, on each of `ways` tensor-parallel ranks."""
    return 2 * shape.layers * math.ceil(shape.kv_heads / ways) * shape.head_dim * itemsize


def slot_bytes(shape: Shape, rank: int, itemsize: int, slots: int, ways: int = 1) -> int:
    """vLLM's slots for adapters of `rank`, whatever layers these reach: all linear ones have one, and the head too."""
    lora = lora_on(shape, slot_rank(rank), "all-linear")
    head = lora.rank * (shape.hidden + shape.vocabulary // ways)
    return slots * itemsize * (lora.slot_parameters(ways) + head)


def fold_bytes(lora: Lora, itemsize: int) -> int:
    """An adapter folded into the base (`lorl.policy.fold`): its factors, the weights that undoing would get wrong, with
    their places, and at the largest of them its float32 product and two copies."""
    sizes = [one.inputs * one.outputs for layer in lora.layers for one in layer]
    record = min(int(FOLD_LOST * sum(sizes)) * (4 + itemsize), itemsize * sum(sizes))
    return MASTER_BYTES * lora.parameters + record + max(sizes, default=0) * (4 + 2 * itemsize)


def engine_bytes(shape: Shape, itemsize: int, tokens: int, rows: int, ways: int = 1) -> int:
    """vLLM's graphs, the activations of its largest pass over `tokens`, and the logits of `rows` samples."""
    wide = 2 * max(1, shape.ffn // ways) + 4 * shape.hidden + shape.queries // ways
    return CUDA_GRAPHS + tokens * wide * itemsize + 3 * 4 * rows * shape.vocabulary


@dataclass(frozen=True, slots=True)
class Cache:
    """How large an engine's KV cache is to be. It can be where `smallest <= wanted <= most`."""

    room: int  # what else is always there leaves of the device
    training: int  # the largest forward and backward pass, beyond what only sampling takes; negative: that is more
    smallest: int  # holds one sample
    wanted: int
    most: int
    rests: bool  # it gives its memory back while the policy trains

    @property
    def lacks(self) -> int:
        """Bytes that what is wanted is short of one sample; negative: that are beyond it."""
        return self.smallest - self.wanted


def fullest_cache(per_token: int, sequences: int, tokens: int, device: str) -> int:
    """Bytes of keys and values when `sequences` of `tokens` each are all there, the last block of each begun."""
    return per_token * (sequences * (tokens + BLOCK_TOKENS[device]) + SPARE_TOKENS)


def usual_cache(total: int, device: str) -> int:
    """What a KV cache takes at most where rollout.memory_fraction does not say, of a device of `total` bytes."""
    return min(int(0.4 * total), CPU_CACHE) if device == "cpu" else int(0.4 * total)


def kv_cache(
    *,
    room: int,
    training: int,
    sampling: int,
    asked: int | None,
    usual: int,
    smallest: int,
    fullest: int,
    rest: str,
    share: float = 1.0,
) -> Cache:
    """Divides what is left of a device between the KV cache and training. All in bytes.

    Args:
        room: what base, adapters, engine and reserve leave of the device, and what only sampling takes.
        training: the largest forward and backward pass. sampling: what only sampling takes, which is gone by then.
        asked: what `rollout.memory_fraction` says; None: what rollouts can fill, the `usual`, or what fits, whichever
            is least. What the cache leaves, activations may keep instead of being computed again.
        smallest: a cache that holds one sample; fullest: one that no rollout of this run fills.
        rest: `rollout.rest`: auto, always or never; auto where training would take more than `share` of what the
            cache leaves.
    """
    beyond = training - sampling
    most = room if rest != "never" else room - max(0, beyond)
    wanted = max(smallest, min(usual, most, fullest)) if asked is None else asked
    rests = rest == "always" or (rest == "auto" and training > share * (room + sampling - wanted))
    return Cache(room, beyond, smallest, wanted, most, rests)
