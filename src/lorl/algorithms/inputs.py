"""What advantage estimators read."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorl.algorithms.segments import sum_by
from lorl.experience import Sampled


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """A whole step's batch. What an estimator `needs` beyond layout and rewards is None unless asked for."""

    layout: Sampled
    rewards: Tensor  # float[S], of the whole answer: it falls on the last sampled token; NaN where not graded
    token_rewards: Tensor | None = None  # float[M], added to it token by token (the KL penalty); None: zeros
    values: Tensor | None = None  # float[M], the critic's
    greedy_rewards: Tensor | None = None  # float[G], of the greedy answer to each prompt
    components: Mapping[str, Tensor] | None = None  # name -> float[S], the parts of a reward of several parts
    logprobs: Tensor | None = None  # float[M]
    sum_pi_squared: Tensor | None = None  # float[M], sum over the vocabulary of the squared probabilities
    correction_weights: Tensor | None = None  # float[M], rollout correction's importance weights

    def graded(self) -> Tensor:
        """bool[S]: samples that have a reward."""
        return ~torch.isnan(self.rewards)

    def scores(self) -> Tensor:
        """float[S]: the reward of the whole answer with the token rewards' sum; NaN where not graded."""
        if self.token_rewards is None:
            return self.rewards
        return self.rewards + sum_by(self.token_rewards, self.layout.sequence, self.layout.num_sequences)

    def rewards_per_token(self) -> Tensor:
        """float[M]: token rewards, with the answer's reward on its last sampled token; zero where not graded."""
        sequence = self.layout.sequence
        last = torch.ones_like(sequence, dtype=torch.bool)
        last[:-1] = sequence[1:] != sequence[:-1]
        graded = self.graded()[sequence]
        placed = torch.where(last & graded, self.rewards[sequence], self.rewards.new_zeros(()))
        if self.token_rewards is None:
            return placed
        return placed + torch.where(graded, self.token_rewards, self.token_rewards.new_zeros(()))
