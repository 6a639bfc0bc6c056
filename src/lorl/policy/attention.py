"""Attention as a property of the batch's layout, plugged into any Hugging Face model that dispatches its attention.

transformers calls one function for every layer (`AttentionInterface`). Here that function asks the layout that came
with the batch: a `ForestAttention` (packed training, scoring and prefill) or the engine's decoding state. The model's
own code, and its KV-cache classes, are not involved.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from lorl.errors import UserError
from lorl.experience import Forest
from lorl.policy import varlen

NAME = "lorl"


class Rule(NamedTuple):
    """How a layer scores what its tokens see."""

    scale: float  # of the product of query and key
    window: int | None = None  # a token sees so many positions up to its own; None: all
    cap: float | None = None  # scaled scores s become cap * tanh(s / cap) (Gemma 2, arXiv 2408.00118); None: they stay

    def scores(self, products: Tensor) -> Tensor:
        """Of products of queries and keys."""
        scaled = products * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


class Layout(Protocol):
    """How the tokens of one forward pass attend to each other and to what came before."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """query [H, T, D], key and value [K, T, D] with K dividing H -> [H, T, D]."""
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if s_aux is not None:
        raise UserError(f"{type(module).__name__} uses attention sinks, which lorl's attention does not compute.")
    query, key = query.to(value.dtype), key.to(value.dtype)  # float32 where `rounding` has them rotated in it
    rule = Rule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    # Only a cache asks which layer this is. A layer being compiled must not: it would be compiled again for each index.
    layer: Any = -1 if torch.compiler.is_compiling() else module.layer_idx
    out = layout.attend(layer, query[0], key[0], value[0], rule)
    return out.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def ancestry(forest: Forest) -> Tensor:
    """bool[N, N]: `[i, j]` is true where segment j is segment i or one of its ancestors."""
    count = forest.parent.numel()
    seen = torch.eye(count, dtype=torch.bool)
    for segment, parent in enumerate(forest.parent.tolist()):
        if parent >= 0:
            seen[segment] |= seen[parent]
    return seen


@dataclass(frozen=True, slots=True)
class Unit:
    """Tokens [start, end), which attend among themselves and to the `context` tokens before them."""

    start: int
    end: int
    context: tuple[int, int] | None  # [start, end) of the root that they hang off

    def keys(self, x: Tensor) -> Tensor:
        """[K, T, ...] -> [K, context + own, ...]."""
        own = x[:, self.start : self.end]
        return own if self.context is None else torch.cat([x[:, self.context[0] : self.context[1]], own], dim=1)


def units(forest: Forest) -> list[Unit]:
    """Cuts the forest into attention calls, in token order."""
    parent, offsets = forest.parent.tolist(), forest.segments.tolist()
    inner = {p for p in parent if p >= 0}  # segments with children
    shared = {parent[s] for s in inner if parent[s] >= 0 and parent[parent[s]] < 0}  # roots above several prompts
    found: list[Unit] = []
    for segment, above in enumerate(parent):
        start, end = offsets[segment], offsets[segment + 1]
        if above < 0 or above in shared:
            found.append(Unit(start, end, (offsets[above], offsets[above + 1]) if above >= 0 else None))
        else:
            found[-1] = replace(found[-1], end=end)
    return [unit for unit in found if unit.start < unit.end]


class ForestAttention:
    """Every tree of the forest attends within itself, each shared segment once.

    On the CPU the forest is a few calls of scaled-dot-product attention with dense masks: one a tree, or, where a
    tree's root is itself shared by several prompts, one a prompt with the root's keys in front. On a GPU in half
    precision it is one FlashAttention call (see `lorl.policy.varlen`), but for capped scores.
    With `record` set, the keys and values of every layer are kept: that is how the engine fills its cache.

    Segments must be in depth-first order: a segment's descendants follow it without a gap.
    """

    def __init__(self, forest: Forest, *, record: bool = False) -> None:
        self._forest = forest
        self.spans = varlen.spans(forest) if forest.tokens.is_cuda else None
        self._dense: _DenseAttention | None = None
        self.recorded: dict[int, tuple[Tensor, Tensor]] | None = {} if record else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        if self.recorded is not None:
            self.recorded[layer] = (key, value)
        if self.spans is not None and rule.cap is None and varlen.supports(query):
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
            return varlen.attend(q, k, v, self.spans, scale=rule.scale, window=rule.window).transpose(0, 1)
        if self._dense is None:
            self._dense = _DenseAttention(self._forest)
        return self._dense.attend(query, key, value, rule)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, rule: Rule) -> Tensor:
    """query [H, Q, D], key and value [K, S, D], allowed bool[Q, S] -> [H, Q, D]."""
    key, value = (x.repeat_interleave(len(query) // len(key), dim=0) for x in (key, value))
    scores = rule.scores(query @ key.transpose(-1, -2)).masked_fill(~allowed, -torch.inf)
    return torch.softmax(scores.float(), dim=-1).to(query.dtype) @ value


class _DenseAttention:
    """Attention unit by unit, with a mask over all of a unit's pairs of tokens where plain causal order won't do."""

    def __init__(self, forest: Forest) -> None:
        device = forest.tokens.device
        lengths = (forest.segments[1:] - forest.segments[:-1]).to(torch.int64).cpu()
        self._ancestry = ancestry(forest).to(device)
        self._segment = torch.repeat_interleave(torch.arange(lengths.numel()), lengths).to(device)
        self._positions = forest.positions
        self._units = units(forest)
        self._masks: dict[int | None, list[Tensor | None]] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """As `Layout.attend`."""
        if rule.window not in self._masks:
            self._masks[rule.window] = [self._allowed(unit, rule.window) for unit in self._units]
        if rule.cap is not None:
            return self._capped(query, key, value, rule)
        grouped = query.shape[0] != key.shape[0]
        if grouped and query.is_cuda:  # the memory-saving kernel for float32 takes no grouped heads
            key, value = (x.repeat_interleave(query.shape[0] // key.shape[0], dim=0) for x in (key, value))
            grouped = False
        pieces = []
        for unit, mask in zip(self._units, self._masks[rule.window], strict=True):
            q = query[None, :, unit.start : unit.end]
            k, v = (unit.keys(x)[None] for x in (key, value))
            pieces.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=rule.scale, enable_gqa=grouped
                )[0]
            )
        return torch.cat(pieces, dim=1)

    def _capped(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """No kernel of torch's caps scores. Those of a unit [H, own, context + own] are made again for its gradient."""
        pieces = []
        for unit, mask in zip(self._units, self._masks[rule.window], strict=True):
            q = query[:, unit.start : unit.end]
            k, v = unit.keys(key), unit.keys(value)
            allowed = q.new_ones(q.shape[1], k.shape[1], dtype=torch.bool).tril() if mask is None else mask
            pieces.append(checkpoint(_plain_attention, q, k, v, allowed, rule, use_reentrant=False))
        return torch.cat(pieces, dim=1)

    def _allowed(self, unit: Unit, window: int | None) -> Tensor | None:
        """bool[queries, keys] of a unit; None where plain causal attention says the same (a lone segment)."""
        segment, positions = (x[unit.start : unit.end] for x in (self._segment, self._positions))
        if window is None and not unit.context and bool((segment == segment[0]).all()):
            return None
        key_segment, key_positions = (unit.keys(x[None])[0] for x in (self._segment, self._positions))
        allowed = self._ancestry[segment[:, None], key_segment] & (positions[:, None] >= key_positions)
        return allowed if window is None else allowed & (positions[:, None] - key_positions < window)
