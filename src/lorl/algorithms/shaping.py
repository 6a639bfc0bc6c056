"""DAPO's parts outside the loss (Yu et al. 2025, arXiv 2503.14476): which groups to learn from, a price on length."""

import torch
from torch import Tensor

from lorl.algorithms.segments import max_by


def informative_groups(rewards: Tensor, group: Tensor) -> Tensor:
    """bool[G]: groups whose graded `rewards[S]` are not all equal, the ones with something to compare.

    Dynamic sampling (eq. 11) keeps these and samples again for the others: 0 < number of right answers < n, said of
    rewards of any kind. `group` is int64[S]; NaN marks a sample that was not graded.
    """
    graded = ~torch.isnan(rewards)
    size = int(group.max()) + 1 if group.numel() else 0
    kept, owner = rewards[graded], group[graded]
    return max_by(kept, owner, size) > -max_by(-kept, owner, size)


def overlong_penalty(lengths: Tensor, max_response_tokens: int, buffer_tokens: int, factor: float = 1.0) -> Tensor:
    """float[S]: soft overlong punishment (eq. 13), to be added to the rewards.

    0 up to max_response_tokens - buffer_tokens, then falling evenly to -factor at max_response_tokens and beyond.
    """
    if not 0 < buffer_tokens <= max_response_tokens:
        raise ValueError(f"buffer_tokens={buffer_tokens} must lie in 1..{max_response_tokens}")
    excess = (lengths - (max_response_tokens - buffer_tokens)).to(torch.get_default_dtype())
    return -factor * (excess / buffer_tokens).clamp(0, 1)
