"""Rollout correction against loops, verl's presets and thresholds, and its metrics by hand."""

import math

import paper_correction
import pytest
import torch
from algorithm_cases import Case, pack, random_case

from lorl.algorithms.correction import (
    PRESETS,
    REJECTIONS,
    Correction,
    Rejection,
    correct,
    get_preset,
    parse_bounds,
    parse_rejections,
)
from lorl.errors import UserError
from lorl.experience import Sampled


def run(case: Case, correction: Correction):
    return correct(pack(case.logprobs), pack(case.old_logprobs), case.layout(), correction)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("lower", [None, 0.5])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_equal_the_definition(level: str, lower: float | None, normalize: bool) -> None:
    for seed in range(60):
        case = random_case(seed)
        correction = Correction(importance=level, upper=2.0, lower=lower, normalize=normalize)  # type: ignore[arg-type]
        expected = paper_correction.weights(case, correction)
        torch.testing.assert_close(run(case, correction).weights, pack(expected), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("mode", REJECTIONS)
def test_rejections_equal_the_definition(mode: str) -> None:
    upper, lower = (1.5, 0.8) if mode.endswith("k1") else (0.05, None)
    correction = Correction(rejections=(Rejection(mode, upper, lower),))
    for seed in range(60):
        case = random_case(seed)
        assert run(case, correction).kept.tolist() == paper_correction.kept(case, correction)


def test_a_token_must_pass_every_test() -> None:
    case = random_case(4)
    tests = (Rejection("token_k2", 0.1), Rejection("seq_mean_k3", 0.3))
    both = run(case, Correction(rejections=tests)).kept
    each = [run(case, Correction(rejections=(test,))).kept for test in tests]
    assert torch.equal(both, each[0] & each[1])


def test_metrics_by_hand() -> None:
    """One sequence of two tokens with ratios 2 and 1/2, one of a single token with ratio 1/2, one without a token."""
    layout = Sampled(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))
    rollout = torch.tensor([0.25, 0.5, 0.5], dtype=torch.float64).log()
    train = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    metrics = correct(train, rollout, layout, Correction(importance="token", upper=1.5)).metrics
    expected = {
        "kl": math.log(2) / 3,
        "k3_kl": ((2 - 1 - math.log(2)) + 2 * (0.5 - 1 + math.log(2))) / 3,
        "chi2_token": (4 + 0.25 + 0.25) / 3 - 1,
        "chi2_seq": (1 + 0.25) / 2 - 1,
        "ppl_ratio": (1 + 2) / 2,
        "training_ppl": (math.sqrt(8) + 4) / 2,
        "rollout_ppl": (math.sqrt(8) + 2) / 2,
        "log_ppl_diff": math.log(2) / 2,
        "rollout_is_mean": 2.5 / 3,  # of 1.5, 0.5 and 0.5
        "rollout_is_max": 2.0,
        "rollout_is_min": 0.5,
        "rollout_is_eff_sample_size": 2.5**2 / (3 * (2.25 + 0.25 + 0.25)),
        "rollout_is_ratio_fraction_high": 1 / 3,
        "rollout_is_ratio_fraction_low": 2 / 3,  # below 1 / 1.5
    }
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, abs=1e-12), name


def test_rejection_metrics_count_tokens_and_sequences() -> None:
    layout = Sampled(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0]))
    train = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    rollout = torch.tensor([-1.0, -1.0, -3.0, -1.0])
    result = correct(train, rollout, layout, Correction(rejections=(Rejection("token_k2", 0.5),)))
    assert result.kept.tolist() == [True, True, False, True]
    assert result.weights is None
    assert result.metrics["rollout_rs_masked_fraction"].item() == 0.25
    assert result.metrics["rollout_rs_token_k2_masked_fraction"].item() == 0.25
    assert result.metrics["rollout_rs_seq_masked_fraction"].item() == 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_leaves_equal_policies_alone(preset: str) -> None:
    case = random_case(2)
    same = correct(pack(case.logprobs), pack(case.logprobs), case.layout(), get_preset(preset))
    assert same.kept.all()
    assert same.weights is None or torch.equal(same.weights, torch.ones_like(same.weights))


@pytest.mark.parametrize("preset", PRESETS)
def test_no_tokens_no_error(preset: str) -> None:
    layout = Sampled(torch.empty(0, dtype=torch.int64), torch.tensor([0, 0]))
    assert correct(torch.empty(0), torch.empty(0), layout, get_preset(preset)).kept.shape == (0,)


def test_presets_are_verls() -> None:
    geo, k3 = Rejection("seq_mean_k1", 1.001, 0.999), Rejection("seq_mean_k3", 0.01)
    assert get_preset("decoupled_geo_rs_token_tis") == Correction("token", 2.0, rejections=(geo,))
    assert get_preset("decoupled_seq_is_rs").rejections == (Rejection("seq_sum_k1", 2.0, 0.5),)
    assert get_preset("decoupled_token_icepop") == Correction("token", upper=5.0, lower=0.5)
    assert get_preset("bypass_ppo_clip_k3_rs") == Correction(rejections=(k3,), bypass=True)
    assert get_preset("bypass_pg_is") == Correction("sequence", bypass=True, bypass_loss="reinforce")
    assert len(PRESETS) == 19
    with pytest.raises(UserError, match="did you mean 'decoupled_token_is'"):
        get_preset("decoupled_tokn_is")


def test_verls_thresholds_are_read() -> None:
    assert parse_bounds(2.0, "k") == parse_bounds("2.0", "k") == (None, 2.0)
    assert parse_bounds("0.5_5", "k") == (0.5, 5.0)
    assert parse_rejections("token_k1, seq_max_k2", "1.25,0.1", "k") == (
        Rejection("token_k1", 1.25, 0.8),
        Rejection("seq_max_k2", 0.1),
    )
    assert parse_rejections("seq_mean_k3,token_k3", 0.01, "k") == (
        Rejection("seq_mean_k3", 0.01),
        Rejection("token_k3", 0.01),
    )
    assert parse_rejections("binary_kl", "0.1", "k") == (Rejection("token_binary_kl", 0.1),)


@pytest.mark.parametrize(
    ("modes", "thresholds", "message"),
    [
        ("token_k4", "1.0", "did you mean 'token_k"),
        ("token_k1", "2.0_0.5", "lower_upper"),
        ("token_k1", "abc", "positive bound"),
        ("token_k1", "0.5", "at least 1"),
        ("token_k1", "-1", "positive bound"),
        ("token_k2", "0.1_0.2", "one upper bound"),
        ("token_k2,token_k3", "0.1,0.2,0.3", "2 modes and 3 thresholds"),
    ],
)
def test_impossible_thresholds_get_a_sentence_that_names_the_key(modes: str, thresholds: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_rejections(modes, thresholds, "rollout_rs_threshold")
    assert "rollout_rs_threshold" in str(caught.value)
