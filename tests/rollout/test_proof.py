"""Ranks that run one engine measure a publish again together: to sample is a call of all of them."""

from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

from lorl.config import AdapterConfig, ModelConfig
from lorl.errors import DivergedError
from lorl.experience import Completion
from lorl.policy.load import TRAINED, load_policy
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.proof import PublishProof
from lorl.rollout.torch_engine import TorchEngine


class Counting(TorchEngine):
    """The embedded engine, which remembers how many samples each call asked for."""

    asked: list[int]

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None
    ) -> Generator[Completion]:
        self.asked.append(sum(len(request.seeds) for request in requests))
        yield from super().generate(requests, sampling, adapter=adapter)


def proof(model: Path, agree: Callable[[bool], bool]) -> tuple[PublishProof, Counting]:
    policy = load_policy(ModelConfig(path=str(model), device="cpu"), AdapterConfig(rank=4), seed=0)
    engine = Counting(policy)
    engine.asked = []
    engine.publish(TRAINED, 1, policy.checksum(TRAINED))
    found = PublishProof(
        engine,
        policy,
        lambda name, version: engine.publish(name, version, policy.checksum(name)),
        prompt_tokens=20,
        agree=agree,
    )
    assert found.floor < 1e-5
    engine.asked.clear()
    return found, engine


def test_a_rank_that_agrees_with_its_engine_measures_once(tiny_model: Path) -> None:
    own: list[bool] = []
    found, engine = proof(tiny_model, lambda says: own.append(says) or says)
    found.check(TRAINED, 1)
    assert own == [False]
    assert len(engine.asked) == 1


def test_it_measures_again_where_another_rank_does(tiny_model: Path) -> None:
    others = iter([True, False])
    found, engine = proof(tiny_model, lambda says: says or next(others))
    found.check(TRAINED, 1)
    assert len(engine.asked) == 2
    assert engine.asked[1] > engine.asked[0]


def test_it_stops_where_another_rank_does(tiny_model: Path) -> None:
    found, _ = proof(tiny_model, lambda _: True)
    with pytest.raises(DivergedError, match="version 1: engine and trainer differ"):
        found.check(TRAINED, 1)
