"""A baseline for each token position of a group, weighed by how much gradient variance each answer has built up."""

import torch
from torch import Tensor

from lorl.algorithms.advantages import GroupOfOne
from lorl.algorithms.inputs import AdvantageInputs
from lorl.algorithms.registry import advantage
from lorl.algorithms.segments import discounted_suffix_sums, positions, prefix_sums, sum_by

WEIGHT_EPS = 1e-8


@advantage(
    "optimal_token_baseline",
    source="Li et al. 2026, arXiv 2602.07078",
    needs=("logprobs", "sum_pi_squared"),
    min_group=2,
)
def optimal_token_baseline(inputs: AdvantageInputs, *, group_of_one: GroupOfOne = "zero") -> Tensor:
    """A_t = G_t - sum_group(G_t W_t) / sum_group(W_t), W_t = sum_{j<=t} rho_j^2 (1 - 2 pi_j + sum_v pi_j(v)^2).

    float[M]. G_t is the undiscounted reward to go, 1 - 2 pi + sum pi^2 the squared norm of the logits' gradient, rho
    the weights of rollout correction (1 without). Sums run over the group's answers that reach the t-th sampled token;
    on sampled tokens alone, verl's multi-turn form (tir_optimal_token_baseline) is the same function.

    At a position that one answer alone reaches, the formula gives zero. verl takes no baseline there
    (`group_of_one="reward"`, as in `lorl.algorithms.advantages`).
    """
    layout = inputs.layout
    assert inputs.logprobs is not None
    assert inputs.sum_pi_squared is not None
    graded = inputs.graded()[layout.sequence]
    returns = discounted_suffix_sums(inputs.rewards_per_token(), layout.sequence, 1.0)
    energy = 1 - 2 * inputs.logprobs.exp() + inputs.sum_pi_squared
    if inputs.correction_weights is not None:
        energy = energy * inputs.correction_weights.square()
    weights = torch.where(graded, prefix_sums(energy, layout.sequence), 0)

    longest = max(int(layout.lengths().max()), 1) if layout.num_sequences else 1
    cell = layout.group[layout.sequence] * longest + positions(layout.sequence, layout.num_sequences)
    size = (int(layout.group.max()) + 1) * longest if layout.num_sequences else 0
    baseline = sum_by(returns * weights, cell, size) / (sum_by(weights, cell, size) + WEIGHT_EPS)
    alone = sum_by(graded.to(weights.dtype), cell, size)[cell] == 1
    lone = torch.zeros_like(returns) if group_of_one == "zero" else returns
    return torch.where(graded, torch.where(alone, lone, returns - baseline[cell]), 0)
