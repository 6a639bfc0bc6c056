"""Drawing tokens from logits with counted randomness: one uniform number decides one token."""

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
    """Like `draw`, but looks at the log-probabilities: that waits for the device.

    Raises:
        DivergedError: the logits are not finite.
    """
    tokens, logprobs = draw(logits, row, uniform, sampling)
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


def draw(logits: Tensor, row: Tensor | None, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draws N tokens from B distributions.

    Args:
        logits: [B, V], any float type.
        row: int64[N], the distribution that each draw is from: samples that agree so far share one. None: each its own.
        uniform: float64[N] in [0, 1).

    Returns:
        int64[N] tokens, and float32[N] their log-probabilities at the sampling temperature (1 when greedy) before any
        truncation: the quantity that training computes. NaN where the logits are not finite.
    """
    scores = logits.to(torch.float32, copy=True)
    if sampling.temperature not in (0, 1):
        scores /= sampling.temperature
    top = scores.amax(-1, keepdim=True)
    row = torch.arange(len(logits), device=logits.device) if row is None else row
    greedy = scores.argmax(-1)[row] if sampling.temperature == 0 else None
    weights = scores.sub_(
        top
    ).exp_()  # in place: a vocabulary's worth of numbers is read and written as seldom as can be
    sums = _block_sums(weights)
    if greedy is not None:
        tokens = greedy
    else:
        kept = truncate(weights, sampling)
        tokens = _inverse_cdf(kept, sums if kept is weights else _block_sums(kept), row, uniform)
    chosen = logits[row, tokens].double() / (sampling.temperature or 1.0)
    return tokens, (chosen - top[row, 0] - sums[row].sum(-1).log()).float()


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


def inverse_cdf(weights: Tensor, row: Tensor, uniform: Tensor) -> Tensor:
    """The token at which a row's cumulative weight passes `uniform` times its total.

    float32[B, V], int64[N] rows, float64[N] -> int64[N]. A token of zero weight is never drawn.
    """
    return _inverse_cdf(weights, _block_sums(weights), row, uniform)


def _block_sums(weights: Tensor) -> Tensor:
    """float64[B, ceil(V / _BLOCK)]: sums over blocks of the vocabulary."""
    whole = weights.shape[-1] // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1, dtype=torch.float64)
    if whole == weights.shape[-1]:
        return sums
    return torch.cat([sums, weights[:, whole:].sum(-1, dtype=torch.float64, keepdim=True)], dim=-1)


def _inverse_cdf(weights: Tensor, sums: Tensor, row: Tensor, uniform: Tensor) -> Tensor:
    """In two levels, blocks and then entries, summed in float64: a flat float32 cumulative sum of a large vocabulary
    loses its tail."""
    vocabulary = weights.shape[-1]
    blocks = sums.cumsum(-1)[row]  # [N, V / _BLOCK]
    target = uniform * blocks[:, -1]
    block = torch.searchsorted(blocks, target[:, None], right=True).clamp_(max=blocks.shape[1] - 1)
    below = blocks.gather(1, (block - 1).clamp_(min=0)).where(block > 0, 0.0)
    entries = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights[row[:, None], entries.clamp(max=vocabulary - 1)].double().where(entries < vocabulary, 0.0)
    entry = torch.searchsorted(inside.cumsum(-1), (target[:, None] - below).clamp_(min=0), right=True)
    last = _BLOCK - 1 - (inside.flip(-1) > 0).int().argmax(-1, keepdim=True)  # rounding never runs past the weight
    token = block * _BLOCK + torch.minimum(entry, last)
    return token.squeeze(1).clamp_(max=vocabulary - 1)  # rows that are not numbers stay within bounds too
