"""Rewards run while the engine still samples, and a step says what uneven lengths cost it."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from lorl import metrics
from lorl.experience import Completion, Outcome, Prompt
from lorl.rewards.pool import RewardPool
from lorl.rollout.engine import Request, Sampling
from lorl.samples import Collector, Sample
from small_trainer import make_trainer, prompts_for, small_config

pytest_plugins = ["trainer_fixtures"]


def test_rewards_are_asked_for_before_the_rollout_ends(
    tiny_model: Path, tmp_path: Path, pool: RewardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order in which completions come and rewards are asked for, with the real engine and pool."""
    config = small_config(tiny_model, tmp_path)
    with ExitStack() as stack:
        trainer = make_trainer(config, pool, stack, steps=1)
        happened: list[str] = []
        generate, submit = trainer.workers.generate, pool.submit

        def watched(requests: Sequence[Request], sampling: Sampling, *, adapter: str | None) -> Generator[Completion]:
            for completion in generate(requests, sampling, adapter=adapter):
                happened.append("finished")
                yield completion

        monkeypatch.setattr(trainer.workers, "generate", watched)
        monkeypatch.setattr(pool, "submit", lambda asked: (happened.append("graded"), submit(asked))[1])
        collector = Collector(config, trainer.workers, pool)
        prompts = prompts_for(config)[:2]
        samples = collector.evaluation(prompts, lambda count: None, adapter=None)
        assert happened == ["finished", "graded"] * 2
        assert all(sample.finished_s > 0 for sample in samples)


def test_the_tail_is_what_the_last_tenth_takes() -> None:
    def sample(index: int, seconds: float) -> Sample:
        completion = Completion(Prompt(f"p{index}", [1], ""), 0, [2] * (index + 1), [-0.5] * (index + 1), "", "stop", 1)
        return Sample(completion, Outcome("ok", 1.0), seconds)

    even = metrics.of_samples([sample(index, 5.0) for index in range(20)])
    skewed = metrics.of_samples([sample(index, 5.0 if index < 18 else 9.0) for index in range(20)])
    assert even["time/rollout_tail_s"] == 0
    assert skewed["time/rollout_tail_s"] == 4
    assert (skewed["rollout/response_tokens_mean"], skewed["rollout/response_tokens_max"]) == (10.5, 20)
