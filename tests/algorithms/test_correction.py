"""Rollout correction against loops, verl's presets and thresholds, and its metrics by hand."""

import math

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


def log_ratios(case: Case) -> list[list[float]]:
    return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(case.logprobs, case.old_logprobs, strict=True)]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("lower", [None, 0.5])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_equal_the_definition(level: str, lower: float | None, normalize: bool) -> None:
    for seed in range(60):
        case = random_case(seed)
        expected: list[list[float]] = []
        for row in log_ratios(case):
            weights = [math.exp(d) for d in row] if level == "token" else [math.exp(sum(row))] * len(row)
            if lower is None:
                expected.append([min(w, 2.0) for w in weights])
            else:
                expected.append([w if lower <= w <= 2.0 else 0.0 for w in weights])
        if normalize:
            units = [w for row in expected for w in row] if level == "token" else [row[0] for row in expected if row]
            mean = sum(units) / len(units) if units else 0.0
            expected = [[w / mean if mean > 1e-8 else w for w in row] for row in expected]
        correction = Correction(importance=level, upper=2.0, lower=lower, normalize=normalize)  # type: ignore[arg-type]
        weights = run(case, correction).weights
        torch.testing.assert_close(weights, pack(expected), atol=1e-12, rtol=1e-12)


def statistic(mode: str, d: float, new: float, old: float) -> float:
    if mode == "binary_kl":
        p, q = math.exp(new), math.exp(old)
        p, q = (min(max(x, 1e-6), 1 - 1e-6) for x in (p, q))
        return max(a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in ((p, q), (q, p)))
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[mode]


@pytest.mark.parametrize("mode", REJECTIONS)
def test_rejections_equal_the_definition(mode: str) -> None:
    upper, lower = (1.5, 0.8) if mode.endswith("k1") else (0.05, None)
    level, _, estimator = mode.partition("_")
    for seed in range(60):
        case = random_case(seed)
        expected = []
        for row, new, old in zip(log_ratios(case), case.logprobs, case.old_logprobs, strict=True):
            name = estimator if level == "token" else estimator.rpartition("_")[2]
            values = [statistic(name, *each) for each in zip(row, new, old, strict=True)]
            if level == "seq" and values:
                reduced = {"sum": sum, "max": max, "mean": lambda xs: sum(xs) / len(xs)}[estimator.partition("_")[0]]
                values = [reduced(values)] * len(values)
            if lower is not None:
                expected += [math.log(lower) <= value <= math.log(upper) for value in values]
            else:
                expected += [value <= upper for value in values]
        assert run(case, Correction(rejections=(Rejection(mode, upper, lower),))).kept.tolist() == expected


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
