"""A step's samples: prompts taken, answered and graded and, with dynamic sampling, replaced where they teach nothing.

What is drawn depends on (seed, step, refill round, prompt, sample) and on the cursor, which the checkpoint holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from lorl.algorithms.shaping import overlong_penalty
from lorl.config import RunConfig
from lorl.data.loader import PromptLoader
from lorl.experience import Outcome, Prompt
from lorl.samples import Collector, Sample, training_sampling
from lorl.tracking.console import Console


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step learns from."""

    samples: list[Sample]  # whole groups, those of one prompt adjacent
    drawn: list[Sample]  # all that was sampled for it; more than `samples` where dynamic sampling dropped groups
    cursor: int  # how many prompts have been taken off the data, this step's included
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Sampler:
    """Draws each step's batch."""

    config: RunConfig
    collector: Collector
    loader: PromptLoader
    console: Console

    def batch(self, step: int, cursor: int) -> Batch:
        """The samples of `step`, from the prompts after `cursor`."""
        prompts, cursor = self._take(cursor, self.config.data.prompts_per_step, set())
        drawn = self._round(prompts, step, 0)
        if not self.config.algorithm.dynamic_sampling:
            drawn = self._shaped(drawn)
            return Batch(drawn, drawn, cursor)
        return self._refilled(drawn, step, cursor)

    def greedy_rewards(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32[G]: the reward of the greedy answer to each group's prompt; NaN where it was not graded."""
        prompts = [next(members).completion.prompt for _, members in groupby(samples, key=_prompt_id)]
        sampling = replace(training_sampling(self.config.rollout), temperature=0.0)
        with self.console.phase("greedy rollout", total=len(prompts)) as advance:
            answers = self.collector.training(prompts, 1, sampling, (self.config.seed, "greedy"), advance)
        rewards = [answer.outcome.reward for answer in self._shaped(answers)]
        return torch.tensor([math.nan if reward is None else reward for reward in rewards])

    def _refilled(self, drawn: list[Sample], step: int, cursor: int) -> Batch:
        """Keeps the groups with a gradient and draws for fresh prompts until there are enough (DAPO, eq. 11).

        Groups are judged before rewards are shaped by length. After `max_refills` rounds the step goes on with what
        there is; where nothing was found at all, with the first round, which then moves nothing.
        """
        wanted, refills = self.config.data.prompts_per_step, self.config.algorithm.max_refills
        first, kept, asked, rounds = drawn, _informative(drawn), wanted, 0
        while len(kept) < wanted and rounds < refills:
            rounds += 1
            share = max(len(kept) / asked, 1 / wanted)
            count = min(wanted, math.ceil((wanted - len(kept)) / share))
            prompts, cursor = self._take(cursor, count, {_prompt_id(members[0]) for members in kept})
            if not prompts:
                break  # every prompt of the data is in the batch already
            asked += len(prompts)
            fresh = self._round(prompts, step, rounds)
            drawn = drawn + fresh
            kept += _informative(fresh)
        if len(kept) < wanted:
            self.console.warn(
                f"step {step}: {len(kept)} of {wanted} groups have a gradient after {rounds} rounds of fresh prompts"
            )
        samples = [sample for members in kept[:wanted] for sample in members] or first
        metrics = {
            "rollout/refills": float(rounds),
            "rollout/groups_drawn": float(asked),
            "rollout/groups_kept": float(min(len(kept), wanted)),
        }
        return Batch(self._shaped(samples), self._shaped(drawn), cursor, metrics)

    def _take(self, cursor: int, count: int, held: set[str]) -> tuple[list[Prompt], int]:
        """The next `count` prompts whose ids are not `held`, fewer when a pass over the data has no more; the cursor
        behind them."""
        size, end = self.loader.prompts_per_step, cursor + len(self.loader.prompts)
        taken: dict[str, Prompt] = {}
        while len(taken) < count and cursor < end:
            for prompt in self.loader.batch(cursor // size)[cursor % size :]:
                cursor += 1
                if prompt.id not in held:
                    taken.setdefault(prompt.id, prompt)
                if len(taken) == count:
                    break
        return list(taken.values()), cursor

    def _round(self, prompts: Sequence[Prompt], step: int, number: int) -> list[Sample]:
        """Samples for `prompts`; round 0 is the step's own, the others are refills with seeds of their own."""
        rollout = self.config.rollout
        seed = (self.config.seed, step) if number == 0 else (self.config.seed, step, "refill", number)
        title = "rollout" if number == 0 else f"rollout, refill {number}"
        with self.console.phase(title, total=len(prompts) * rollout.n) as advance:
            return self.collector.training(prompts, rollout.n, training_sampling(rollout), seed, advance)

    def _shaped(self, samples: list[Sample]) -> list[Sample]:
        """With DAPO's punishment of answers that run into the length limit."""
        algorithm = self.config.algorithm
        if not algorithm.overlong_buffer_tokens:
            return samples
        lengths = torch.tensor([len(sample.completion.tokens) for sample in samples])
        penalties = overlong_penalty(
            lengths,
            self.config.rollout.max_response_tokens,
            algorithm.overlong_buffer_tokens,
            algorithm.overlong_penalty,
        ).tolist()
        return [
            replace(sample, outcome=_penalized(sample.outcome, penalty))
            for sample, penalty in zip(samples, penalties, strict=True)
        ]


def _penalized(outcome: Outcome, penalty: float) -> Outcome:
    if outcome.reward is None:
        return outcome
    extras = {**outcome.extras, "overlong_penalty": penalty}
    return replace(outcome, reward=outcome.reward + penalty, extras=extras)


def _prompt_id(sample: Sample) -> str:
    return sample.completion.prompt.id


def _informative(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The groups whose graded rewards are not all equal."""
    groups = [list(members) for _, members in groupby(samples, key=_prompt_id)]
    return [
        members
        for members in groups
        if len({sample.outcome.reward for sample in members if sample.outcome.reward is not None}) > 1
    ]
