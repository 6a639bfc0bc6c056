"""KL(policy || reference) from the log-probabilities of sampled tokens, and the controllers of its coefficient.

With d = logprobs - ref_logprobs of a token drawn from the policy (Schulman 2020, "Approximating KL divergence",
joschu.net/blog/kl-approx.html). All are float[M]; log-ratios are clamped to ±20 so that their exponentials stay finite.

As a loss, the *gradient* of an estimator is not an estimate of the KL's gradient: k1's has mean zero, k3's is biased,
and k2's is unbiased on policy (Tang and Munos 2025, arXiv 2506.09477). The straight-through forms "k1+", "k3+", … have
the estimator's value and k2's gradient.
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from lorl.algorithms.registry import KLEntry, kl

SCHULMAN = "Schulman 2020, joschu.net/blog/kl-approx.html"
MAX_LOG_RATIO = 20.0


@kl("k1", source=SCHULMAN)
def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d: unbiased, high variance, may be negative."""
    return logprobs - ref_logprobs


@kl("abs", source="verl")
def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|d|: a distance, not an estimate of the KL."""
    return (logprobs - ref_logprobs).abs()


@kl("k2", source=SCHULMAN)
def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d² / 2: biased in value; its gradient is the KL's on policy."""
    return 0.5 * (logprobs - ref_logprobs).square()


@kl("k3", source=f"{SCHULMAN}; GRPO, arXiv 2402.03300, eq. 4")
def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) + d - 1: unbiased, low variance, never negative."""
    ahead = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return ahead.expm1() - ahead


@kl("low_var_kl", source="verl")
def low_var_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 clamped to at most 10, as verl does: a token further off than that has no gradient. Prefer k3."""
    return k3(logprobs, ref_logprobs).clamp(max=10.0)


@kl("full", source="the definition", needs_logits=True)
def full(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """sum_v p_v (log p_v - log q_v) over the vocabulary, exact; from float[M, V] logits of both policies."""
    policy, reference = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (policy.exp() * (policy - reference)).sum(-1)


def straight_through(entry: KLEntry) -> KLEntry:
    """`entry` with its own value and k2's gradient, under its name with a "+"."""
    if entry.needs_logits:
        raise ValueError(f"KL estimator {entry.name!r} has the exact gradient already")

    def estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        carrier = k2(logprobs, ref_logprobs)
        return carrier + (entry.function(logprobs, ref_logprobs) - carrier).detach()

    estimate.__doc__ = f"Straight-through: the value of {entry.name}, the gradient of k2."
    source = f"{entry.source}; Tang and Munos 2025, arXiv 2506.09477"
    return replace(entry, name=f"{entry.name}+", function=estimate, source=source)


@dataclass
class FixedKL:
    """A coefficient that stays."""

    coef: float

    def update(self, kl: float, samples: int) -> None:
        """Nothing: the coefficient is fixed."""

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        """Nothing: the coefficient is the configuration's, also after a resume that changed it."""


@dataclass
class AdaptiveKL:
    """coef *= 1 + clip(kl / target - 1, ±0.2) samples / horizon (Ziegler et al. 2019, arXiv 1909.08593).

    `horizon` counts samples, as in the authors' code; the paper's K_beta is samples / horizon.
    """

    coef: float
    target: float
    horizon: float

    def update(self, kl: float, samples: int) -> None:
        """After a step whose mean KL was `kl`, over `samples` sequences. A KL that is not finite changes nothing."""
        if math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * samples / self.horizon

    def state(self) -> dict[str, float]:
        """JSON-able, for the checkpoint."""
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        self.coef = float(state["coef"])
