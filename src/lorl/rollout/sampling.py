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
    """Draws N tokens from B distributions.

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
    log_p = torch.log_softmax(logits.float() / (sampling.temperature or 1.0), dim=-1)
    if bool(log_p[:, 0].isnan().any()):  # one logit that is not finite makes its whole row so
        raise DivergedError(
            "the model's outputs are not finite, so no token can be sampled: the adapter ran away; lower optim.lr, and "
            "begin anew or from an earlier checkpoint (another run.name, resume=CHECKPOINT)"
        )
    greedy = sampling.temperature == 0
    tokens = log_p.argmax(-1)[row] if greedy else inverse_cdf(truncate(log_p.exp(), sampling), row, uniform)
    return tokens, log_p[row, tokens]


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

    float32[B, V], int64[N] rows, float64[N] -> int64[N].

    In two levels, blocks and then entries, summed in float64: a flat float32 cumulative sum of a large vocabulary
    loses its tail. A token of zero weight is never drawn.
    """
    rows, vocabulary = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    blocks = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    blocks = blocks[row]  # [N, V / _BLOCK]
    target = uniform * blocks[:, -1]
    block = torch.searchsorted(blocks, target[:, None], right=True).clamp_(max=blocks.shape[1] - 1)
    below = blocks.gather(1, (block - 1).clamp_(min=0)).where(block > 0, 0.0)
    inside = padded[row, block.squeeze(1)].double()  # [N, _BLOCK]
    entry = torch.searchsorted(inside.cumsum(-1), (target[:, None] - below).clamp_(min=0), right=True)
    last = _BLOCK - 1 - (inside.flip(-1) > 0).int().argmax(-1, keepdim=True)  # rounding never runs past the weight
    return (block * _BLOCK + torch.minimum(entry, last)).squeeze(1)
