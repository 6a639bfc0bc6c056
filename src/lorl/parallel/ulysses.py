"""Sequence parallelism over packed forests, after DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509).

The N ranks of a part make each training or scoring pass together: each holds T / N of its tokens in everything but
attention. There one all-to-all turns queries, keys and values of all heads for T / N tokens into those of 1 / N of the
heads for all T, so that the forest attends as it would in one process, and a second one turns the output back. Of the
states that the head reads each rank gets an even share, wherever their tokens lie, and what it makes of them (a number
a token) goes to all. So every rank of a part computes the part's loss, from whole sequences; its gradient is that of
its own tokens, and the sum over ranks counts each once.

Rollouts are not split: the engine's passes are a rank's own.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.experience import Forest
from lorl.parallel.group import Ranks
from lorl.policy.attention import ForestAttention, Rule
from lorl.policy.load import load_shape

CALL = "a pass split over ranks"  # in errors

_parts: dict[str, Ranks] = {}  # what `exchange` finds its ranks by: the compiler knows no objects


def check_shape(config: RunConfig) -> None:
    """Raises UserError when passes over the model can't be split over parallel.sequence ranks."""
    ranks, shape = config.parallel.sequence, load_shape(config.model).get_text_config()
    heads = shape.num_attention_heads
    if heads % ranks:
        world = config.parallel.gpus * config.parallel.nodes
        works = [n for n in range(1, heads + 1) if heads % n == 0 and world % n == 0]
        raise UserError(
            f"parallel.sequence={ranks} does not divide the {heads} attention heads of model.path="
            f"{config.model.path!r}; with {world} ranks {_either(works)}"
        )
    found = getattr(shape, "rope_parameters", None) or {}
    for kind in (found, *(one for one in found.values() if isinstance(one, dict))):
        if kind.get("rope_type") in ("dynamic", "longrope"):
            raise UserError(
                f"parallel.sequence={ranks}: the rotary frequencies of model.path={config.model.path!r} "
                f"({kind['rope_type']}) depend on a pass's longest position, which each rank sees another of; use 1"
            )


def check_ranks(config: RunConfig) -> None:
    """Raises UserError when parallel.sequence does not divide the number of ranks."""
    parallel = config.parallel
    ranks = parallel.gpus * parallel.nodes
    if ranks % parallel.sequence:
        works = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise UserError(
            f"parallel.sequence={parallel.sequence} does not divide the number of ranks, parallel.gpus="
            f"{parallel.gpus} on parallel.nodes={parallel.nodes}; {_either(works)}"
        )


class Ulysses:
    """`lorl.policy.policy.SplitPasses` among `ranks`, which all make the same calls."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        _parts[ranks.name] = ranks

    def split(self, forest: Forest) -> tuple[ForestAttention, Tensor, Tensor]:
        """The pass's layout, and this rank's tokens and positions, int64[T / N] each. T is made a multiple of N by
        tokens that are trees of their own: nothing sees them, and nothing is read off them."""
        forest = padded(forest, self._ranks.size)
        own = len(forest.tokens) // self._ranks.size
        mine = slice(own * self._ranks.rank, own * (self._ranks.rank + 1))
        return SplitAttention(forest, self._ranks), forest.tokens[mine], forest.positions[mine]

    def share(self, count: int) -> slice:
        """Which of `count` states this rank reads."""
        bounds = self._bounds(count)
        return slice(bounds[self._ranks.rank], bounds[self._ranks.rank + 1])

    def states(self, hidden: Tensor, at: Tensor) -> Tensor:
        """This rank's `share` of the states of tokens `at`, int64[K], from each rank's `hidden` [T / N, d]."""
        own, (rank, size) = len(hidden), (self._ranks.rank, self._ranks.size)
        at = at.cpu()
        holder = at // own
        reader = torch.repeat_interleave(torch.arange(size), torch.tensor(self._bounds(len(at))).diff())
        sent, mine = holder == rank, holder[self.share(len(at))]
        rows = hidden[(at[sent] - rank * own).to(hidden.device)]
        sends, receives = (torch.bincount(ranks, minlength=size).tolist() for ranks in (reader[sent], mine))
        received = exchange(rows, sends, receives, self._ranks.name)  # by who held them
        return received[torch.argsort(torch.argsort(mine, stable=True)).to(hidden.device)]

    def whole(self, values: Tensor, count: int) -> Tensor:
        """Every rank's share of `count` values, together. What is computed from them must be the same on all ranks: its
        gradient, which each of them has, is passed on as one."""
        found: Tensor = _Whole.apply(values, self.share(count), count, self._ranks)  # type: ignore[assignment]
        return found

    def _bounds(self, count: int) -> list[int]:
        size = self._ranks.size
        return [count * rank // size for rank in range(size + 1)]


class SplitAttention(ForestAttention):
    """A forest's attention, of which each rank computes 1 / N of the heads. `attend` takes and returns this rank's
    tokens of all heads."""

    def __init__(self, forest: Forest, ranks: Ranks) -> None:
        super().__init__(forest)
        self._size = ranks.size
        self._name = ranks.name

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        size = self._size
        repeats = size // math.gcd(size, key.shape[0])  # the fewest that give each rank the keys of its queries
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=0) for x in (key, value))
        parts = [x.unflatten(0, (size, -1)) for x in (query, key, value)]  # [N, H / N, T / N, D], by who computes them
        rows = self._exchange(torch.cat([x.flatten(1) for x in parts], dim=1))
        found = rows.split([x[0].numel() for x in parts], dim=1)
        q, k, v = (x.view(like.shape).transpose(0, 1).flatten(1, 2) for x, like in zip(found, parts, strict=True))
        out = super().attend(layer, q, k, v, rule)  # [H / N, T, D]
        out = out.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
        return self._exchange(out).flatten(0, 1)

    def _exchange(self, rows: Tensor) -> Tensor:
        each = [1] * self._size
        return exchange(rows, each, each, self._name)


def padded(forest: Forest, multiple: int) -> Forest:
    """`forest` with as many tokens more as make it a multiple: roots of one token each."""
    count = -len(forest.tokens) % multiple
    if not count:
        return forest
    token, root = forest.tokens.new_zeros(count), forest.parent.new_full((count,), -1)
    ends = forest.segments[-1] + 1 + torch.arange(count, device=forest.segments.device)
    return Forest(
        tokens=torch.cat([forest.tokens, token]),
        positions=torch.cat([forest.positions, token]),
        segments=torch.cat([forest.segments, ends.to(forest.segments.dtype)]),
        parent=torch.cat([forest.parent, root]),
        previous=torch.cat([forest.previous, token - 1]),
        sampled=forest.sampled,
    )


@torch.library.custom_op("lorl::exchange", mutates_args=())
def exchange(values: Tensor, sends: list[int], receives: list[int], part: str) -> Tensor:
    """`Ranks.exchange`, differentiable, and opaque to torch.compile: torch's own, `all_to_all_single_autograd`, waits
    without a limit that names the rank it waits for."""
    return _parts[part].exchange(values, sends, receives, CALL)


@exchange.register_fake
def _(values: Tensor, sends: list[int], receives: list[int], part: str) -> Tensor:
    return values.new_empty(sum(receives), *values.shape[1:])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.sends, ctx.receives, ctx.part = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return exchange(grad, ctx.receives, ctx.sends, ctx.part), None, None, None


exchange.register_autograd(_backward, setup_context=_remember)


class _Whole(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: slice, count: int, ranks: Ranks) -> Tensor:
        ctx.share = share
        whole = values.new_zeros(count)
        whole[share] = values
        ranks.sum_(whole, CALL)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad[ctx.share], None, None, None


def _either(works: list[int]) -> str:
    return f"use {', '.join(map(str, works[:-1]))} or {works[-1]}" if len(works) > 1 else f"use {works[0]}"
