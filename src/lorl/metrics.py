"""What a step reports. Everything under time/, throughput/ and memory/ is the machine's; the rest repeats exactly."""

import resource
import statistics
from collections import Counter
from collections.abc import Sequence

import torch

from lorl.experience import Experience
from lorl.parallel.workers import UpdateReport
from lorl.samples import Sample


def of_samples(samples: Sequence[Sample]) -> dict[str, float]:
    """Rewards and rollouts. Statistics of rewards are over the samples that were graded."""
    rewards = [s.outcome.reward for s in samples if s.outcome.reward is not None]
    lengths = [len(s.completion.tokens) for s in samples]
    statuses = Counter(s.outcome.status for s in samples)
    values: dict[str, float] = {
        "reward/ok_fraction": statuses["ok"] / len(samples),
        "rollout/response_tokens_mean": statistics.fmean(lengths),
        "rollout/response_tokens_max": max(lengths),
        # how long the engine ran for the last tenth of the samples alone: what uneven lengths cost
        "time/rollout_tail_s": _tail([s.finished_s for s in samples]),
        "rollout/truncated_fraction": sum(s.completion.finish == "length" for s in samples) / len(samples),
        # the mean surprise of what was sampled: an unbiased estimate of the entropy, in nats a token, at no cost. Where
        # the update computes the exact one (algorithm.entropy_coef), that takes its place
        "policy/entropy": -statistics.fmean(value for s in samples for value in s.completion.logprobs),
    }
    values |= {f"reward/{status}_fraction": n / len(samples) for status, n in statuses.items() if status != "ok"}
    if rewards:
        values |= {
            "reward/mean": statistics.fmean(rewards),
            "reward/std": statistics.pstdev(rewards),
            "reward/min": min(rewards),
            "reward/max": max(rewards),
        }
    extras: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.outcome.extras.items():
            if isinstance(value, int | float):
                extras.setdefault(name, []).append(float(value))
    return values | {f"reward/{name}": statistics.fmean(found) for name, found in sorted(extras.items())}


def _tail(seconds: Sequence[float]) -> float:
    ordered = sorted(seconds)
    return ordered[-1] - ordered[(len(ordered) * 9 - 1) // 10]


def of_update(report: UpdateReport, experience: Experience) -> dict[str, float]:
    """The update's own means, and how much of the batch could teach anything."""
    advantages = experience.advantages
    assert advantages is not None
    moving = torch.zeros(int(experience.layout.group.max()) + 1, dtype=torch.bool)
    moving[experience.layout.group[experience.layout.sequence[advantages != 0]]] = True
    values = report.metrics | {
        "rollout/informative_fraction": float(moving.float().mean()),
        "train/skipped": float(report.skipped is not None),
    }
    if report.mismatch is not None:
        values |= {"rollout/mismatch": report.mismatch, "rollout/mismatch_max": report.mismatch_max}
    return values


def of_machine(
    *,
    step_s: float,
    rollout_s: float,
    estimate_s: float,
    update_s: float,
    publish_s: float,
    rollout_tokens: int,
    trained_tokens: int,
) -> dict[str, float]:
    """Seconds, tokens a second, and this process's memory in GiB.

    `estimate_s` is from samples to advantages: packing, and the log-probabilities and values that the algorithm reads.
    """
    return {
        "time/step_s": step_s,
        "time/rollout_s": rollout_s,
        "time/estimate_s": estimate_s,
        "time/update_s": update_s,
        "time/publish_s": publish_s,
        "throughput/rollout_tokens_per_s": rollout_tokens / rollout_s,
        "throughput/train_tokens_per_s": trained_tokens / update_s,
        "memory/rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # the peak; Linux counts KiB
    }
