"""Advantages by hand, and what a trainer relies on: nothing to learn is exactly zero, and nothing is ever NaN."""

import math

import pytest
import torch
from algorithm_cases import random_case

from lorl.algorithms import names
from lorl.algorithms.catalogue import get_advantage
from lorl.algorithms.inputs import AdvantageInputs
from lorl.algorithms.segments import discounted_suffix_sums, prefix_sums
from lorl.algorithms.shaping import informative_groups, overlong_penalty
from lorl.errors import UserError
from lorl.experience import Sampled

NAN = math.nan


def one_token_each(rewards: list[float], group: list[int]) -> AdvantageInputs:
    layout = Sampled(torch.arange(len(rewards)), torch.tensor(group))
    return AdvantageInputs(layout, torch.tensor(rewards, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        # Group 0: rewards 1, 0, 0, (one sample not graded); mean 1/3, std sqrt(1/3). Group 1: a single sample.
        ("grpo", {}, [2 / 3 / 0.57735, -1 / 3 / 0.57735, -1 / 3 / 0.57735, 0, 0]),
        ("grpo", {"normalize_std": False}, [2 / 3, -1 / 3, -1 / 3, 0, 0]),
        ("grpo", {"normalize_std": False, "group_of_one": "reward"}, [2 / 3, -1 / 3, -1 / 3, 0, 5]),
        ("rloo", {}, [1, -0.5, -0.5, 0, 0]),
        ("gpg", {}, [4 / 3 * 2 / 3, -4 / 9, -4 / 9, 0, 0]),
        ("gpg_verl", {}, [2 * 2 / 3, -2 / 3, -2 / 3, 0, 0]),
        ("grpo_passk", {"normalize_std": False}, [1, 0, 0, 0, 0]),
    ],
)
def test_by_hand(name: str, settings: dict, expected: list[float]) -> None:
    inputs = one_token_each([1, 0, 0, NAN, 5], [0, 0, 0, 0, 1])
    advantages = get_advantage(name)(inputs, settings).advantages
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), atol=2e-5, rtol=0)


def test_opo_weighs_the_baseline_by_length() -> None:
    layout = Sampled(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0]))
    advantages = get_advantage("opo")(AdvantageInputs(layout, torch.tensor([1.0, 0.0])), {}).advantages
    assert advantages.tolist() == [0.25, 0.25, 0.25, -0.75]


def test_gae_by_hand() -> None:
    """Values 0.5 and 0.25, reward 1 at the end, gamma 0.5, lambda 0.5: delta = (0 + 0.125 - 0.5, 1 - 0.25)."""
    layout = Sampled(torch.tensor([0, 0]), torch.tensor([0]))
    inputs = AdvantageInputs(layout, torch.tensor([1.0]), values=torch.tensor([0.5, 0.25]))
    estimate = get_advantage("gae")(inputs, {"gamma": 0.5, "lam": 0.5, "whiten_advantages": False})
    assert estimate.advantages.tolist() == [-0.375 + 0.25 * 0.75, 0.75]
    assert estimate.returns is not None
    assert estimate.returns.tolist() == [-0.375 + 0.25 * 0.75 + 0.5, 1.0]


def test_optimal_token_baseline_is_the_weighted_mean_of_those_that_reach_a_position() -> None:
    """Two answers, energies 1 and 3 at the first token; the second answer alone has a second token."""
    layout = Sampled(torch.tensor([0, 1, 1]), torch.tensor([0, 0]))
    inputs = AdvantageInputs(
        layout,
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        logprobs=torch.full((3,), -math.inf, dtype=torch.float64),  # pi = 0, so that the energy is 1 + sum of squares
        sum_pi_squared=torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64),
    )
    advantages = get_advantage("optimal_token_baseline")(inputs, {}).advantages
    torch.testing.assert_close(advantages, torch.tensor([0.75, -0.25, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "name", [name for name in names.ADVANTAGES if name not in ("gae", "remax", "gdpo", "gdpo_verl")]
)
def test_equal_rewards_teach_exactly_nothing(name: str) -> None:
    """float32(0.1) three times over three is not float32(0.1): rounding must not become a gradient."""
    layout = Sampled(torch.arange(6), torch.tensor([0, 0, 0, 1, 1, 1]))
    logprobs = torch.full((6,), -1.0)
    inputs = AdvantageInputs(layout, torch.full((6,), 0.1), logprobs=logprobs, sum_pi_squared=logprobs.exp())
    advantages = get_advantage(name)(inputs, {}).advantages
    if name == "optimal_token_baseline":  # its weights are rounded: nothing but rounding is left
        assert advantages.abs().max() < 1e-7
    else:
        assert advantages.abs().max() == 0


@pytest.mark.parametrize("name", names.ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_is_finite_and_ungraded_samples_get_zero(name: str, dtype: torch.dtype) -> None:
    for seed in range(30):
        inputs = random_case(seed).inputs()
        typed = {
            field: value.to(dtype) if isinstance(value := getattr(inputs, field), torch.Tensor) else value
            for field in AdvantageInputs.__slots__
        }
        typed["components"] = {key: value.to(dtype) for key, value in (inputs.components or {}).items()}
        estimate = get_advantage(name)(AdvantageInputs(**typed), {})
        for result in (estimate.advantages, estimate.returns):
            assert result is None or (result.isfinite().all() and result.dtype == dtype)
        assert (estimate.advantages[~inputs.graded()[inputs.layout.sequence]] == 0).all()


def test_an_empty_batch_gives_empty_advantages() -> None:
    """Every sequence fully masked: no token, no advantage, no error."""
    layout = Sampled(torch.empty(0, dtype=torch.int64), torch.tensor([0, 0]))
    empty, rewards = torch.empty(0), torch.tensor([1.0, 0.0])
    inputs = AdvantageInputs(
        layout, rewards, values=empty, greedy_rewards=rewards[:1], components={"a": rewards}, logprobs=empty,
        sum_pi_squared=empty,
    )  # fmt: skip
    for name in names.ADVANTAGES:
        assert get_advantage(name)(inputs, {}).advantages.shape == (0,)


def test_a_weight_for_an_unknown_part_of_the_reward_is_refused() -> None:
    with pytest.raises(UserError, match="'acuracy', which the reward does not give; did you mean 'accuracy'"):
        get_advantage("gdpo")(random_case(1).inputs(), {"reward_weights": {"acuracy": 1.0}})


def test_informative_groups_are_those_with_different_graded_rewards() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, NAN, 0.0, NAN, NAN, 3.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4])
    assert informative_groups(rewards, group).tolist() == [True, False, False, False, False]
    assert informative_groups(torch.empty(0), group[:0]).tolist() == []


def test_overlong_penalty_falls_within_the_buffer() -> None:
    lengths = torch.tensor([0, 80, 81, 90, 100, 120])
    expected = torch.tensor([0.0, 0.0, -0.05, -0.5, -1.0, -1.0])
    torch.testing.assert_close(overlong_penalty(lengths, 100, 20), expected)
    torch.testing.assert_close(overlong_penalty(lengths, 100, 20, factor=0.5), 0.5 * expected)
    with pytest.raises(ValueError, match="buffer_tokens=0"):
        overlong_penalty(lengths, 100, 0)


def test_scans_stay_accurate_in_float32_over_long_sequences() -> None:
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor([20000, 1, 4097]))
    values = torch.rand(sequence.numel(), generator=torch.Generator().manual_seed(0))
    for scan, flip in ((lambda x, s: discounted_suffix_sums(x, s, 1.0), True), (prefix_sums, False)):
        for i in range(3):
            row = values[sequence == i].double()
            exact = row.flip(0).cumsum(0).flip(0) if flip else row.cumsum(0)
            torch.testing.assert_close(scan(values, sequence)[sequence == i].double(), exact, rtol=1e-6, atol=0)
