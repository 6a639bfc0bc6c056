"""What people choose a policy loss for, in a line each; the formulas are checked in test_papers.py."""

import pytest
import torch

from lorl.algorithms import names
from lorl.algorithms.aggregation import Totals, aggregate
from lorl.algorithms.catalogue import get_policy_loss
from lorl.experience import Sampled

LAYOUT = Sampled(torch.tensor([0, 0]), torch.tensor([0]))


def gradient(name: str, ratio: float, advantage: float, **settings: float | None) -> float:
    """d loss / d log pi of a token whose ratio is `ratio`, at pi = 0.1 … 0.9."""
    logprob = torch.full((2,), -0.5, dtype=torch.float64, requires_grad=True)
    old = logprob.detach() - torch.tensor(ratio).log()
    advantages = torch.full((2,), advantage, dtype=torch.float64)
    entry = get_policy_loss(name)
    selected = torch.zeros(2, dtype=torch.bool)
    loss = aggregate(
        entry(logprob, old, advantages, LAYOUT, settings, selected).loss,
        LAYOUT,
        entry.aggregation or "token-mean",
        Totals.of(LAYOUT),
    )
    return float(torch.autograd.grad(loss, logprob)[0].sum())


@pytest.mark.parametrize("name", names.POLICY_LOSSES)
@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_on_policy_every_loss_is_the_policy_gradient(name: str, advantage: float) -> None:
    assert gradient(name, 1.0, advantage) == pytest.approx(-advantage, rel=1e-6)


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "gmpo", "dppo_tv", "clip_cov"])
def test_a_clipped_loss_stops_pushing_past_its_bound_but_pulls_back(name: str) -> None:
    assert gradient(name, 1.9, 1.0) == 0
    assert gradient(name, 1.9, -1.0) > 0
    assert gradient(name, 0.5, -1.0) == 0
    assert gradient(name, 0.5, 1.0) < 0


def test_clip_higher_lets_a_rising_token_rise_further() -> None:
    assert gradient("ppo_clip", 1.25, 1.0) == 0
    assert gradient("ppo_clip", 1.25, 1.0, clip_high=0.28) == pytest.approx(-1.25)


def test_dual_clip_bounds_a_bad_token_that_became_likely() -> None:
    assert gradient("ppo_clip", 4.0, -1.0) == 0
    assert gradient("ppo_clip", 4.0, -1.0, clip_dual=None) == pytest.approx(4.0)


def test_cispo_keeps_the_gradient_of_every_token() -> None:
    assert gradient("cispo", 4.0, 1.0) == pytest.approx(-1.2)
    assert gradient("cispo", 0.1, -1.0) == pytest.approx(0.8)


@pytest.mark.parametrize("name", names.POLICY_LOSSES)
def test_a_policy_far_off_gives_finite_losses_and_gradients(name: str) -> None:
    entry = get_policy_loss(name)
    for old in ([-1e-4, -300.0], [-300.0, -1e-4]):
        logprob = torch.tensor([-200.0, -1e-6], requires_grad=True)
        arrays = (logprob, torch.tensor(old), torch.tensor([1.0, -1.0]), LAYOUT)
        terms = entry(*arrays, {}, torch.zeros(2, dtype=torch.bool))
        (grad,) = torch.autograd.grad(terms.loss.sum(), logprob)
        assert terms.loss.isfinite().all()
        assert grad.isfinite().all()
        assert all(metric.isfinite().all() and not metric.requires_grad for metric in terms.metrics.values())


def test_only_losses_that_say_so_move_a_sequence_without_advantage() -> None:
    for name in names.POLICY_LOSSES:
        entry = get_policy_loss(name)
        logprob = torch.tensor([-1.0, -2.0], requires_grad=True)
        selected = torch.ones(2, dtype=torch.bool)
        terms = entry(logprob, torch.tensor([-1.5, -1.0]), torch.zeros(2), LAYOUT, {}, selected)
        (grad,) = torch.autograd.grad(terms.loss.sum(), logprob)
        assert bool(grad.any()) == entry.moves_without_advantage, name
