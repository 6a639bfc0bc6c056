"""Prompts to graded samples: rollouts and rewards, overlapped. Training and evaluation both go through here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorl.config import EvalConfig, RolloutConfig
from lorl.experience import Completion, Outcome, Prompt
from lorl.parallel.workers import Workers
from lorl.rewards.pool import RewardPool, RewardRequest
from lorl.rollout.engine import Request, Sampling
from lorl.seeding import stable_seed


@dataclass(frozen=True, slots=True)
class Sample:
    completion: Completion
    outcome: Outcome

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


def collect(
    workers: Workers,
    pool: RewardPool,
    prompts: Sequence[Prompt],
    *,
    n: int,
    sampling: Sampling,
    adapter: str | None,
    seed: Sequence[int | str],
    batched_rewards: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """Samples `n` completions a prompt and grades them, each as soon as it is finished.

    Sample j of a prompt draws from the seed (*seed, prompt id, j). The result is in the prompts' order, whatever order
    the engine finished in.
    """
    requests = [Request(p, [stable_seed(*seed, p.id, sample) for sample in range(n)]) for p in prompts]
    finished: list[Completion] = []
    futures = []
    for completion in workers.generate(requests, sampling, adapter=adapter):
        finished.append(completion)
        if not batched_rewards:
            futures += pool.submit([_reward_request(completion)])
        advance(1)
    place = {prompt.id: index for index, prompt in enumerate(prompts)}
    if batched_rewards:
        finished.sort(key=lambda c: (place[c.prompt.id], c.sample))
        futures = pool.submit([_reward_request(completion) for completion in finished])
    samples = [Sample(c, future.result()) for c, future in zip(finished, futures, strict=True)]
    return sorted(samples, key=lambda s: (place[s.completion.prompt.id], s.completion.sample))


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
