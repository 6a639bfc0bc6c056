"""An engine that fails on the way: the run gets every sample once, the same ones, or an error that says what failed."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import small_trainer
from lorl.config import AdapterConfig, ModelConfig, RewardConfig, RunConfig
from lorl.errors import DivergedError, InfrastructureError, LorlError, UserError
from lorl.experience import Completion, Prompt
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.policy import Policy
from lorl.rewards.pool import RewardPool
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.retry import Rollouts
from lorl.rollout.torch_engine import TorchEngine
from lorl.worker import Worker
from small_trainer import RULE, run, small_config

SAMPLING = Sampling(max_tokens=8)


class FailingEngine(TorchEngine):
    """The embedded engine, which raises where `plan` says so: for each call of `generate`, after how many completions
    (None: not at all). Until it is rebuilt it does nothing else, and nothing is published to it then."""

    def __init__(self, policy: Policy, plan: Sequence[int | None], error: Callable[[], Exception]) -> None:
        super().__init__(policy)
        self.plan = list(plan)
        self.error = error
        self.broken = False
        self.rebuilds = 0
        self.calls: list[int] = []  # samples asked for

    def publish(self, name: str, version: int, checksum: str) -> float:
        assert not self.broken
        return super().publish(name, version, checksum)

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None) -> Iterator[Completion]:
        assert not self.broken
        self.calls.append(sum(len(request.seeds) for request in requests))
        limit = self.plan.pop(0) if self.plan else None
        for count, completion in enumerate(super().generate(requests, sampling, adapter=adapter)):
            if count == limit:
                self.broken = True
                raise self.error()
            yield completion

    def rebuild(self) -> None:
        super().rebuild()
        self.broken = False
        self.rebuilds += 1


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return load_policy(ModelConfig(path=str(tiny_model)), AdapterConfig(rank=4), seed=0)


def wanted() -> list[Request]:
    prompts = [Prompt(f"p{i}", [10 + i, 20, 30 + i], "") for i in range(3)]
    return [Request(prompt, [100 * i + sample for sample in range(4)]) for i, prompt in enumerate(prompts)]


def rollouts(
    policy: Policy, plan: Sequence[int | None], error: Callable[[], Exception] = out_of_memory, retries: int = 2
):
    engine = FailingEngine(policy, plan, error)
    found = Rollouts(engine, retries)
    found.publish(TRAINED, 7, policy.checksum(TRAINED))
    return engine, found


def sampled(found: Rollouts, adapter: str | None = TRAINED) -> list[Completion]:
    completions = list(found.generate(wanted(), SAMPLING, adapter=adapter))
    return sorted(completions, key=lambda c: (c.prompt.id, c.sample))


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    """All but how the sums of a smaller batch round."""
    assert [replace(c, logprobs=[]) for c in found] == [replace(c, logprobs=[]) for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("plan", [[0], [5], [11], [5, 0], [3, 3]])
@pytest.mark.parametrize("adapter", [TRAINED, None])
def test_a_rollout_over_failures_has_the_samples_of_one_without(policy: Policy, plan: list[int], adapter: str | None):
    engine, undisturbed = rollouts(policy, [])
    expected = sampled(undisturbed, adapter)
    assert engine.calls == [12]
    engine, disturbed = rollouts(policy, plan)
    assert_same(sampled(disturbed, adapter), expected)
    assert {c.version for c in expected} == {7 if adapter else 0}
    assert [(c.prompt.id, c.sample) for c in expected] == [(f"p{i}", j) for i in range(3) for j in range(4)]
    done = [0, *plan]
    assert engine.calls == [12 - sum(done[: i + 1]) for i in range(len(done))], "only what was missing is asked for"
    assert disturbed.take_rebuilt() == engine.rebuilds == len(plan)
    assert disturbed.take_rebuilt() == 0


def test_an_engine_that_always_fails_ends_in_one_sentence(policy: Policy):
    engine, found = rollouts(policy, [0] * 99)
    with pytest.raises(InfrastructureError, match=r"failed 3 times.*rollout.retries=2.*OutOfMemoryError: CUDA out of"):
        sampled(found)
    assert len(engine.calls) == 3


def test_an_error_that_says_nothing_is_named_by_where_it_was_raised(policy: Policy):
    _, found = rollouts(policy, [0] * 99, AssertionError)
    with pytest.raises(InfrastructureError, match=r"AssertionError in generate \(.*test_retry\.py:\d+: raise"):
        sampled(found)


def test_retries_count_anew_in_every_rollout(policy: Policy):
    _, found = rollouts(policy, [1, 1, None, 1, 1, None])
    assert_same(sampled(found), sampled(found))


@pytest.mark.parametrize("error", [UserError("a prompt is too long"), DivergedError("engine and trainer apart")])
def test_what_asking_again_would_not_change_is_not_asked_again(policy: Policy, error: LorlError):
    engine, found = rollouts(policy, [1], lambda: error)
    with pytest.raises(type(error)) as raised:
        sampled(found)
    assert raised.value is error
    assert len(engine.calls) == 1


class LosingEngine(FailingEngine):
    """Ends without a word before its last samples."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None) -> Iterator[Completion]:
        try:
            yield from super().generate(requests, sampling, adapter=adapter)
        except torch.OutOfMemoryError:
            return


def test_samples_that_never_come_are_asked_for_again(policy: Policy):
    _, undisturbed = rollouts(policy, [])
    found = Rollouts(LosingEngine(policy, [9], out_of_memory), 1)
    found.publish(TRAINED, 7, policy.checksum(TRAINED))
    assert_same(sampled(found), sampled(undisturbed))
    found = Rollouts(LosingEngine(policy, [9, 2], out_of_memory), 1)
    found.publish(TRAINED, 7, policy.checksum(TRAINED))
    with pytest.raises(InfrastructureError, match="1 samples never came"):
        sampled(found)


class UnwillingEngine(FailingEngine):
    """Fails `left` times to take an adapter."""

    left = 0

    def publish(self, name: str, version: int, checksum: str) -> float:
        if self.left:
            self.left -= 1
            raise RuntimeError("no slot")
        return super().publish(name, version, checksum)


def test_a_publish_that_fails_is_tried_again_on_a_fresh_engine(policy: Policy):
    engine = UnwillingEngine(policy, [], out_of_memory)
    engine.left = 2
    Rollouts(engine, 2).publish(TRAINED, 1, policy.checksum(TRAINED))
    assert engine.rebuilds == 2
    engine.left = 3
    with pytest.raises(InfrastructureError, match="RuntimeError: no slot"):
        Rollouts(engine, 2).publish(TRAINED, 2, policy.checksum(TRAINED))


def test_an_adapter_that_moved_since_it_was_published_is_not_published_again(policy: Policy):
    """The samples made before the failure are the old adapter's, so the rest must not be the new one's."""
    _, found = rollouts(policy, [5])
    stream = found.generate(wanted(), SAMPLING, adapter=TRAINED)
    next(stream)
    moved = next(iter(policy.parameters(TRAINED).values()))
    try:
        moved.data += 0.25
        with pytest.raises(InfrastructureError, match="version 7"):
            list(stream)
    finally:
        moved.data -= 0.25


# In a run


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int | None]], None]:
    """Gives the trainers made from now on an engine with this plan."""

    def give(plan: Sequence[int | None]) -> None:
        def worker(config: RunConfig, *_: object) -> Worker:
            policy = load_policy(config.model, config.adapter, seed=config.seed)
            return Worker(config, policy, FailingEngine(policy, plan, out_of_memory))

        monkeypatch.setattr(small_trainer, "local_worker", worker)

    return give


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardPool]:
    rule = tmp_path_factory.mktemp("rule") / "rule.py"
    rule.write_text(RULE)
    with RewardPool(RewardConfig(path=str(rule), workers=1)) as pool:
        yield pool


def test_a_run_whose_engine_fails_comes_to_the_same_end(
    failing: Callable[[Sequence[int | None]], None], tiny_model: Path, tmp_path: Path, pool: RewardPool
):
    failing([])
    expected, whole = run(small_config(tiny_model, tmp_path, name="whole"), pool, steps=3)
    failing([None, 3, 2, None])
    rows, trainer = run(small_config(tiny_model, tmp_path, name="failing"), pool, steps=3)
    assert [row.pop("rollout/engine_restarts", 0.0) for row in rows] == [0.0, 2.0, 0.0]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-5)
    for step in (1, 2, 3):
        assert written(trainer.folder.path, step) == written(whole.folder.path, step)


def written(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"rollouts/step-{step}.jsonl").read_text().splitlines()]


def test_a_run_whose_engine_always_fails_ends_with_exit_code_4(
    failing: Callable[[Sequence[int | None]], None], tiny_model: Path, tmp_path: Path, pool: RewardPool
):
    failing([None] + [2] * 9)
    with pytest.raises(InfrastructureError) as raised:
        run(small_config(tiny_model, tmp_path, "rollout.retries=1"), pool, steps=3, out=io.StringIO())
    assert raised.value.exit_code == 4
    assert "\n" not in str(raised.value)
    assert [row["step"] for row in small_trainer.read_metrics(tmp_path / "r")] == [1], "no reward came of it"
