"""The critic's loss and how well it predicts."""

import torch
from torch import Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.5
) -> tuple[Tensor, dict[str, Tensor]]:
    """max((V - G)^2, (clip(V, V_old ± clip) - G)^2) / 2 of each token, and metrics; all float[M].

    The clipped form of OpenAI's PPO (Baselines, ppo2; Engstrom et al. 2020, arXiv 2005.12729); the PPO paper
    (arXiv 1707.06347) has the square alone, which is `clip=None`. Aggregate like a policy loss.
    """
    loss = (values - returns).square()
    if clip is None:
        return 0.5 * loss, {}
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    clipped = (bounded - returns).square()
    return 0.5 * loss.maximum(clipped), {"value_clip_fraction": (clipped > loss).to(values.dtype)}


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(G - V) / Var(G), a scalar: 1 for a perfect critic, 0 for a constant one; NaN where G is constant."""
    variance = returns.var(correction=0)
    residual = (returns - values).var(correction=0)
    return torch.where(variance > 0, 1 - residual / variance, torch.nan)
