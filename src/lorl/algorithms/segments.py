"""Sums, means and scans over the tokens of each sequence and the sequences of each group, without padding."""

import torch
from torch import Tensor


def sum_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """float[size]: the sum of `values[K]` over each value of `index[K]`; zero where there is none."""
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, index, values)


def mean_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """float[size]: the mean of `values[K]` over each value of `index[K]`; zero where there is none."""
    count = torch.bincount(index, minlength=size).clamp(min=1)
    return sum_by(values, index, size) / count.to(values.dtype)


def max_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """float[size]: the largest of `values[K]` over each value of `index[K]`; -inf where there is none."""
    empty = torch.full((size,), -torch.inf, dtype=values.dtype, device=values.device)
    return empty.scatter_reduce(0, index, values, "amax")


def discounted_suffix_sums(values: Tensor, sequence: Tensor, discount: float) -> Tensor:
    """float[M]: y_t = values_t + discount * y_{t+1} within each sequence, as returns and GAE need it.

    By doubling: after k rounds y_t covers 2^k tokens, so the longest sequence takes log2 rounds, and float32 sums stay
    as accurate as pairwise ones.
    """
    longest = int(torch.bincount(sequence).max()) if sequence.numel() else 0
    sums, step, factor = values, 1, discount
    while step < longest:
        follows = sequence[step:] == sequence[:-step]
        ahead = torch.where(follows, sums[step:], sums.new_zeros(()))
        sums = sums + factor * torch.nn.functional.pad(ahead, (0, step))
        step, factor = 2 * step, factor * factor
    return sums


def prefix_sums(values: Tensor, sequence: Tensor) -> Tensor:
    """float[M]: y_t = y_{t-1} + values_t within each sequence."""
    return discounted_suffix_sums(values.flip(0), sequence.flip(0), 1.0).flip(0)


def positions(sequence: Tensor, size: int) -> Tensor:
    """int64[M]: each token's place in its sequence, from zero; `size` is the number of sequences."""
    lengths = torch.bincount(sequence, minlength=size)
    starts = lengths.cumsum(0) - lengths
    return torch.arange(sequence.numel(), device=sequence.device) - starts[sequence]
