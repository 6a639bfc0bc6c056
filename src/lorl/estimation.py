"""From graded samples to advantages: computes what the configured objective reads, and nothing else."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorl.algorithms.correction import correct
from lorl.algorithms.inputs import AdvantageInputs
from lorl.errors import UserError, nearest
from lorl.experience import Experience
from lorl.objective import Objective
from lorl.parallel.workers import Workers
from lorl.policy.load import TRAINED
from lorl.samples import Sample


def estimate(
    experience: Experience,
    samples: Sequence[Sample],
    *,
    workers: Workers,
    objective: Objective,
    kl_coef: float,
    greedy_rewards: Callable[[], Tensor],
) -> dict[str, float]:
    """Fills in `experience` up to its advantages and returns. `samples[i]` is its sequence i.

    Returns:
        Metrics: rollout correction's, the KL where it is part of the reward, and the seconds that greedy answers took.

    Raises:
        UserError: the rewards lack the parts that the estimator reads.
    """
    needs = objective.advantage.needs
    logprobs, squares = _passes(experience, workers, objective)
    metrics = _correct(experience, objective)
    token_rewards = None
    if objective.kl_in_reward:
        kl = _kl(experience, workers, objective)
        token_rewards = -kl_coef * kl
        metrics["policy/kl"] = float(kl.mean())
    greedy = None
    if "greedy_rewards" in needs:
        started = time.perf_counter()
        greedy = greedy_rewards()
        metrics["time/greedy_s"] = time.perf_counter() - started
    inputs = AdvantageInputs(
        experience.layout,
        experience.rewards,
        token_rewards,
        values=experience.values,
        greedy_rewards=greedy,
        components=components(samples, objective) if "components" in needs else None,
        logprobs=logprobs,
        sum_pi_squared=squares,
        correction_weights=experience.weights,
    )
    found = objective.advantage(inputs, objective.settings)
    if objective.needs_critic and found.returns is None:
        raise UserError(
            f"algorithm.advantage={objective.advantage.name} needs the critic's values and gives it nothing to learn; "
            "return (advantages, returns)"
        )
    experience.advantages, experience.returns = found.advantages, found.returns
    return metrics


def _passes(experience: Experience, workers: Workers, objective: Objective) -> tuple[Tensor | None, Tensor | None]:
    """Fills in old and reference log-probabilities and values, where they are read. Returns the trained adapter's
    log-probabilities and sums of squared probabilities, float32[M] each, where the step needed them."""
    needs = objective.advantage.needs
    logprobs = squares = None
    if "sum_pi_squared" in needs:
        logprobs, squares = workers.logprobs_and_squares(experience)
    elif objective.needs_old_logprobs or "logprobs" in needs:
        logprobs = workers.logprobs(experience, adapter=TRAINED)
    if objective.bypass:
        experience.old_logprobs = experience.rollout_logprobs
    elif objective.needs_old_logprobs:
        experience.old_logprobs = logprobs
    if (objective.kl_in_loss or objective.kl_in_reward) and not objective.kl.needs_logits:
        experience.ref_logprobs = workers.logprobs(experience, adapter=workers.reference)
    if objective.needs_critic:
        experience.values = workers.values(experience)
    return logprobs, squares


def _kl(experience: Experience, workers: Workers, objective: Objective) -> Tensor:
    """float32[M]: the configured estimate of the policy's divergence from its reference at each token."""
    if objective.kl.needs_logits:
        return workers.full_kl(experience)
    assert experience.old_logprobs is not None
    assert experience.ref_logprobs is not None
    return objective.kl(experience.old_logprobs, experience.ref_logprobs)


def _correct(experience: Experience, objective: Objective) -> dict[str, float]:
    """Rollout correction of the whole batch: it acts on the loss, not on the advantages' baselines. Under bypass each
    minibatch does its own."""
    if objective.correction is None or objective.bypass:
        return {}
    assert experience.old_logprobs is not None
    found = correct(experience.old_logprobs, experience.rollout_logprobs, experience.layout, objective.correction)
    experience.weights = found.weights
    experience.kept = found.kept if objective.correction.rejections else None
    return {f"rollout_corr/{name}": float(value) for name, value in found.metrics.items()}


def components(samples: Sequence[Sample], objective: Objective) -> dict[str, Tensor]:
    """name -> float32[S], the parts of the reward: those that algorithm.reward_weights names, or every number that the
    reward gives besides its score. NaN where a sample was not graded."""
    graded = [sample.outcome.extras for sample in samples if sample.outcome.reward is not None]
    numbers = {name for extras in graded for name, value in extras.items() if isinstance(value, int | float)}
    wanted = sorted(objective.settings["reward_weights"] or numbers)
    if graded and not wanted:
        raise UserError(
            f"algorithm.advantage={objective.advantage.name} reads the parts of a reward, and this one gives its score "
            "alone; return a dict such as {'score': 1.3, 'right': 1.0, 'format': 0.3} from your reward function"
        )
    for name in wanted:
        if any(not isinstance(extras.get(name), int | float) for extras in graded):
            others = numbers - {name}
            raise UserError(
                f"algorithm.advantage={objective.advantage.name}: the reward does not give the part {name!r} as a "
                f"number for every answer; {nearest(name, others) if others else 'it gives no part'}"
            )
    return {
        name: torch.tensor(
            [
                float(sample.outcome.extras[name]) if sample.outcome.reward is not None else math.nan
                for sample in samples
            ]
        )
        for name in wanted
    }
