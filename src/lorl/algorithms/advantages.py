"""Advantages from the rewards of a group of answers to one prompt: one number a sequence, the same for all its tokens.

A sample that was not graded (reward NaN) is no member of its group. A group whose rewards are all equal gives exactly
zero, whatever rounding does to its mean.

A group of one has no baseline but itself. The papers leave it undefined; here it gives zero, so that the single
survivor of a group whose other samples failed does not push the policy by its bare reward. verl takes mean 0 and
deviation 1, hence A = R: that is `group_of_one="reward"`, which verl's keys set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorl.algorithms.inputs import AdvantageInputs
from lorl.algorithms.registry import advantage
from lorl.algorithms.segments import max_by, mean_by, sum_by
from lorl.algorithms.shaping import informative_groups
from lorl.errors import UserError, nearest

STD_EPS = 1e-6
WHITEN_EPS = 1e-8

GroupOfOne = Literal["zero", "reward"]


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """Statistics of the graded scores of each group, brought back to its sequences."""

    count: Tensor  # float[S]
    mean: Tensor  # float[S]
    std: Tensor  # float[S], unbiased (ddof = 1); zero for a group of one
    informative: Tensor  # bool[S]: graded, in a group whose scores are not all equal

    @classmethod
    def of(cls, scores: Tensor, group: Tensor) -> "GroupMoments":
        """Moments of `scores[S]` (NaN: not graded) over `group[S]`."""
        graded = ~torch.isnan(scores)
        size = int(group.max()) + 1 if group.numel() else 0
        kept, owner = scores[graded], group[graded]
        count = torch.bincount(owner, minlength=size).to(scores.dtype)
        mean = mean_by(kept, owner, size)
        variance = sum_by((kept - mean[owner]).square(), owner, size) / (count - 1).clamp(min=1)
        informative = informative_groups(scores, group)[group] & graded
        return cls(count[group], mean[group], variance.sqrt()[group], informative)


def centre(scores: Tensor, group: Tensor, baseline: Tensor, group_of_one: GroupOfOne) -> Tensor:
    """float[S]: scores - baseline; exactly zero for what is not graded and for groups of equal scores."""
    moments = GroupMoments.of(scores, group)
    centred = torch.where(moments.informative, scores - baseline, 0)
    if group_of_one == "zero":
        return centred
    return torch.where((moments.count == 1) & ~torch.isnan(scores), scores, centred)


def normalize_by_group(scores: Tensor, group: Tensor, normalize_std: bool, group_of_one: GroupOfOne) -> Tensor:
    """float[S]: (scores - mean) / (std + 1e-6) over each group, or without the division."""
    moments = GroupMoments.of(scores, group)
    centred = centre(scores, group, moments.mean, group_of_one)
    if not normalize_std:
        return centred
    return centred / torch.where(moments.count > 1, moments.std + STD_EPS, 1)


def whiten(values: Tensor, included: Tensor) -> Tensor:
    """(values - mean) / sqrt(variance + 1e-8) over the `included` ones, unbiased; zero elsewhere, and for one alone."""
    kept = values[included]
    if not kept.numel():
        return torch.zeros_like(values)
    mean = kept.mean()
    variance = (kept - mean).square().sum() / max(kept.numel() - 1, 1)
    return torch.where(included, (values - mean) / (variance + WHITEN_EPS).sqrt(), 0)


@advantage(
    "grpo",
    source="Shao et al. 2024, arXiv 2402.03300; without std: Liu et al. 2025, arXiv 2503.20783",
    min_group=2,
)
def grpo(inputs: AdvantageInputs, *, normalize_std: bool = True, group_of_one: GroupOfOne = "zero") -> Tensor:
    """A_i = (R_i - mean_group R) / (std_group R + 1e-6); without std it is Dr. GRPO.

    float[M]. The deviation is unbiased (ddof = 1), as in verl and TRL; the paper does not say which. With a KL in the
    reward, a group whose answers earn the same differs by its KL alone, and the division blows that up to full size:
    put the KL in the loss, as the paper does.
    """
    result = normalize_by_group(inputs.scores(), inputs.layout.group, normalize_std, group_of_one)
    return result[inputs.layout.sequence]


@advantage("rloo", source="Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019", min_group=2)
def rloo(inputs: AdvantageInputs, *, group_of_one: GroupOfOne = "zero") -> Tensor:
    """A_i = R_i - mean of the other samples' R = n / (n - 1) (R_i - mean_group R).

    float[M].
    """
    scores, group = inputs.scores(), inputs.layout.group
    moments = GroupMoments.of(scores, group)
    others = (moments.count * moments.mean - scores) / (moments.count - 1).clamp(min=1)
    return centre(scores, group, others, group_of_one)[inputs.layout.sequence]


@advantage("opo", source="Hao et al. 2025, arXiv 2505.23585", min_group=2)
def opo(inputs: AdvantageInputs, *, group_of_one: GroupOfOne = "zero") -> Tensor:
    """A_i = R_i - sum_group(length R) / sum_group(length): the baseline of least variance under a length proxy.

    float[M].
    """
    scores, layout = inputs.scores(), inputs.layout
    graded = ~torch.isnan(scores)
    size = int(layout.group.max()) + 1 if layout.group.numel() else 0
    owner = layout.group[graded]
    lengths = layout.lengths().to(scores.dtype)[graded]
    total = sum_by(lengths, owner, size).clamp(min=1)
    baseline = sum_by(lengths * scores[graded], owner, size) / total
    return centre(scores, layout.group, baseline[layout.group], group_of_one)[layout.sequence]


@advantage("gpg", source="Chu et al. 2025, arXiv 2504.02546", min_group=2)
def gpg(inputs: AdvantageInputs, *, group_of_one: GroupOfOne = "zero") -> Tensor:
    """A_i = alpha (R_i - mean_group R), alpha = samples / samples of groups whose rewards differ.

    float[M]. alpha makes up for the samples without a gradient (the paper's M of B), F_norm is 1. verl counts samples
    with a nonzero reward instead: see gpg_verl.
    """
    scores, group = inputs.scores(), inputs.layout.group
    moments = GroupMoments.of(scores, group)
    alpha = (~torch.isnan(scores)).sum().to(scores.dtype) / moments.informative.sum().clamp(min=1)
    return alpha * centre(scores, group, moments.mean, group_of_one)[inputs.layout.sequence]


@advantage("gpg_verl", source="verl's adv_estimator=gpg", min_group=2)
def gpg_verl(inputs: AdvantageInputs, *, group_of_one: GroupOfOne = "zero") -> Tensor:
    """gpg as verl has it: alpha = samples / samples with a nonzero reward.

    float[M]. Unlike the paper's, this alpha depends on where the rewards' zero lies.
    """
    scores, group = inputs.scores(), inputs.layout.group
    graded = ~torch.isnan(scores)
    alpha = graded.sum().to(scores.dtype) / (graded & (scores != 0)).sum().clamp(min=1)
    mean = GroupMoments.of(scores, group).mean
    return alpha * centre(scores, group, mean, group_of_one)[inputs.layout.sequence]


@advantage("grpo_passk", source="Tang et al. 2025, arXiv 2503.19595; std: verl", min_group=2)
def grpo_passk(inputs: AdvantageInputs, *, normalize_std: bool = True) -> Tensor:
    """A of the group's best sample = best R - second best R; 0 for the others.

    float[M]. This is max over the group minus max over the others, leave-one-out. The paper does not divide by the
    group's deviation (`normalize_std=False`); verl does, as for grpo.
    """
    scores, group = inputs.scores(), inputs.layout.group
    moments = GroupMoments.of(scores, group)
    size = int(group.max()) + 1 if group.numel() else 0
    ranked = torch.where(torch.isnan(scores), -torch.inf, scores)
    best = max_by(ranked, group, size)[group]
    # Where two share the maximum, the second best equals it and the advantage is zero.
    second = max_by(torch.where(ranked == best, -torch.inf, ranked), group, size)[group]
    holders = sum_by((ranked == best).to(scores.dtype), group, size)[group]
    alone = moments.informative & (ranked == best) & (holders == 1)
    result = torch.where(alone, scores - second, 0)
    if normalize_std:
        result = result / (moments.std + STD_EPS)
    return result[inputs.layout.sequence]


@advantage("reinforce_plus_plus_baseline", source="Hu et al. 2025, arXiv 2501.03262, REINFORCE++-baseline", min_group=2)
def reinforce_plus_plus_baseline(inputs: AdvantageInputs, *, group_of_one: GroupOfOne = "zero") -> Tensor:
    """A_i = R_i - mean_group R, then whitened over all tokens of the batch.

    float[M]. The whitening's mean weighs sequences by length, so a group of equal rewards may get a small advantage.
    """
    scores, layout = inputs.scores(), inputs.layout
    centred = centre(scores, layout.group, GroupMoments.of(scores, layout.group).mean, group_of_one)
    return whiten(centred[layout.sequence], inputs.graded()[layout.sequence])


@advantage("gdpo", source="Liu et al. 2026, arXiv 2601.05242", needs=("components",), min_group=2)
def gdpo(
    inputs: AdvantageInputs,
    *,
    normalize_std: bool = True,
    group_of_one: GroupOfOne = "zero",
    reward_weights: Mapping[str, float] | None = None,
) -> Tensor:
    """A_i = whiten over samples of sum_k w_k (R_ik - mean_group R_k) / (std_group R_k + 1e-6).

    float[M]. Each part k of the reward is normalised in its group by itself, so that none drowns the others. Weights
    not named are 1. verl whitens over tokens: see gdpo_verl.
    """
    combined = _decoupled(inputs, normalize_std, group_of_one, reward_weights)
    return whiten(combined, inputs.graded())[inputs.layout.sequence]


@advantage("gdpo_verl", source="verl's adv_estimator=gdpo", needs=("components",), min_group=2)
def gdpo_verl(
    inputs: AdvantageInputs,
    *,
    normalize_std: bool = True,
    group_of_one: GroupOfOne = "zero",
    reward_weights: Mapping[str, float] | None = None,
) -> Tensor:
    """gdpo as verl has it: whitened over tokens, so that a long answer weighs more in the mean.

    float[M].
    """
    sequence = inputs.layout.sequence
    combined = _decoupled(inputs, normalize_std, group_of_one, reward_weights)
    return whiten(combined[sequence], inputs.graded()[sequence])


def _decoupled(
    inputs: AdvantageInputs,
    normalize_std: bool,
    group_of_one: GroupOfOne,
    reward_weights: Mapping[str, float] | None,
) -> Tensor:
    components = inputs.components or {}
    weights = reward_weights or {}
    for name in weights:
        if name not in components:
            raise UserError(
                f"reward_weights names {name!r}, which the reward does not give; {nearest(name, components)}"
            )
    graded = inputs.graded()
    combined = torch.zeros_like(inputs.rewards)
    for name, scores in components.items():
        part = torch.where(graded, scores, torch.nan)
        combined = combined + weights.get(name, 1.0) * normalize_by_group(
            part, inputs.layout.group, normalize_std, group_of_one
        )
    return combined
