"""Accuracy from graded samples, with intervals, and with skill told from format."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorl.samples import Sample
from lorl.statistics import mean_interval, pass_at_k


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`accuracy` is pass@1, the mean over problems of the share of right samples; `low` and `high` bound it at 95%.

    Problems of which no sample could be graded are not in `n`; `failed` counts samples by what went wrong. Where `n` is
    0 nothing is known, and the numbers are 0.
    """

    accuracy: float
    low: float
    high: float
    n: int
    well_formed: float | None  # share of graded answers in the asked-for format; None where the grader doesn't say
    reward_mean: float
    response_tokens_mean: float
    pass_at: dict[int, tuple[float, float, float]] = field(default_factory=dict)  # k -> (value, low, high)
    failed: dict[str, int] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)  # of each kind in `failed`, what one of its samples came to

    def summary(self) -> dict[str, Any]:
        """JSON, as `summary.json` and `lorl eval --json` hold it."""
        return {
            "accuracy": self.accuracy,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "well_formed": self.well_formed,
            "reward_mean": self.reward_mean,
            "response_tokens_mean": self.response_tokens_mean,
            "pass_at": {str(k): dict(zip(("value", "low", "high"), v, strict=True)) for k, v in self.pass_at.items()},
            "failed": self.failed,
        }

    def metrics(self) -> dict[str, float]:
        """For the trackers; nothing where nothing was graded."""
        if not self.n:
            return {}
        found = {
            "eval/accuracy": self.accuracy,
            "eval/accuracy_low": self.low,
            "eval/accuracy_high": self.high,
            "eval/reward_mean": self.reward_mean,
            "eval/response_tokens_mean": self.response_tokens_mean,
        }
        found |= {f"eval/pass_at_{k}": value for k, (value, _, _) in self.pass_at.items()}
        return found if self.well_formed is None else found | {"eval/well_formed": self.well_formed}

    def sentence(self) -> str:
        shape = "" if self.well_formed is None else f", {self.well_formed:.1%} well-formed"
        if not self.n:
            return f"accuracy unknown: {self.failures()}"
        told = f"accuracy {self.accuracy:.3f} (95%: {self.low:.3f} to {self.high:.3f}; {self.n} problems{shape})"
        return f"{told}; {self.failures()}" if self.failed else told

    def failures(self) -> str:
        """How many samples were not graded, by kind, each with an example."""
        kinds = (f"{count} {status!r} ({self.details[status]})" for status, count in self.failed.items())
        return "samples not graded: " + ", ".join(kinds)


def evaluate(samples: Sequence[Sample], *, success: float) -> Evaluation:
    """Judges samples of one or more problems, any number a problem; a reward of at least `success` is right."""
    right: dict[str, list[bool]] = defaultdict(list)
    formed: list[float] = []
    rewards: list[float] = []
    for sample in samples:
        if sample.outcome.reward is None:
            continue
        right[sample.completion.prompt.id].append(sample.outcome.reward >= success)
        rewards.append(sample.outcome.reward)
        shape = sample.outcome.extras.get("well_formed")
        if isinstance(shape, int | float):
            formed.append(float(shape))
    scores = [sum(marks) / len(marks) for marks in right.values()]
    low, high = mean_interval(scores)
    fewest = min((len(marks) for marks in right.values()), default=0)
    pass_at = {}
    for k in [2**i for i in range(1, 11) if 2**i <= fewest]:
        values = [pass_at_k(len(marks), sum(marks), k) for marks in right.values()]
        pass_at[k] = (sum(values) / len(values), *mean_interval(values))
    lost = [s.outcome for s in samples if s.outcome.status != "ok"]
    failed = Counter(outcome.status for outcome in lost)
    return Evaluation(
        accuracy=_mean(scores),
        low=low,
        high=high,
        n=len(scores),
        well_formed=_mean(formed) if formed else None,
        reward_mean=_mean(rewards),
        response_tokens_mean=_mean([float(len(s.completion.tokens)) for s in samples]),
        pass_at=pass_at,
        failed=dict(failed),
        details={outcome.status: outcome.detail for outcome in reversed(lost)},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
