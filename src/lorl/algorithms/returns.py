"""Advantages token by token, from rewards to go: with a critic (GAE), over the batch, or against the greedy answer.

The answer's reward falls on its last sampled token, token rewards (the KL penalty) where they belong. G_t = r_t + gamma
G_{t+1} runs over the sampled tokens of a sequence; tokens between turns, which the policy did not sample, are passed
over. An answer cut off at the length limit ends like any other: nothing is bootstrapped.
"""

import torch
from torch import Tensor

from lorl.algorithms.advantages import whiten
from lorl.algorithms.inputs import AdvantageInputs
from lorl.algorithms.registry import Estimate, advantage
from lorl.algorithms.segments import discounted_suffix_sums


@advantage("gae", source="Schulman et al. 2016, arXiv 1506.02438", needs=("values",))
def gae(inputs: AdvantageInputs, *, gamma: float = 1.0, lam: float = 1.0, whiten_advantages: bool = True) -> Estimate:
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t; returns A + V for the critic.

    Both float[M]. The advantages are then whitened over the batch's tokens, as PPO's implementations and verl do; the
    paper does not. Tokens of ungraded samples get advantage 0 and their own value as return.
    """
    values, sequence = inputs.values, inputs.layout.sequence
    assert values is not None
    graded = inputs.graded()[sequence]
    next_values = torch.zeros_like(values)
    next_values[:-1] = torch.where(sequence[1:] == sequence[:-1], values[1:], 0)
    deltas = inputs.rewards_per_token() + gamma * next_values - values
    advantages = torch.where(graded, discounted_suffix_sums(deltas, sequence, gamma * lam), 0)
    returns = advantages + values
    return Estimate(whiten(advantages, graded) if whiten_advantages else advantages, returns)


@advantage("reinforce_plus_plus", source="Hu et al. 2025, arXiv 2501.03262")
def reinforce_plus_plus(inputs: AdvantageInputs, *, gamma: float = 1.0) -> Tensor:
    """A_t = G_t whitened over all tokens of the batch.

    float[M].
    """
    sequence = inputs.layout.sequence
    returns = discounted_suffix_sums(inputs.rewards_per_token(), sequence, gamma)
    return whiten(returns, inputs.graded()[sequence])


@advantage("remax", source="Li et al. 2023, arXiv 2310.10505", needs=("greedy_rewards",))
def remax(inputs: AdvantageInputs) -> Tensor:
    """A_t = G_t (undiscounted) - R of the greedy answer to the same prompt.

    float[M]. Zero where the sample or the greedy answer was not graded.
    """
    layout = inputs.layout
    assert inputs.greedy_rewards is not None
    baseline = inputs.greedy_rewards[layout.group][layout.sequence]
    returns = discounted_suffix_sums(inputs.rewards_per_token(), layout.sequence, 1.0)
    graded = inputs.graded()[layout.sequence] & ~torch.isnan(baseline)
    return torch.where(graded, returns - baseline, 0)
