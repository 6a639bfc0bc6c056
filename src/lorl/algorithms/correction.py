"""Rollout correction: the engine that sampled is not quite the policy that trains (other kernels, an older version).

With log r_t = log pi_train - log pi_rollout of each sampled token, a `Correction` weighs tokens by importance
(truncated, or masked outside bounds: IcePop), rejects tokens or whole sequences that are too far off, or bypasses the
trainer's own old log-probabilities. After "When Speed Kills Stability" (Liu et al. 2025, richardli.xyz/rl-collapse),
truncated importance sampling (Yao et al. 2025, fengyao.notion.site/off-policy-rl) and IcePop (Ling Team 2025,
arXiv 2510.18855).

Log-ratios are clamped to ±20 before they are exponentiated. Weights carry no gradient: they change the measure, not the
objective.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lorl.algorithms.segments import max_by, mean_by, sum_by
from lorl.errors import UserError, nearest
from lorl.experience import Sampled

MAX_LOG_RATIO = 20.0

Level = Literal["token", "sequence"]

REJECTIONS = (
    "token_k1",
    "token_k2",
    "token_k3",
    "token_binary_kl",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
)


@dataclass(frozen=True, slots=True)
class Rejection:
    """One test that tokens or sequences must pass: statistic <= upper.

    A k1 test bounds pi_rollout / pi_train from both sides: lower <= exp(statistic) <= upper.
    """

    mode: str
    upper: float
    lower: float | None = None


@dataclass(frozen=True, slots=True)
class Correction:
    """What to do about the difference between engine and trainer. The default measures it and does nothing."""

    importance: Level | None = None
    upper: float = 2.0  # of the importance weight
    lower: float | None = None  # None: weights above `upper` are truncated to it; else those outside become zero
    normalize: bool = False  # divide the weights by their mean over the batch
    rejections: tuple[Rejection, ...] = ()  # a token must pass all
    bypass: bool = False  # take the engine's log-probabilities as the old ones
    bypass_loss: Literal["ppo_clip", "reinforce"] = "ppo_clip"  # with bypass; reinforce applies the weights


@dataclass(frozen=True, slots=True)
class Corrected:
    """`weights` multiply the policy loss of each token; `kept` is what takes part in the loss at all."""

    weights: Tensor | None  # float[M], None where no importance weights are asked for
    kept: Tensor  # bool[M]
    metrics: dict[str, Tensor]  # verl's names without "rollout_corr/", scalars


_TOKEN_IS = Correction(importance="token")
_SEQ_IS = Correction(importance="sequence")
_GEO = (Rejection("seq_mean_k1", upper=1.001, lower=0.999),)
_K3 = (Rejection("seq_mean_k3", upper=0.01),)
_ICEPOP = Correction(importance="token", upper=5.0, lower=0.5)
_BYPASS = Correction(bypass=True)
_BYPASS_PG = Correction(bypass=True, bypass_loss="reinforce")

# verl's RolloutCorrectionConfig classmethods at their default thresholds.
PRESETS: dict[str, Correction] = {
    "disabled": Correction(),
    "decoupled_token_is": _TOKEN_IS,
    "decoupled_seq_is": _SEQ_IS,
    "decoupled_token_icepop": _ICEPOP,
    "decoupled_seq_is_rs": replace(_SEQ_IS, rejections=(Rejection("seq_sum_k1", upper=2.0, lower=0.5),)),
    "decoupled_geo_rs": Correction(rejections=_GEO),
    "decoupled_geo_rs_seq_tis": replace(_SEQ_IS, rejections=_GEO),
    "decoupled_geo_rs_token_tis": replace(_TOKEN_IS, rejections=_GEO),
    "decoupled_k3_rs": Correction(rejections=_K3),
    "decoupled_k3_rs_seq_tis": replace(_SEQ_IS, rejections=_K3),
    "decoupled_k3_rs_token_tis": replace(_TOKEN_IS, rejections=_K3),
    "bypass_ppo_clip": _BYPASS,
    "bypass_ppo_clip_geo_rs": replace(_BYPASS, rejections=_GEO),
    "bypass_ppo_clip_k3_rs": replace(_BYPASS, rejections=_K3),
    "bypass_pg_is": replace(_BYPASS_PG, importance="sequence"),
    "bypass_pg_token_icepop": replace(_ICEPOP, bypass=True, bypass_loss="reinforce"),
    "bypass_pg_geo_rs": replace(_BYPASS_PG, rejections=_GEO),
    "bypass_pg_geo_rs_seq_tis": replace(_BYPASS_PG, importance="sequence", rejections=_GEO),
    "bypass_pg_geo_rs_token_tis": replace(_BYPASS_PG, importance="token", rejections=_GEO),
}


def describe(correction: Correction) -> str:
    """One line on what `correction` does."""
    parts = []
    if correction.bypass:
        loss = {"ppo_clip": "the clipped loss", "reinforce": "REINFORCE"}[correction.bypass_loss]
        parts.append(f"{loss} on the engine's log-probabilities")
    if correction.importance is not None:
        bounds = f"truncated at {correction.upper:g}"
        if correction.lower is not None:
            bounds = f"zero outside {correction.lower:g} to {correction.upper:g}"
        parts.append(f"{correction.importance} weights {bounds}")
    for test in correction.rejections:
        bounds = f"above {test.upper:g}" if test.lower is None else f"outside {test.lower:g} to {test.upper:g}"
        parts.append(f"rejects {test.mode} {bounds}")
    return ", ".join(parts) or "neither measured nor corrected"


def source_of(correction: Correction) -> str:
    """Whose idea a preset is."""
    found = []
    if correction.importance == "token":
        icepop = correction.lower is not None
        found.append("IcePop, Ling Team 2025, arXiv 2510.18855" if icepop else "Yao et al. 2025")
    if correction.importance == "sequence" or correction.rejections:
        found.append("Liu et al. 2025, richardli.xyz/rl-collapse")
    return "; ".join(["verl", *found])


def get_preset(name: str) -> Correction:
    """verl's preset of that name. Raises UserError with the nearest name."""
    if name not in PRESETS:
        raise UserError(f"there is no rollout-correction preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]


def parse_bounds(text: str | float, key: str) -> tuple[float | None, float]:
    """(lower, upper) from verl's "lower_upper", or (None, upper) from a number. `key` is named in the UserError."""
    parts = str(text).split("_")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < n < math.inf for n in numbers) or numbers[0] > numbers[-1]:
        raise UserError(f"{key}={text!r} must be a positive bound such as 2.0, or lower_upper such as 0.5_2.0")
    return (numbers[0] if len(numbers) == 2 else None), numbers[-1]


def parse_rejections(modes: str, thresholds: str | float, key: str) -> tuple[Rejection, ...]:
    """Rejections from verl's comma lists rollout_rs and rollout_rs_threshold: a bound for each mode, or one for all.

    A k1 mode with a single bound x takes 1/x to x; the others refuse a lower bound. Raises UserError that names `key`.
    """
    names = list(dict.fromkeys(part.strip() for part in modes.split(",") if part.strip()))
    bounds = [part.strip() for part in str(thresholds).split(",") if part.strip()]
    if len(bounds) not in (1, len(names)):
        raise UserError(f"{key} names {len(names)} modes and {len(bounds)} thresholds; give one each, or one for all")
    bounds = bounds * len(names) if len(bounds) == 1 else bounds
    return tuple(_rejection(name, bound, key) for name, bound in zip(names, bounds, strict=True))


def _rejection(name: str, bound: str, key: str) -> Rejection:
    mode = "token_binary_kl" if name == "binary_kl" else name
    if mode not in REJECTIONS:
        raise UserError(f"{key} has no mode {name!r}; {nearest(name, REJECTIONS)}")
    lower, upper = parse_bounds(bound, key)
    if mode.endswith("k1"):
        lower = 1 / upper if lower is None else lower
        if lower > upper:
            raise UserError(f"{key}={bound!r}: a single bound for {name} must be at least 1; it stands for 1/x to x")
    elif lower is not None:
        raise UserError(f"{key}={bound!r}: {name} takes one upper bound, not lower_upper")
    return Rejection(mode, upper, lower)


@torch.no_grad()
def correct(logprobs: Tensor, rollout_logprobs: Tensor, layout: Sampled, correction: Correction) -> Corrected:
    """Weights, rejection and metrics for the tokens of a batch; `logprobs` and `rollout_logprobs` are float[M].

    `logprobs` is the trainer's at the step's start; with bypass, that of the current policy. Without `normalize` each
    sequence is judged by itself, so the result does not depend on how a batch is cut.
    """
    log_ratio = logprobs - rollout_logprobs
    kept = torch.ones_like(log_ratio, dtype=torch.bool)
    if not log_ratio.numel():
        return Corrected(None if correction.importance is None else log_ratio, kept, {})
    metrics = mismatch_metrics(logprobs, rollout_logprobs, layout)
    for rejection in correction.rejections:
        passed = passes(rejection, logprobs, rollout_logprobs, layout)
        metrics[f"rollout_rs_{rejection.mode}_masked_fraction"] = (~passed).to(log_ratio.dtype).mean()
        kept &= passed
    if correction.rejections:
        metrics["rollout_rs_masked_fraction"] = (~kept).to(log_ratio.dtype).mean()
        metrics["rollout_rs_seq_masked_fraction"] = _sequence_mean(
            max_by((~kept).to(log_ratio.dtype), layout.sequence, layout.num_sequences), layout
        )
    if correction.importance is None:
        return Corrected(None, kept, metrics)
    weights = importance_weights(log_ratio, layout, correction.importance, correction.upper, correction.lower)
    metrics |= weight_metrics(log_ratio, weights, layout, correction)
    if correction.normalize:
        weights = normalize_weights(weights, layout, correction.importance)
    return Corrected(weights, kept, metrics)


def importance_weights(
    log_ratio: Tensor, layout: Sampled, level: Level, upper: float, lower: float | None = None
) -> Tensor:
    """float[M]: r_t, or the product of the sequence's r_t for each of its tokens, truncated to `upper`.

    With `lower`, weights outside [lower, upper] become zero instead: masked importance sampling, IcePop at token level.
    """
    raw = _raw_weights(log_ratio, layout, level)
    if lower is None:
        return raw.clamp(max=upper)
    return torch.where((raw >= lower) & (raw <= upper), raw, 0)


def normalize_weights(weights: Tensor, layout: Sampled, level: Level) -> Tensor:
    """float[M]: weights over their mean, of tokens at token level and of sequences at sequence level."""
    if level == "token":
        mean = weights.mean()
    else:
        mean = _sequence_mean(mean_by(weights, layout.sequence, layout.num_sequences), layout)
    return torch.where(mean > 1e-8, weights / mean, weights)


def passes(rejection: Rejection, logprobs: Tensor, rollout_logprobs: Tensor, layout: Sampled) -> Tensor:
    """bool[M]: tokens that the test lets through; a test on sequences lets through all of a sequence or nothing.

    k1 = -log r, k2 = (log r)² / 2, k3 = r - 1 - log r of each token; binary_kl is the larger of KL(p || q) and
    KL(q || p) of "this token or another" (KPop). A sequence is judged by their sum, mean or largest.
    """
    if rejection.mode == "token_binary_kl":
        statistic = _binary_kl(logprobs, rollout_logprobs)
        return statistic <= rejection.upper
    level, _, rest = rejection.mode.partition("_")
    reduction, _, estimator = rest.rpartition("_")
    log_ratio = (logprobs - rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    statistic = {
        "k1": -log_ratio,
        "k2": 0.5 * log_ratio.square(),
        "k3": log_ratio.expm1() - log_ratio,
    }[estimator]
    if level == "seq":
        reduce = {"sum": sum_by, "mean": mean_by, "max": max_by}[reduction]
        statistic = reduce(statistic, layout.sequence, layout.num_sequences)[layout.sequence]
    if estimator != "k1":
        return statistic <= rejection.upper
    assert rejection.lower is not None
    return (statistic >= math.log(rejection.lower)) & (statistic <= math.log(rejection.upper))


def mismatch_metrics(logprobs: Tensor, rollout_logprobs: Tensor, layout: Sampled) -> dict[str, Tensor]:
    """How far trainer and engine are apart, as scalars under verl's names. Needs a token.

    kl and k3_kl estimate KL(rollout || train); perplexities and their ratio are means over sequences; chi2_token and
    chi2_seq are E[r²] - 1 of tokens and of whole sequences.
    """
    sequence, size = layout.sequence, layout.num_sequences
    log_ratio = logprobs - rollout_logprobs
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    train = mean_by(logprobs, sequence, size)
    rollout = mean_by(rollout_logprobs, sequence, size)
    difference = rollout - train
    product = sum_by(log_ratio, sequence, size).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "kl": -log_ratio.mean(),
        "k3_kl": (clamped.expm1() - clamped).mean(),
        "training_ppl": _sequence_mean((-train).exp(), layout),
        "rollout_ppl": _sequence_mean((-rollout).exp(), layout),
        "log_ppl_diff": _sequence_mean(difference, layout),
        "log_ppl_abs_diff": _sequence_mean(difference.abs(), layout),
        "ppl_ratio": _sequence_mean(difference.exp(), layout),
        "chi2_token": (2 * clamped).exp().mean() - 1,
        "chi2_seq": _sequence_mean((2 * product).exp(), layout) - 1,
    }


def weight_metrics(log_ratio: Tensor, weights: Tensor, layout: Sampled, correction: Correction) -> dict[str, Tensor]:
    """Statistics of the importance weights before normalisation.

    Largest and smallest are those before truncation. The effective sample size is a fraction, (sum w)² / (M sum w²).
    Without a lower bound, low means below 1 / upper.
    """
    assert correction.importance is not None
    raw = _raw_weights(log_ratio, layout, correction.importance)
    lower = 1 / correction.upper if correction.lower is None else correction.lower
    return {
        "rollout_is_mean": weights.mean(),
        "rollout_is_max": raw.max(),
        "rollout_is_min": raw.min(),
        "rollout_is_std": weights.std(correction=0),
        "rollout_is_eff_sample_size": weights.mean().square() / weights.square().mean(),
        "rollout_is_ratio_fraction_high": (raw > correction.upper).to(raw.dtype).mean(),
        "rollout_is_ratio_fraction_low": (raw < lower).to(raw.dtype).mean(),
    }


def _raw_weights(log_ratio: Tensor, layout: Sampled, level: Level) -> Tensor:
    if level == "sequence":
        log_ratio = sum_by(log_ratio, layout.sequence, layout.num_sequences)[layout.sequence]
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _sequence_mean(values: Tensor, layout: Sampled) -> Tensor:
    """The mean of `values[S]` over sequences that own a token."""
    owning = layout.lengths() > 0
    return values[owning].mean()


def _binary_kl(logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    # Away from 0 and 1 by 1e-6, as in verl, for float32.
    p, q = logprobs.exp().clamp(1e-6, 1 - 1e-6), rollout_logprobs.exp().clamp(1e-6, 1 - 1e-6)
    forward = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    backward = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    return forward.maximum(backward)
