"""The scalar that is differentiated does not depend on how the global minibatch is cut."""

import random

import pytest
import torch
from algorithm_cases import Case, pack, random_case
from torch import Tensor

from lorl.algorithms import names
from lorl.algorithms.aggregation import MODES, Totals, aggregate, graded_tokens, keep_tokens
from lorl.algorithms.catalogue import get_policy_loss
from lorl.algorithms.registry import PolicyLossEntry
from lorl.errors import UserError
from lorl.experience import Sampled

SETTINGS = {"kl_cov_ratio": 0.2, "clip_cov_ratio": 0.3, "clip_cov_low": 0.1}

# Sequence 0 has losses 1, 2, 3; sequence 1 none; sequence 2 has 6.
LAYOUT = Sampled(torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 1]))
LOSSES = torch.tensor([1.0, 2.0, 3.0, 6.0])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 12 / 4),
        ("token-sum", 12),
        ("seq-mean-token-sum", (6 + 6) / 2),
        ("seq-mean-token-mean", (2 + 6) / 2),
        ("seq-mean-token-sum-norm", (6 + 6) / 2 / 10),
    ],
)
def test_by_hand(mode: str, expected: float) -> None:
    assert Totals.of(LAYOUT) == Totals(tokens=4, sequences=2)
    assert aggregate(LOSSES, LAYOUT, mode, Totals.of(LAYOUT), norm=10.0).item() == pytest.approx(expected)


def test_dropped_tokens_leave_sums_lengths_and_totals() -> None:
    kept = torch.tensor([True, False, True, True])
    layout = keep_tokens(LAYOUT, kept)
    assert Totals.of(layout) == Totals.of(LAYOUT, kept) == Totals(tokens=3, sequences=2)
    assert aggregate(LOSSES[kept], layout, "seq-mean-token-mean", Totals.of(layout)).item() == (2 + 6) / 2
    rewards = torch.tensor([1.0, 0.0, float("nan")])
    assert graded_tokens(rewards, LAYOUT).tolist() == [True, True, True, False]


def test_totals_of_ranks_add() -> None:
    assert Totals(3, 1) + Totals(5, 2) == Totals(8, 3)


def test_nothing_to_learn_from_is_zero() -> None:
    layout = Sampled(torch.empty(0, dtype=torch.int64), torch.tensor([0]))
    for mode in MODES:
        assert aggregate(torch.empty(0), layout, mode, Totals.of(layout), norm=1.0).item() == 0


def test_a_misspelt_mode_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean 'token-mean'"):
        aggregate(LOSSES, LAYOUT, "token_mean", Totals.of(LAYOUT))


def loss_and_gradient(case: Case, entry: PolicyLossEntry, mode: str, parts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The minibatch's loss, a backward pass for each part (lists of sequences)."""
    layout, old, advantages = case.layout(), pack(case.old_logprobs), pack(case.sequence_advantages)
    logprobs = pack(case.logprobs).requires_grad_()
    generator = torch.Generator().manual_seed(7)
    selected = entry.select(logprobs, old, advantages, layout, SETTINGS, generator)
    totals, total = Totals.of(layout), torch.zeros((), dtype=torch.float64)
    for part in parts:
        rows = torch.isin(layout.sequence, torch.tensor(part, dtype=torch.int64))
        # The trainer renumbers a part's sequences from zero.
        sequence = torch.searchsorted(torch.tensor(part, dtype=torch.int64), layout.sequence[rows])
        cut = Sampled(sequence, layout.group[part])
        chosen = None if selected is None else selected[rows]
        terms = entry(logprobs[rows], old[rows], advantages[rows], cut, SETTINGS, chosen)
        loss = aggregate(terms.loss, cut, entry.aggregation or mode, totals, norm=5.0)
        loss.backward()
        total = total + loss.detach()
    assert logprobs.grad is not None
    return total, logprobs.grad


@pytest.mark.parametrize("name", names.POLICY_LOSSES)
def test_the_cut_changes_neither_loss_nor_gradient(name: str) -> None:
    entry = get_policy_loss(name)
    for seed in range(12):
        case, rng = random_case(seed), random.Random(seed)
        everything = list(range(len(case.group)))
        homes = [rng.randrange(3) for _ in everything]
        parts = [[i for i in everything if homes[i] == home] for home in range(3)]
        for mode in MODES:
            whole = loss_and_gradient(case, entry, mode, [everything])
            pieces = loss_and_gradient(case, entry, mode, [part for part in parts if part])
            torch.testing.assert_close(whole, pieces, atol=1e-12, rtol=1e-12)
