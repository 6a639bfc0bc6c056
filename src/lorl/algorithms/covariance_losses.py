"""Policy losses that hold back the few tokens whose covariance of log-probability and advantage is largest: those that
make the entropy collapse (Cui et al. 2025, "The Entropy Mechanism of RL for Reasoning LLMs", arXiv 2505.22617).

Which tokens these are depends on means and ranks over the minibatch, so it is settled once, before the minibatch is cut
(the `select` stage of `registry.PolicyLossEntry`). verl decides within each micro-batch, and there the choice changes
with the micro-batch size. The log-probabilities are those at the minibatch's start: on its first pass, the old ones.
"""

import torch
from torch import Tensor

from lorl.algorithms.policy_losses import Terms, log_ratio, ratio_metrics
from lorl.algorithms.registry import policy_loss
from lorl.experience import Sampled


def covariance(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """float[M]: (log pi_t - mean log pi)(A_t - mean A), the means over all tokens."""
    return (logprobs - logprobs.mean()) * (advantages - advantages.mean())


def _share(fraction: float, tokens: int) -> int:
    return min(max(int(fraction * tokens), 1), tokens)


@torch.no_grad()
def select_clip_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    layout: Sampled,
    *,
    generator: torch.Generator | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_cov_ratio: float = 2e-4,
    clip_cov_low: float = 1.0,
    clip_cov_high: float = 5.0,
) -> Tensor:
    """bool[M]: a random `clip_cov_ratio` of all tokens, at least one, among those with covariance in
    (clip_cov_low, clip_cov_high) that PPO's clip leaves alone. `generator` lives on the CPU, so that the draw is the
    same on every device."""
    ratio = log_ratio(logprobs, old_logprobs).exp()
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages > -ratio * advantages
    values = covariance(logprobs, advantages)
    candidates = ((values > clip_cov_low) & (values < clip_cov_high) & ~clipped).nonzero().squeeze(-1)
    selected = torch.zeros_like(clipped)
    if candidates.numel():
        order = torch.randperm(candidates.numel(), generator=generator).to(candidates.device)
        selected[candidates[order[: _share(clip_cov_ratio, logprobs.numel())]]] = True
    return selected


@policy_loss("clip_cov", source="Cui et al. 2025, arXiv 2505.22617, Clip-Cov", prepare=select_clip_cov)
def clip_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    layout: Sampled,
    *,
    selected: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Terms:
    """PPO's clipped loss, and 0 for a random few of the tokens whose covariance is high.

    The paper's equation has -r A in place of the clipped loss; the authors' code and verl clip, and so does this.
    """
    difference = log_ratio(logprobs, old_logprobs)
    ratio = difference.exp()
    loss = (-ratio * advantages).maximum(-ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    metrics = ratio_metrics(difference) | {"selected_fraction": selected.to(loss.dtype)}
    return torch.where(selected, 0, loss), metrics


@torch.no_grad()
def select_kl_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    layout: Sampled,
    *,
    generator: torch.Generator | None = None,
    kl_cov_ratio: float = 2e-4,
) -> Tensor:
    """bool[M]: the `kl_cov_ratio` of all tokens, at least one, with the largest covariance."""
    selected = torch.zeros(logprobs.shape, dtype=torch.bool, device=logprobs.device)
    if logprobs.numel():
        values = covariance(logprobs, advantages)
        selected[values.topk(_share(kl_cov_ratio, logprobs.numel())).indices] = True
    return selected


@policy_loss(
    "kl_cov", source="Cui et al. 2025, arXiv 2505.22617, KL-Cov", prepare=select_kl_cov, moves_without_advantage=True
)
def kl_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    layout: Sampled,
    *,
    selected: Tensor,
    kl_cov_coef: float = 1.0,
) -> Terms:
    """-r A, and + kl_cov_coef |log r| for the few tokens whose covariance is largest.

    |log r| stands for the paper's KL(old || new) in the authors' code and in verl; it has no gradient at r = 1.
    """
    difference = log_ratio(logprobs, old_logprobs)
    loss = -difference.exp() * advantages
    metrics = ratio_metrics(difference) | {"selected_fraction": selected.to(loss.dtype)}
    return torch.where(selected, loss + kl_cov_coef * difference.abs(), loss), metrics
