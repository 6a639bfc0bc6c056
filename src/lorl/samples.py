"""Prompts to graded samples: rollouts and rewards, overlapped. Training and evaluation both go through here."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from lorl.config import EvalConfig, RewardModelConfig, RolloutConfig, RunConfig
from lorl.experience import Completion, Outcome, Prompt
from lorl.parallel.workers import Workers
from lorl.policy.load import TRAINED
from lorl.rewards.pool import RewardPool, RewardRequest
from lorl.rollout.engine import Request, Sampling
from lorl.seeding import stable_seed

Advance = Callable[[int], None]  # told how many samples are finished


@dataclass(frozen=True, slots=True)
class Sample:
    completion: Completion
    outcome: Outcome
    finished_s: float = 0.0  # after its rollout began

    def row(self, step: int) -> dict[str, Any]:
        """A line of `rollouts/step-N.jsonl`."""
        completion, outcome = self.completion, self.outcome
        return {
            "step": step,
            "prompt_id": completion.prompt.id,
            "prompt": completion.prompt.text,
            "sample": completion.sample,
            "completion": completion.text,
            "tokens": len(completion.tokens),
            "finish": completion.finish,
            "reward": outcome.reward,
            "status": outcome.status,
            "detail": outcome.detail,
            "extras": outcome.extras,
            "ground_truth": completion.prompt.ground_truth,
        }


@dataclass(slots=True)
class Collector:
    """Engine, rule and reward model as one: prompts in, graded samples out."""

    config: RunConfig
    workers: Workers
    pool: RewardPool | None  # None: no rule is asked (reward_model.rule_weight=0)

    def training(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: Sequence[int | str], advance: Advance
    ) -> list[Sample]:
        """Samples of the trained adapter, graded by rule and reward model in their proportion."""
        return self._with_model(self._collect(prompts, n, sampling, seed, advance, TRAINED))

    def evaluation(self, prompts: Sequence[Prompt], advance: Advance, adapter: str | None = TRAINED) -> list[Sample]:
        """Samples as `eval` says, graded by the rule, or by the reward model where there is no rule."""
        config = self.config
        sampling = eval_sampling(config.eval, config.rollout)
        samples = self._collect(prompts, config.eval.n, sampling, (config.seed, "eval"), advance, adapter)
        return samples if self.pool is not None else self._with_model(samples)

    def _collect(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        seed: Sequence[int | str],
        advance: Advance,
        adapter: str | None,
    ) -> list[Sample]:
        """Samples `n` completions a prompt and grades them, each as soon as it is finished.

        Sample j of a prompt draws from the seed (*seed, prompt id, j). The result is in the prompts' order, whatever
        order the engine finished in.
        """
        batched = self.config.reward.batched
        requests = [Request(p, [stable_seed(*seed, p.id, sample) for sample in range(n)]) for p in prompts]
        finished: list[Completion] = []
        seconds: dict[tuple[str, int], float] = {}
        started = time.perf_counter()
        futures: list[Future[Outcome]] = []
        with closing(self.workers.generate(requests, sampling, adapter=adapter)) as completions:
            for completion in completions:
                finished.append(completion)
                seconds[completion.prompt.id, completion.sample] = time.perf_counter() - started
                if self.pool is not None and not batched:
                    futures += self.pool.submit([_reward_request(completion)])
                advance(1)
        place = {prompt.id: index for index, prompt in enumerate(prompts)}

        def order(completion: Completion) -> tuple[int, int]:
            return place[completion.prompt.id], completion.sample

        if self.pool is not None and batched:
            finished.sort(key=order)
            futures = self.pool.submit([_reward_request(completion) for completion in finished])
        outcomes = [future.result() for future in futures] if self.pool else [Outcome("ok", 0.0)] * len(finished)
        samples = [
            Sample(c, outcome, seconds[c.prompt.id, c.sample]) for c, outcome in zip(finished, outcomes, strict=True)
        ]
        return sorted(samples, key=lambda sample: order(sample.completion))

    def _with_model(self, samples: list[Sample]) -> list[Sample]:
        """reward = rule_weight * rule + weight * score, with the parts as extras. What the rule failed on stays so."""
        mix = self.config.reward_model
        if mix.path is None:
            return samples
        scores = self.workers.score([sample.completion for sample in samples])
        return [
            replace(sample, outcome=_mixed(sample.outcome, score, mix, ruled=self.pool is not None))
            for sample, score in zip(samples, scores, strict=True)
        ]


def _mixed(outcome: Outcome, score: float, mix: RewardModelConfig, *, ruled: bool) -> Outcome:
    if outcome.reward is None:
        return outcome
    parts = {"rule": outcome.reward, "model": score} if ruled else {"model": score}
    reward = mix.rule_weight * outcome.reward + mix.weight * score
    return replace(outcome, reward=reward, extras={**outcome.extras, **parts})


def training_sampling(config: RolloutConfig) -> Sampling:
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        stop=config.stop,
        max_tokens=config.max_response_tokens,
        ignore_eos=config.ignore_eos,
    )


def eval_sampling(config: EvalConfig, rollout: RolloutConfig) -> Sampling:
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop=rollout.stop,
        max_tokens=rollout.max_response_tokens,
    )


def _reward_request(completion: Completion) -> RewardRequest:
    prompt = completion.prompt
    return RewardRequest(prompt.data_source, completion.text, prompt.ground_truth, prompt.extra_info)
