"""Token draws: the distribution is the softmax's, and truncations keep what their definitions say."""

import numpy as np
import pytest
import torch

from lorl.rollout.engine import Sampling
from lorl.rollout.sampling import draw_tokens, inverse_cdf, truncate, uniforms


def test_draws_follow_the_distribution() -> None:
    """Chi-square over a vocabulary longer than one block: 40,000 draws from one row."""
    weights = torch.rand(1300, generator=torch.Generator().manual_seed(0)) ** 4
    weights[100:700] = 0
    draws = torch.from_numpy(uniforms(5, 40_000))
    counts = torch.bincount(inverse_cdf(weights[None], torch.zeros(40_000, dtype=torch.int64), draws), minlength=1300)
    assert counts[100:700].sum() == 0
    p = weights.double() / weights.double().sum()
    big = p * 40_000 >= 5
    observed, expected = counts[big].double(), p[big] * 40_000
    chi2 = float(((observed - expected) ** 2 / expected).sum())
    freedom = int(big.sum()) - 1
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("uniform", [0.0, 1e-12, 0.3, 1 - 1e-16])
def test_edges_never_leave_the_support(uniform: float) -> None:
    weights = torch.zeros(2, 1030)
    weights[0, 1029] = 1e-30
    weights[1, 0] = 1.0
    assert inverse_cdf(weights, torch.arange(2), torch.full((2,), uniform, dtype=torch.float64)).tolist() == [1029, 0]


def test_truncations() -> None:
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    kept = lambda **options: (truncate(p, Sampling(**options))[0] > 0).tolist()  # noqa: E731
    assert kept() == [True] * 4
    assert kept(top_k=1) == [True, False, False, False]
    assert kept(top_k=3) == [True] * 4  # the tie at the edge stays
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.51) == [True, True, False, False]
    assert kept(min_p=0.5) == [True, True, False, False]
    assert kept(top_k=2, top_p=0.6) == [True, False, False, False]  # top-p acts on what top-k left: 2/3 reaches 0.6


def test_logprobs_are_of_the_untruncated_distribution_at_the_temperature() -> None:
    logits, row = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([0])
    half = torch.tensor([0.5], dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, row, half, Sampling(temperature=0.5, top_k=1))
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx((logits / 0.5).log_softmax(-1)[0, 1].item())
    tokens, logprobs = draw_tokens(logits, row, half, Sampling(temperature=0.0))
    assert (tokens.item(), logprobs.item()) == (1, pytest.approx(logits.log_softmax(-1)[0, 1].item()))


def test_draws_name_their_distribution() -> None:
    logits = torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]])
    tokens, logprobs = draw_tokens(
        logits, torch.tensor([1, 0, 1]), torch.full((3,), 0.5, dtype=torch.float64), Sampling()
    )
    assert tokens.tolist() == [0, 1, 0]
    assert logprobs.tolist() == pytest.approx([0.0] * 3, abs=1e-6)


def test_uniforms_are_counted() -> None:
    assert np.array_equal(uniforms(3, 10), uniforms(3, 20)[:10])
    assert not np.array_equal(uniforms(3, 10), uniforms(4, 10))
