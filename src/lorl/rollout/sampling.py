"""Drawing tokens from logits with counted randomness: one uniform number decides one token."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lorl.errors import DivergedError
from lorl.rollout.engine import Sampling

_BLOCK = 512  # vocabulary entries a partial sum covers


def uniforms(seed: int, count: int) -> np.ndarray:
    """float64[count] in [0, 1): number i decides token i of the completion with this seed, whatever else runs."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def draw_tokens(logits: Tensor, row: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draws N tokens from B distributions, and waits for the device to see that they are some.

    Args:
        logits: [B, V], any float type.
        row: int64[N], the distribution that each draw is from: samples that agree so far share one.
        uniform: float64[N] in [0, 1).

    Returns:
        int64[N] tokens, and float32[N] their log-probabilities at the sampling temperature (1 when greedy) before any
        truncation: the quantity that training computes.

    Raises:
        DivergedError: the logits are not finite.
    """
    greedy, truncation = sampling.temperature == 0, sampling if sampling.truncates else None
    tokens, logprobs = draw_scores(scores_of(logits, sampling), row, uniform, greedy=greedy, truncation=truncation)
    check_finite(logprobs)
    return tokens, logprobs


def check_finite(logprobs: Tensor) -> None:
    """Raises DivergedError when a drawn token's log-probability is not a number: one logit that is not finite makes
    its whole row so."""
    if bool(logprobs.isnan().any()):
        raise DivergedError(
            "the model's outputs are not finite, so no token can be sampled: the adapter ran away; lower optim.lr, and "
            "begin anew or from an earlier checkpoint (another run.name, resume=CHECKPOINT)"
        )


def scores_of(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits at the sampling temperature; greedy samples are scored at 1."""
    return logits if sampling.temperature in (0, 1) else logits.float() / sampling.temperature


def draw_scores(
    scores: Tensor, row: Tensor | None, uniform: Tensor, *, greedy: bool, truncation: Sampling | None
) -> tuple[Tensor, Tensor]:
    """`draw_tokens` from `scores_of` logits, not waited for: log-probabilities are NaN where the logits are not finite.
    `row` None: each draw has a distribution of its own."""
    weights, top = _weigh(scores)
    sums = _block_sums(weights)
    if row is not None:
        top, sums = top[row], sums[row]
    if greedy:
        best = scores.argmax(-1)
        tokens = best if row is None else best[row]
    elif truncation is not None:
        tokens = inverse_cdf(truncate(weights, truncation), row, uniform)
    else:

        def entry_weights(entries: Tensor) -> Tensor:  # of few entries anew: so a compiler need not store `weights`
            return (_entries(scores, row, entries).float() - top).exp()

        tokens = _inverse_cdf(entry_weights, scores.shape[-1], sums, uniform)
    chosen = _entries(scores, row, tokens[:, None])[:, 0].double()
    return tokens, (chosen - top[:, 0] - sums.sum(-1).log()).float()


def truncate(p: Tensor, sampling: Sampling) -> Tensor:
    """Zeroes what top-k, top-p and min-p exclude; the result is not renormalised. [B, V] -> [B, V].

    Ties at top-k's edge are all kept. top-p keeps the smallest set of most likely tokens that reaches top_p.
    """
    if 0 < sampling.top_k < p.shape[-1]:
        p = p.where(p >= p.topk(sampling.top_k).values[:, -1:], 0.0)
    if sampling.top_p < 1.0:
        ordered, index = p.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.where(before < sampling.top_p * ordered.sum(-1, keepdim=True), 0.0)
        p = torch.zeros_like(p).scatter(1, index, kept)
    if sampling.min_p > 0.0:
        p = p.where(p >= sampling.min_p * p.amax(-1, keepdim=True), 0.0)
    return p


def inverse_cdf(weights: Tensor, row: Tensor | None, uniform: Tensor) -> Tensor:
    """The token at which a row's cumulative weight passes `uniform` times its total.

    float32[B, V], int64[N] rows (None: each its own), float64[N] -> int64[N]. A token of zero weight is never drawn.
    """
    sums = _block_sums(weights)
    return _inverse_cdf(
        lambda entries: _entries(weights, row, entries), weights.shape[-1], sums if row is None else sums[row], uniform
    )


def _inverse_cdf(weights: Callable[[Tensor], Tensor], vocabulary: int, sums: Tensor, uniform: Tensor) -> Tensor:
    """In two levels, blocks and then entries, summed in float64: a flat float32 cumulative sum of a large vocabulary
    loses its tail.

    Args:
        weights: of each draw's given entries, int64[N, _BLOCK] -> float32[N, _BLOCK].
        sums: float64[N, V / _BLOCK], over the blocks of each draw's distribution.
    """
    blocks = sums.cumsum(-1)
    target = uniform[:, None] * blocks[:, -1:]
    block = (blocks <= target).sum(-1, keepdim=True).clamp(max=blocks.shape[1] - 1)
    below = blocks.gather(1, (block - 1).clamp(min=0)).where(block > 0, 0.0)
    entries = block * _BLOCK + torch.arange(_BLOCK, device=sums.device)
    inside = weights(entries.clamp(max=vocabulary - 1)).double().where(entries < vocabulary, 0.0)
    entry = (inside.cumsum(-1) <= (target - below).clamp(min=0)).sum(-1, keepdim=True)
    last = _BLOCK - 1 - (inside.flip(-1) > 0).int().argmax(-1, keepdim=True)  # rounding never runs past the weight
    token = block * _BLOCK + torch.minimum(entry, last)
    return token.squeeze(1).clamp(max=vocabulary - 1)  # rows that are not numbers stay within bounds too


def _entries(table: Tensor, row: Tensor | None, entries: Tensor) -> Tensor:
    """[N, K]: entries int64[N, K] of each draw's row of `table`."""
    return table.gather(1, entries) if row is None else table[row[:, None], entries]


def _weigh(scores: Tensor) -> tuple[Tensor, Tensor]:
    """float32[B, V] exp(score - top), and float32[B, 1] top, the largest score of each row."""
    scores = scores.to(torch.float32, copy=True)
    top = scores.amax(-1, keepdim=True)
    return scores.sub_(top).exp_(), top  # in place: a vocabulary's worth of numbers is moved as seldom as can be


def _block_sums(weights: Tensor) -> Tensor:
    """float64[B, ceil(V / _BLOCK)]: sums over blocks of the vocabulary."""
    whole = weights.shape[-1] // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1, dtype=torch.float64)
    if whole == weights.shape[-1]:
        return sums
    return torch.cat([sums, weights[:, whole:].sum(-1, dtype=torch.float64, keepdim=True)], dim=-1)
