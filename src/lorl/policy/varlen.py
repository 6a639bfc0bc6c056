"""A forest's attention on a GPU: one FlashAttention call over segments of unlike lengths, exact at any depth.

A segment's tokens see their ancestors and, causally, themselves. So each segment is one sequence of the kernel: its
queries are its own tokens, its keys are its ancestors' from the root down and then its own, gathered into one row of
positions. The kernel aligns its causal mask to the ends of queries and keys, which makes it the forest's. Gathering
keys and values costs a few percent of the attention itself (they are narrow under grouped-query attention, and are
gathered again in the backward pass rather than kept); queries, and everything outside attention, exist once a token.
A forest in which nothing is shared needs no gathering.

The kernel call is opaque to torch.compile, so that one compiled layer serves forests of every shape.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorl.experience import Forest

_TILE = 128  # the kernel's grid is rounded up to its tiles; a longest length that changes little need not differ


@dataclass(frozen=True, slots=True)
class Spans:
    """Which keys the queries of each of N sequences see."""

    queries: Tensor  # int32[N+1], offsets of the sequences into the T tokens
    keys: Tensor  # int32[N+1], offsets of each sequence's keys into `gathered`
    gathered: (
        Tensor  # int64[K + 1], tokens whose keys are read, in order; the last is padding, so that K + 1 is never T
    )
    bounds: (
        Tensor  # int64[3] on the CPU: longest row of queries and of keys, and 1 where `gathered` is not simply all T
    )


def spans(forest: Forest) -> Spans:
    """Spans of a forest, on its device. Segments must be in depth-first order.

    A prompt with a single answer, and any other segment that only one continues, is one sequence with what follows.
    """
    device = forest.tokens.device
    parent, offsets = forest.parent.tolist(), forest.segments.tolist()
    lengths = torch.tensor(offsets).diff()
    continued = Counter(parent)  # by how many segments
    chains: list[list[int]] = []  # of each segment, its ancestors from the root, and itself
    rows: list[list[int]] = []  # segments that are one sequence
    for segment, above in enumerate(parent):
        chains.append([*(chains[above] if above >= 0 else []), segment])
        if above >= 0 and continued[above] == 1:
            rows[-1].append(segment)
        else:
            rows.append([segment])
    rows = [row for row in rows if offsets[row[0]] < offsets[row[-1] + 1]]
    pieces = torch.tensor([piece for row in rows for piece in chains[row[-1]]])
    sizes = lengths[pieces]
    total = int(sizes.sum())
    gathered = torch.arange(total + 1)
    gathered[:total] += torch.repeat_interleave(torch.tensor(offsets)[pieces] - (sizes.cumsum(0) - sizes), sizes)
    gathered[total] = 0
    per_query = torch.tensor([offsets[row[-1] + 1] - offsets[row[0]] for row in rows])
    per_key = torch.tensor([int(lengths[chains[row[-1]]].sum()) for row in rows])
    longest = [-(-int(counts.max()) // _TILE) * _TILE for counts in (per_query, per_key)]
    return Spans(
        queries=_offsets(per_query).to(device),
        keys=_offsets(per_key).to(device),
        gathered=gathered.to(device),
        bounds=torch.tensor([*longest, int(total != offsets[-1])]),
    )


def supports(query: Tensor) -> bool:
    """Whether the kernel takes queries [..., D] of this dtype and size."""
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def attend(query: Tensor, key: Tensor, value: Tensor, where: Spans, *, scale: float, window: int | None) -> Tensor:
    """query [T, H, D], key and value [T, K, D] with K dividing H -> [T, H, D]. Differentiable.

    Args:
        window: A token sees the `window` positions up to its own; None: all.
    """
    reach = -1 if window is None else window - 1
    out, _ = span_attention(query, key, value, where.queries, where.keys, where.gathered, where.bounds, scale, reach)
    return out


@torch.library.custom_op("lorl::span_attention", mutates_args=(), device_types="cuda")
def span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    gathered: Tensor,
    bounds: Tensor,
    scale: float,
    reach: int,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and log-sum-exps float32[H, T]; `reach` is how far back a token sees, -1 without bound."""
    key, value, longest_query, longest_key, _ = _read(key, value, gathered, bounds)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        queries,
        keys,
        longest_query,
        longest_key,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=reach,
        window_size_right=0,
    )
    return out, lse


@span_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        (query.shape[1], query.shape[0]), dtype=torch.float32
    )


@torch.library.custom_op("lorl::span_attention_backward", mutates_args=(), device_types="cuda")
def span_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Tensor,
    keys: Tensor,
    gathered: Tensor,
    bounds: Tensor,
    scale: float,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. A shared key's are summed in float32."""
    keys_read, values_read, longest_query, longest_key, where = _read(key, value, gathered, bounds)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the random state that the kernel asks for
    grad_query, grad_key, grad_value = torch.ops.aten._flash_attention_backward(
        grad,
        query,
        keys_read,
        values_read,
        out,
        lse,
        queries,
        keys,
        longest_query,
        longest_key,
        0.0,
        True,
        no_dropout,
        torch.empty(0, device=query.device),
        scale=scale,
        window_size_left=reach,
        window_size_right=0,
    )
    if where is not None:
        grad_key, grad_value = _scatter(grad_key, where, key), _scatter(grad_value, where, value)
    return grad_query, grad_key, grad_value


@span_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=contiguous),
        torch.empty_like(key, memory_format=contiguous),
        torch.empty_like(value, memory_format=contiguous),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, reach = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale, ctx.reach = scale, reach


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, *where, out, lse = ctx.saved_tensors
    found = span_attention_backward(grad, query, key, value, out, lse, *where, ctx.scale, ctx.reach)
    return *found, None, None, None, None, None, None


span_attention.register_autograd(_backward, setup_context=_remember)


def _read(
    key: Tensor, value: Tensor, gathered: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor, int, int, Tensor | None]:
    """Keys and values as the kernel reads them, its longest rows of queries and of keys, and the tokens that the keys
    are of; None: all, in order."""
    longest_query, longest_key, shared = bounds.tolist()
    if not shared:
        return key, value, longest_query, longest_key, None
    where = gathered[:-1]
    return key[where], value[where], longest_query, longest_key, where


def _scatter(grads: Tensor, where: Tensor, like: Tensor) -> Tensor:
    """Sums the gradients [K, heads, D] of gathered rows into their tokens' [T, heads, D]."""
    total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return total.index_add_(0, where, grads.float()).to(like.dtype)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
