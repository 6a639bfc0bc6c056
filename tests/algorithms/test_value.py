"""The critic's measure; its loss is checked in test_papers.py."""

import pytest
import torch

from lorl.algorithms.value import explained_variance, value_loss


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns + 5, returns).item() == 1
    assert explained_variance(torch.zeros(4), returns).item() == 0
    assert explained_variance(returns / 2, returns).item() == pytest.approx(0.75)
    assert explained_variance(-returns, returns).item() == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(4)).isnan()


def test_a_value_that_moved_past_the_clip_away_from_its_target_has_no_gradient() -> None:
    values = torch.tensor([2.0, 2.0], requires_grad=True)
    loss, metrics = value_loss(values, torch.tensor([1.0, 1.0]), torch.tensor([3.0, 0.0]), clip=0.5)
    loss.sum().backward()
    assert loss.tolist() == [0.5 * 1.5**2, 0.5 * 2.0**2]
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 2.0]
    assert metrics["value_clip_fraction"].tolist() == [1.0, 0.0]
