"""Policy losses, token by token: `fn(logprobs, old_logprobs, advantages, layout, *, settings…) -> (loss[M], metrics)`.

All arrays are float[M]; only `logprobs` carries a gradient. r_t = exp(logprobs_t - old_logprobs_t), its logarithm
clamped to ±20 so that it stays finite. Metrics are float[M] too, logged as their mean over the global minibatch's
tokens.
"""

import torch
from torch import Tensor

from lorl.algorithms.registry import policy_loss
from lorl.experience import Sampled

MAX_LOG_RATIO = 20.0

Terms = tuple[Tensor, dict[str, Tensor]]


def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """float[M]: logprobs - old_logprobs, clamped to ±20."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ratio_metrics(difference: Tensor) -> dict[str, Tensor]:
    """What every ratio-based loss reports: the ratio, and k1 and k3 of KL(old || new)."""
    difference = difference.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = difference.exp()
    return {"ratio": ratio, "approx_kl": -difference, "approx_kl_k3": ratio - 1 - difference}


@policy_loss(
    "ppo_clip",
    source="Schulman et al. 2017, arXiv 1707.06347, eq. 7; dual clip: Ye et al. 2020, arXiv 1912.09729, eq. 5",
)
def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    layout: Sampled,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float | None = 3.0,
) -> Terms:
    """max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A), at most -clip_dual A where A < 0.

    `clip_high > clip_low` is DAPO's clip-higher (arXiv 2503.14476); `clip_dual=None` leaves the dual clip out.
    verl's "vanilla".
    """
    difference = log_ratio(logprobs, old_logprobs)
    ratio = difference.exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.maximum(unclipped, clipped)
    metrics = ratio_metrics(difference) | {"clip_fraction": (clipped > unclipped).to(loss.dtype)}
    if clip_dual is not None:
        bound = -clip_dual * advantages
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
        metrics["clip_fraction_dual"] = bounded.to(loss.dtype)
    return loss, metrics


@policy_loss("reinforce", source="Williams 1992; Sutton et al. 1999")
def reinforce(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, layout: Sampled) -> Terms:
    """-A log pi: the policy gradient itself, right on policy or with weights of rollout correction.

    The value says nothing; only the gradient does.
    """
    return -advantages * logprobs, ratio_metrics(log_ratio(logprobs, old_logprobs))


@policy_loss("gpg", source="Chu et al. 2025, arXiv 2504.02546")
def gpg(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, layout: Sampled) -> Terms:
    """-A log pi, REINFORCE's loss under GPG's name; its alpha is in the advantage "gpg"."""
    return reinforce(logprobs, old_logprobs, advantages, layout)


@policy_loss("cispo", source="MiniMax 2025, arXiv 2506.13585, eq. 4 and 5")
def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    layout: Sampled,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Terms:
    """-sg[clip(r, 1 - clip_low, 1 + clip_high)] A log pi: the weight is clipped, and every token keeps its gradient.

    The paper tunes clip_high and sets clip_low so large that it never acts.
    """
    difference = log_ratio(logprobs, old_logprobs)
    ratio = difference.detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    metrics = ratio_metrics(difference) | {"clip_fraction": (weight != ratio).to(weight.dtype)}
    return -weight * advantages * logprobs, metrics


@policy_loss("sapo", source="Gao et al. 2025, arXiv 2511.20347", aggregation="seq-mean-token-mean")
def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    layout: Sampled,
    *,
    sapo_tau_positive: float = 1.0,
    sapo_tau_negative: float = 1.05,
) -> Terms:
    """-A (4 / tau) sigmoid(tau (r - 1)): a gate in place of the clip, with tau by the sign of A.

    At r = 1 its gradient is REINFORCE's.
    """
    difference = log_ratio(logprobs, old_logprobs)
    positive, negative = advantages.new_tensor(sapo_tau_positive), advantages.new_tensor(sapo_tau_negative)
    tau = torch.where(advantages > 0, positive, negative)
    gate = (tau * (difference.exp() - 1)).sigmoid() * 4 / tau
    return -gate * advantages, ratio_metrics(difference)


@policy_loss("dppo_tv", source="Qi et al. 2026, arXiv 2602.04879, DPPO-Binary-TV")
def dppo_tv(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    layout: Sampled,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dppo_max_ratio: float = 20.0,
) -> Terms:
    """-sg[min(r, dppo_max_ratio)] A log pi, and 0 for a token pushed further off than its trust region allows.

    That is pi - pi_old > clip_high where A > 0, pi_old - pi > clip_low where A < 0: bounds on the total variation of
    "this token or another", not on the ratio. verl takes its clip_ratio_c for dppo_max_ratio.
    """
    moved = logprobs.detach().exp() - old_logprobs.exp()
    inside = torch.where(advantages > 0, moved <= clip_high, moved >= -clip_low)
    return _trust_region(logprobs, old_logprobs, advantages, inside, dppo_max_ratio)


@policy_loss("dppo_kl", source="Qi et al. 2026, arXiv 2602.04879, DPPO-Binary-KL")
def dppo_kl(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    layout: Sampled,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dppo_max_ratio: float = 20.0,
) -> Terms:
    """dppo_tv with the divergence q log(q / p) + (1 - q) log((1 - q) / (1 - p)), q = pi_old, p = pi.

    A token is left out where the divergence is above clip_high, p > q and A > 0; or above clip_low, p < q and A < 0.
    """
    new, old = logprobs.detach().exp(), old_logprobs.exp()
    # 1e-8, as in verl, keeps the logarithm finite where a probability is one.
    others = (1 - old) * ((1 - old + 1e-8) / (1 - new + 1e-8)).log()
    divergence = old * (old_logprobs - logprobs.detach()) + others
    inside = torch.where(
        advantages > 0, (divergence <= clip_high) | (new <= old), (divergence <= clip_low) | (new >= old)
    )
    return _trust_region(logprobs, old_logprobs, advantages, inside, dppo_max_ratio)


def _trust_region(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, inside: Tensor, max_ratio: float
) -> Terms:
    difference = log_ratio(logprobs, old_logprobs)
    weight = difference.detach().exp().clamp(max=max_ratio)
    loss = torch.where(inside, -weight * advantages * logprobs, 0)
    return loss, ratio_metrics(difference) | {"clip_fraction": (~inside).to(loss.dtype)}


@policy_loss(
    "dro",
    source="Richemond et al. 2024, arXiv 2405.19107; Kimi Team 2025, arXiv 2501.12599",
    moves_without_advantage=True,
)
def dro(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, layout: Sampled, *, dro_beta: float = 0.1) -> Terms:
    """-(A log pi - dro_beta / 2 (log r)^2): a quadratic pull back to the sampling policy in place of a clip.

    Token by token, as Tinker and verl have it; the papers write it for the whole answer.
    """
    difference = logprobs - old_logprobs
    loss = -advantages * logprobs + 0.5 * dro_beta * difference.square()
    return loss, ratio_metrics(log_ratio(logprobs, old_logprobs))
