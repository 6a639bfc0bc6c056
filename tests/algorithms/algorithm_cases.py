"""Random batches for the algorithm tests: ragged Python lists, and the same numbers packed as tensors."""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from lorl.algorithms.inputs import AdvantageInputs
from lorl.experience import Sampled


@dataclass(frozen=True)
class Case:
    """Sequence i belongs to `group[i]`, has `rewards[i]` (NaN: not graded), and every other array a value for each of
    its tokens. Lengths may be zero, groups single or of equal rewards."""

    group: list[int]
    rewards: list[float]
    parts: dict[str, list[float]]  # of a reward of several parts
    greedy: list[float]  # a group each
    token_rewards: list[list[float]]
    values: list[list[float]]
    logprobs: list[list[float]]
    old_logprobs: list[list[float]]
    ref_logprobs: list[list[float]]
    sum_pi_squared: list[list[float]]
    weights: list[list[float]]
    sequence_advantages: list[list[float]]  # the same for all tokens of a sequence
    token_advantages: list[list[float]]

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.logprobs]

    @property
    def graded(self) -> list[bool]:
        return [not math.isnan(reward) for reward in self.rewards]

    def layout(self) -> Sampled:
        owners = [i for i, length in enumerate(self.lengths) for _ in range(length)]
        return Sampled(torch.tensor(owners, dtype=torch.int64), torch.tensor(self.group, dtype=torch.int64))

    def inputs(self, *, weighted: bool = False) -> AdvantageInputs:
        return AdvantageInputs(
            layout=self.layout(),
            rewards=doubles(self.rewards),
            token_rewards=pack(self.token_rewards),
            values=pack(self.values),
            greedy_rewards=doubles(self.greedy),
            components={name: doubles(scores) for name, scores in self.parts.items()},
            logprobs=pack(self.logprobs),
            sum_pi_squared=pack(self.sum_pi_squared),
            correction_weights=pack(self.weights) if weighted else None,
        )


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pack(ragged: list[list[float]]) -> Tensor:
    return doubles([value for row in ragged for value in row])


def random_case(seed: int) -> Case:
    """Some of the oddities: groups of one, equal rewards, fully masked sequences, ungraded samples, a policy
    equal to the old one."""
    rng = random.Random(seed)
    group = [g for g in range(rng.randint(1, 4)) for _ in range(rng.choice([1, 2, 3, 5]))]
    size = len(group)
    levels = rng.choice([[0.0, 1.0], [0.1], [-1.0, 0.0, 0.3, 2.0], [rng.gauss(0, 1) for _ in range(size)]])
    missing = rng.choice([0.0, 0.0, 0.3, 1.0 if seed % 11 == 0 else 0.1])
    rewards = [math.nan if rng.random() < missing else rng.choice(levels) for _ in group]
    shortest = rng.choice([0, 0, 1])
    lengths = [rng.randint(shortest, rng.choice([1, 7])) for _ in group]
    spread = rng.choice([0.0, 0.05, 0.5, 1.5])

    def ragged(draw: "object") -> list[list[float]]:
        return [[draw() for _ in range(length)] for length in lengths]  # type: ignore[operator]

    logprobs = ragged(lambda: -rng.expovariate(1.0) - 1e-3)
    old = [[min(x + spread * rng.gauss(0, 1), -1e-3) if spread else x for x in row] for row in logprobs]
    token_rewards = ragged(lambda: rng.choice([0.0, rng.gauss(0, 0.2)]) if seed % 2 else 0.0)
    advantages = [rng.choice([0.0, 1.0, -1.0]) * abs(rng.gauss(0, 1)) for _ in group]
    return Case(
        group=group,
        rewards=rewards,
        parts={
            "accuracy": [math.nan if math.isnan(reward) else rng.choice([0.0, 1.0]) for reward in rewards],
            "format": [math.nan if math.isnan(reward) else rng.choice([0.0, 0.5]) for reward in rewards],
        },
        greedy=[rng.choice([0.0, 1.0, math.nan if seed % 5 == 0 else 0.5]) for _ in range(max(group) + 1)],
        token_rewards=token_rewards,
        values=ragged(lambda: rng.gauss(0, 1)),
        logprobs=logprobs,
        old_logprobs=old,
        ref_logprobs=[[x + rng.gauss(0, 1) for x in row] for row in logprobs],
        sum_pi_squared=[[math.exp(2 * x) + 0.1 * rng.random() for x in row] for row in logprobs],
        weights=ragged(lambda: 2 * rng.random()),
        sequence_advantages=[[advantage] * length for advantage, length in zip(advantages, lengths, strict=True)],
        token_advantages=ragged(lambda: rng.gauss(0, 1)),
    )
