"""Policy losses on the likelihood of the whole sequence, said token by token so that one aggregation serves all.

Both replace the configured aggregation by seq-mean-token-mean, which turns them into their papers' mean over sequences.
"""

from torch import Tensor

from lorl.algorithms.policy_losses import Terms, ratio_metrics
from lorl.algorithms.registry import policy_loss
from lorl.algorithms.segments import mean_by
from lorl.experience import Sampled

MAX_LOG_SEQUENCE_RATIO = 10.0


@policy_loss("gspo", source="Zheng et al. 2025, arXiv 2507.18071, eq. 5, 7 and 13", aggregation="seq-mean-token-mean")
def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    layout: Sampled,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Terms:
    """max(-s A, -clip(s, 1 - clip_low, 1 + clip_high) A), s = exp(mean over the sequence of log r).

    The token form, s_t = sg[s] pi_t / sg[pi_t]: equal in value and gradient where all tokens of a sequence share their
    advantage, and it allows that they do not. log s is clamped to at most 10. The paper clips at 3e-4 and 4e-4, far
    tighter than a token's ratio needs.
    """
    difference = logprobs - old_logprobs
    mean = mean_by(difference.detach(), layout.sequence, layout.num_sequences)[layout.sequence]
    ratio = (logprobs - logprobs.detach() + mean).clamp(max=MAX_LOG_SEQUENCE_RATIO).exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    metrics = ratio_metrics(difference) | {"clip_fraction": (clipped > unclipped).to(ratio.dtype)}
    return unclipped.maximum(clipped), metrics


@policy_loss("gmpo", source="Zhao et al. 2025, arXiv 2507.20673", aggregation="seq-mean-token-mean")
def gmpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    layout: Sampled,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Terms:
    """-A exp(mean over the sequence of clipped log r): the geometric mean of the tokens' ratios.

    log r of a token is clipped to [-clip_low, clip_high] on the side that its advantage pushes to, with A the mean of
    the sequence's advantages. The bounds are on the logarithm; the paper takes 0.4 for both. verl's "geo_mean", which
    counts fully masked sequences in its mean, and takes the geometric mean of rollout correction's token weights where
    weights on this loss come to their arithmetic mean.
    """
    difference = logprobs - old_logprobs
    sign = advantages.sign()
    clipped = sign * (sign * difference).minimum(sign * difference.clamp(-clip_low, clip_high))
    ratio = mean_by(clipped, layout.sequence, layout.num_sequences).exp()
    advantage = mean_by(advantages, layout.sequence, layout.num_sequences)
    metrics = ratio_metrics(difference) | {"clip_fraction": (clipped != difference).to(ratio.dtype)}
    return (-advantage * ratio)[layout.sequence], metrics
