"""Log-probabilities and entropies of given tokens from hidden states, in chunks: never `[M, vocab]` at a time.

With z = h W^T / temperature, p = softmax(z):

    log p(y)          = z_y - logsumexp(z)              d/dh = (W_y - E_p[W]) / temperature
    H = -sum p log p  = logsumexp(z) - E_p[z]           d/dh = -(E_p[(log p + H) W]) / temperature

Neither gradient depends on the loss but for a factor per token, so the forward pass, which has the chunk's p at hand,
computes the two [M, hidden] directions and the backward pass only scales them: the head's matrix product is never
done a second time, and nothing of vocabulary width outlives its chunk.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}  # of one chunk's logits; a chunk holds a few such arrays
MIN_COMPILED = 512  # rows of a GPU's pass; below it, compiling what is done to the logits costs more than it saves


class _LinearLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        need_entropy: bool,
        squares: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """hidden [M, d], weight [V, d], targets int64[M] -> log-probabilities float32[M], entropies float32[M]."""
        need_grad = ctx.needs_input_grad[0]
        logprobs = torch.empty(hidden.shape[0], dtype=_wide(hidden.dtype), device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        toward = torch.empty_like(hidden) if need_grad else None
        spread = torch.empty_like(hidden) if need_grad and need_entropy else None
        reads: Callable[..., tuple[Any, ...]]
        reads = _compiled_reads() if hidden.is_cuda and hidden.shape[0] >= MIN_COMPILED else _read_logits
        for rows in _chunks(hidden, weight.shape[0], 4):
            wanted = (need_grad, need_entropy, squares is not None)
            logits = linear_logits(hidden[rows], weight)
            chosen, p, ent, square, surprise = reads(logits, targets[rows], temperature, hidden.dtype, *wanted)
            logprobs[rows] = chosen
            if square is not None and squares is not None:
                squares[rows] = square
            if ent is not None:
                entropy[rows] = ent
            if toward is not None:
                toward[rows] = (weight[targets[rows]] - p @ weight) / temperature
            if spread is not None:
                spread[rows] = surprise @ weight / -temperature
        ctx.save_for_backward(toward, spread)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        toward, spread = ctx.saved_tensors
        grad = toward * grad_logprobs.unsqueeze(1).to(toward.dtype)
        if spread is not None:
            grad += spread * grad_entropy.unsqueeze(1).to(spread.dtype)
        return grad, None, None, None, None, None


def linear_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[M, V]: hidden [M, d] times weight [V, d], in float32 on a GPU where the factors are shorter.

    The product sums in float32 anyhow. Rounding a logit of 20 to bfloat16 would move it by up to 0.06, differently in
    engine and trainer (the float32 head of MiniMax-M1, arXiv 2506.13585, section 3.2; without its price).
    """
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden @ weight.T


def _read_logits(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    dtype: torch.dtype,
    need_grad: bool,
    need_entropy: bool,
    need_squares: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Of logits [M, V]: log p of `targets` [M], p [M, V], entropies [M], sum p^2 [M] and p (log p + H) [M, V].

    What isn't needed is None. Arrays of vocabulary width come in `dtype`, the others are float32 or wider.
    """
    log_p = torch.log_softmax(logits.to(_wide(logits.dtype)) / temperature, dim=-1)
    chosen = log_p.gather(1, targets[:, None]).squeeze(1)
    if not (need_grad or need_entropy or need_squares):
        return chosen, None, None, None, None
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1) if need_entropy else None
    surprise = (p * (log_p + entropy[:, None])).to(dtype) if need_grad and entropy is not None else None
    squares = p.square().sum(-1) if need_squares else None
    return chosen, p.to(dtype) if need_grad else None, entropy, squares, surprise


@cache
def _compiled_reads() -> Callable[..., tuple[Any, ...]]:
    """`_read_logits` in two passes over the logits, without float32 copies of them."""
    return torch.compile(_read_logits, dynamic=True)


class _LinearKL(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor, weight: Tensor, temperature: float) -> Tensor:
        """hidden, anchor [M, d], weight [V, d] -> KL(p || q) float32[M] of their softmaxes over the vocabulary."""
        divergence = torch.empty(hidden.shape[0], dtype=_wide(hidden.dtype), device=hidden.device)
        toward = torch.empty_like(hidden)
        for rows in _chunks(hidden, weight.shape[0], 4):
            log_p, log_q = (
                torch.log_softmax(linear_logits(states[rows], weight).to(divergence.dtype) / temperature, dim=-1)
                for states in (hidden, anchor)
            )
            p, difference = log_p.exp(), log_p - log_q
            divergence[rows] = (p * difference).sum(-1)
            pull = p * (difference - divergence[rows, None])
            toward[rows] = pull.to(weight.dtype) @ weight / temperature
        ctx.save_for_backward(toward)
        return divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (toward,) = ctx.saved_tensors
        return toward * grad.unsqueeze(1).to(toward.dtype), None, None, None


def linear_kl(hidden: Tensor, anchor: Tensor, weight: Tensor, *, temperature: float = 1.0) -> Tensor:
    """float32[M]: the exact KL divergence of a policy from its reference, which share a frozen, bias-free linear head.

    `algorithms.kl.full` of their logits, in chunks. `hidden` and `anchor` are the two's states [M, d]; the gradient
    goes to `hidden` alone: d KL / dh = E_p[(log p - log q - KL) W] / temperature.
    """
    found: Tensor = _LinearKL.apply(hidden, anchor, weight, temperature)  # type: ignore[assignment]
    return found


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    squares: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (and entropies) under a frozen, bias-free linear head.

    Args:
        hidden: [M, d], the states that predict the targets.
        weight: [V, d], frozen: it gets no gradient.
        targets: int64[M].
        squares: float32[M] that takes sum_v p_v^2 of each row; no gradient runs through it.

    Returns:
        float32[M] log-probabilities of the targets at `temperature`; float32[M] entropies in nats, or None.
    """
    logprobs, entropies = _LinearLogprobs.apply(hidden, weight, targets, temperature, entropy, squares)  # type: ignore[misc]
    return logprobs, entropies if entropy else None


def head_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    vocabulary: int,
    temperature: float = 1.0,
    entropy: bool = False,
    squares: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same for any head (adapted, biased, soft-capped), which each chunk's backward pass computes again."""

    def chunk(states: Tensor, wanted: Tensor, squares: Tensor | None) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(head(states).to(_wide(states.dtype)) / temperature, dim=-1)
        if squares is not None:
            squares.copy_(log_p.detach().exp().square().sum(-1))
        entropies = -(log_p.exp() * log_p).sum(-1) if entropy else log_p.new_zeros(len(wanted))
        return log_p.gather(1, wanted[:, None]).squeeze(1), entropies

    if not len(targets):
        empty = hidden.sum(1, dtype=_wide(hidden.dtype))  # a part of the graph, as any other number of them
        return empty, empty if entropy else None
    pieces = [
        checkpoint(chunk, hidden[rows], targets[rows], None if squares is None else squares[rows], use_reentrant=False)
        for rows in _chunks(hidden, vocabulary, 4)
    ]
    logprobs, entropies = (torch.cat(columns) for columns in zip(*pieces, strict=True))
    return logprobs, entropies if entropy else None


def _chunks(hidden: Tensor, vocabulary: int, width: int) -> list[slice]:
    """Rows whose logits of `width` bytes each fill CHUNK_BYTES; many of them are cut to a whole number of tiles."""
    rows, size = hidden.shape[0], max(1, CHUNK_BYTES[hidden.device.type] // (width * vocabulary))
    if hidden.is_cuda:
        size -= size % 128 if size > 128 else 0
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
