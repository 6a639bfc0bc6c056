"""KL estimators against the exact divergence, and the controllers of its coefficient."""

import json
import math

import pytest
import torch

from lorl.algorithms.catalogue import get_kl
from lorl.algorithms.kl import AdaptiveKL, FixedKL

GENERATOR = torch.Generator().manual_seed(0)
LOGITS, REF_LOGITS = torch.randn(2, 7, generator=GENERATOR, dtype=torch.float64).unbind()


def expectation(name: str, logits: torch.Tensor) -> torch.Tensor:
    """E over tokens drawn from the policy, the draw itself without a gradient."""
    logp, ref = logits.log_softmax(-1), REF_LOGITS.log_softmax(-1)
    return (logp.detach().exp() * get_kl(name)(logp, ref)).sum()


def exact(logits: torch.Tensor) -> torch.Tensor:
    return get_kl("full")(logits[None], REF_LOGITS[None]).sum()


def gradient(function, *args) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(function(*args, logits), logits)[0]


@pytest.mark.parametrize("name", ["k1", "k3", "kl", "k1+", "k3+"])
def test_unbiased_in_value(name: str) -> None:
    torch.testing.assert_close(expectation(name, LOGITS), exact(LOGITS))


@pytest.mark.parametrize("name", ["k2", "mse", "k1+", "k3+", "abs+", "low_var_kl+", "k2+"])
def test_unbiased_in_gradient(name: str) -> None:
    torch.testing.assert_close(gradient(expectation, name), gradient(exact))


def test_k1_as_a_loss_pushes_nowhere_on_average() -> None:
    assert gradient(expectation, "k1").abs().max() < 1e-12


def test_straight_through_keeps_its_name_and_value() -> None:
    a, b = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -0.5])
    entry = get_kl("k3+")
    assert entry.name == "k3+"
    assert torch.equal(entry(a, b), get_kl("k3")(a, b))
    with pytest.raises(ValueError, match="full"):
        get_kl("full+")


def test_verls_low_var_kl_is_flat_above_ten_and_k3_is_not() -> None:
    for name, moves in (("low_var_kl", False), ("k3", True)):
        logp = torch.tensor([-9.0], requires_grad=True)
        value = get_kl(name)(logp, torch.tensor([-1.0])).sum()
        (grad,) = torch.autograd.grad(value, logp)
        assert (value.item() > 10) == moves
        assert (grad.item() != 0) == moves


def test_far_policies_stay_finite() -> None:
    for name in ("k3", "low_var_kl"):
        assert get_kl(name)(torch.tensor([-400.0, -0.1]), torch.tensor([-0.1, -400.0])).isfinite().all()


def test_adaptive_coefficient_by_hand() -> None:
    control = AdaptiveKL(coef=0.5, target=0.1, horizon=1000)
    control.update(0.11, samples=100)  # error 0.1
    assert control.coef == pytest.approx(0.5 * 1.01)
    control.update(9.0, samples=100)  # clipped at 0.2
    assert control.coef == pytest.approx(0.5 * 1.01 * 1.02)
    control.update(0.0, samples=1000)
    assert control.coef == pytest.approx(0.5 * 1.01 * 1.02 * 0.8)
    control.update(math.nan, samples=1000)
    assert control.coef == pytest.approx(0.5 * 1.01 * 1.02 * 0.8)


def test_controllers_resume_from_json() -> None:
    control = AdaptiveKL(coef=0.5, target=0.1, horizon=1000)
    control.update(0.3, samples=64)
    resumed = AdaptiveKL(coef=0.5, target=0.1, horizon=1000)
    resumed.load(json.loads(json.dumps(control.state())))
    assert resumed == control
    fixed = FixedKL(0.25)
    fixed.update(9.0, samples=64)
    fixed.load({"coef": 1.0})
    assert fixed == FixedKL(0.25)
