"""An engine that failed is made anew on the weights that it had: the samples are those of a run without failure."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorl.errors import InfrastructureError, UserError
from lorl.experience import Completion
from lorl.policy.load import TRAINED
from lorl.policy.sharing import Weights, unshared_bytes
from lorl.rollout.engine import Sampling
from lorl.rollout.retry import Rollouts
from lorl.rollout.vllm import loader
from vllm_engines import Opened, addresses, distance, draw, llama, needs_vllm, ordered, requests

pytestmark = needs_vllm
__all__ = ["llama"]

SAMPLING = Sampling(max_tokens=16, ignore_eos=True)


def raising() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def out_of_memory() -> None:
    torch.empty(2**60)  # an allocation that fails, not an error that says so


def failing(found: Opened, step: int, fail: Callable[[], None] = raising) -> None:
    """The running engine fails in its step number `step`, a fresh one does not."""
    runner = found.engine.inside.runner
    execute, steps = type(runner).execute_model, iter(range(1, 10**9))

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == step:
            fail()
        return execute(reference(), *args, **kwargs)

    reference = weakref.ref(runner)
    runner.execute_model = execute_model


@pytest.fixture
def found(llama: Opened, request: pytest.FixtureRequest) -> Iterator[Opened]:
    llama.engine.folds = request.param
    draw(llama.policy, 1)
    yield llama
    llama.engine.folds = False


def published(found: Opened, retries: int = 2) -> Rollouts:
    rollouts = Rollouts(found.engine, retries)
    rollouts.publish(TRAINED, 7, found.policy.checksum(TRAINED))
    return rollouts


def sampled(rollouts: Rollouts, adapter: str | None = TRAINED) -> list[Completion]:
    return ordered(rollouts.generate(requests(4), SAMPLING, adapter=adapter))


def assert_same(answers: list[Completion], expected: list[Completion]) -> None:
    assert [replace(c, logprobs=[]) for c in answers] == [replace(c, logprobs=[]) for c in expected]
    for one, other in zip(answers, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize(("found", "adapter"), [(False, TRAINED), (False, None), (True, TRAINED)], indirect=["found"])
def test_a_rollout_over_failures_has_the_samples_of_one_without(found: Opened, adapter: str | None) -> None:
    rollouts = published(found)
    expected = sampled(rollouts, adapter)
    before, base = addresses(found.policy), found.policy.base_checksum()
    for step, fail in ((1, out_of_memory), (20, raising)):
        failing(found, step, fail)
        assert_same(sampled(rollouts, adapter), expected)
        assert rollouts.take_rebuilt() == 1
        inside = found.engine.inside
        assert addresses(found.policy) == before
        assert unshared_bytes(found.policy.base_tensors(), Weights(inside.weights(), inside.packed_modules())) == 0
    assert found.policy.base_checksum() == base
    assert distance(found.policy, sampled(rollouts, adapter), adapter) < 1e-5


def test_a_publish_that_fails_is_done_again_on_a_fresh_engine(llama: Opened) -> None:
    draw(llama.policy, 1)
    expected = sampled(published(llama))
    failing(llama, 2)  # while the publish is being proved
    rollouts = published(llama)
    assert rollouts.take_rebuilt() == 1
    assert_same(sampled(rollouts), expected)


def test_nothing_of_the_failed_engine_stays_in_memory(llama: Opened) -> None:
    draw(llama.policy, 1)
    rollouts = published(llama)
    runner = weakref.ref(llama.engine.inside.runner)
    caches = llama.engine.inside.kv_caches()  # as a traceback might hold them
    failing(llama, 5)
    sampled(rollouts)
    gc.collect()
    assert runner() is None
    assert [cache.untyped_storage().nbytes() for cache in caches] == [0] * len(caches)


def test_a_resting_engine_is_rebuilt_awake(llama: Opened) -> None:
    draw(llama.policy, 1)
    expected = sampled(published(llama))
    llama.engine.rest()
    llama.engine.rebuild()
    assert_same(sampled(published(llama)), expected)


def test_an_engine_that_could_not_be_rebuilt_can_be_the_next_time(
    llama: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(llama.policy, 1)
    rollouts = published(llama)
    expected = sampled(rollouts)
    starts: list[int] = []
    launch = llama.engine._launch

    def unwilling() -> Any:
        starts.append(1)
        if len(starts) == 1:
            raise InfrastructureError("vLLM ran out of memory while starting")
        return launch()

    monkeypatch.setattr(llama.engine, "_launch", unwilling)
    failing(llama, 3)
    assert_same(sampled(rollouts), expected)
    assert len(starts) == 2


def test_weights_that_do_not_fit_the_model_are_named(llama: Opened) -> None:
    tensors = llama.engine.inside.weights(tied=True)
    name = "model.layers.1.mlp.down_proj.weight"
    wrong = tensors | {name: tensors[name].double()}
    missing = {key: value for key, value in tensors.items() if key != name}
    draw(llama.policy, 1)
    expected = sampled(published(llama))
    start = llama.engine._launch.args[0]  # type: ignore[attr-defined]
    for given, found in ((wrong, "torch.float64"), (missing, "nothing")):
        llama.engine.close()
        with (
            pytest.raises(InfrastructureError, match=rf"layers\.1\.mlp\.down_proj\.weight, and .* held .*{found}"),
            loader.adopting(given),
        ):
            start(load_format=loader.FORMAT)
    llama.engine.rebuild()
    assert_same(sampled(published(llama)), expected)


def test_a_weight_without_a_place_is_told_from_one_that_cannot_be_gathered(llama: Opened) -> None:
    tensors = llama.engine.inside.weights(tied=True)
    draw(llama.policy, 1)
    expected = sampled(published(llama))
    start = llama.engine._launch.args[0]  # type: ignore[attr-defined]

    def misnamed() -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.layers.0.mlp.nowhere.weight", torch.zeros(2, 2)

    def lost(error: Exception) -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.norm.weight", tensors["model.norm.weight"].clone()
        raise error

    said = "the trainer's base could not be gathered for vLLM's copy"
    cases: tuple[tuple[Callable[[], Any], type[Exception], str], ...] = (
        (misnamed, UserError, r"no place for a weight of the trainer's base .*nowhere"),
        (lambda: iter(()), UserError, "has nothing for .* of vLLM's model"),
        (lambda: lost(KeyError("layer 3")), InfrastructureError, f"{said}: KeyError: 'layer 3'"),
        (lambda: lost(ValueError("sizes differ")), InfrastructureError, f"{said}: ValueError: sizes differ"),
        (lambda: lost(InfrastructureError("rank 1 is late")), InfrastructureError, "^rank 1 is late"),
    )
    for wholes, kind, message in cases:
        llama.engine.close()
        with pytest.raises(kind, match=message), loader.copying(wholes):
            start(load_format=loader.FORMAT)
    llama.engine.rebuild()
    assert_same(sampled(published(llama)), expected)
