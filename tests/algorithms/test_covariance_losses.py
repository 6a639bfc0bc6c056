"""Which tokens Clip-Cov and KL-Cov pick, over the whole minibatch."""

import torch

from lorl.algorithms.catalogue import get_policy_loss
from lorl.experience import Sampled

# Advantages ±1 and log-probabilities 0, -1, …: the mean of each is removed, and their products are the covariances.
LOGPROBS = torch.tensor([-0.5, -1.5, -2.5, -3.5])  # minus mean: 1.5, 0.5, -0.5, -1.5
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, -1.0])  # covariances 1.5, 0.5, 0.5, 1.5
LAYOUT = Sampled(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0]))


def test_kl_cov_takes_the_largest_covariances() -> None:
    select = get_policy_loss("kl_cov").select
    assert select(LOGPROBS, LOGPROBS, ADVANTAGES, LAYOUT, {"kl_cov_ratio": 0.5}).tolist() == [True, False, False, True]
    assert select(LOGPROBS, LOGPROBS, ADVANTAGES, LAYOUT, {"kl_cov_ratio": 1e-9}).sum() == 1


def test_clip_cov_draws_from_the_band_by_the_generator_it_is_given() -> None:
    select = get_policy_loss("clip_cov").select
    settings = {"clip_cov_low": 1.0, "clip_cov_high": 2.0, "clip_cov_ratio": 0.25}

    def draw(seed: int) -> list[bool]:
        generator = torch.Generator().manual_seed(seed)
        return select(LOGPROBS, LOGPROBS, ADVANTAGES, LAYOUT, settings, generator).tolist()

    drawn = {tuple(draw(seed)) for seed in range(20)}
    assert drawn == {(True, False, False, False), (False, False, False, True)}
    assert draw(3) == draw(3)


def test_clip_cov_leaves_alone_what_ppo_clips() -> None:
    settings = {"clip_cov_low": 1.0, "clip_cov_high": 2.0, "clip_cov_ratio": 1.0}
    old = LOGPROBS - torch.tensor(
        [0.5, 0.0, 0.0, 0.0]
    )  # the first token's ratio is past 1.2, and its advantage positive
    selected = get_policy_loss("clip_cov").select(LOGPROBS, old, ADVANTAGES, LAYOUT, settings)
    assert selected.tolist() == [False, False, False, True]


def test_no_candidate_no_selection() -> None:
    settings = {"clip_cov_low": 7.0, "clip_cov_high": 9.0}
    assert not get_policy_loss("clip_cov").select(LOGPROBS, LOGPROBS, ADVANTAGES, LAYOUT, settings).any()
    empty = torch.empty(0)
    layout = Sampled(torch.empty(0, dtype=torch.int64), torch.tensor([0]))
    for name in ("clip_cov", "kl_cov"):
        assert get_policy_loss(name).select(empty, empty, empty, layout, {}).shape == (0,)
