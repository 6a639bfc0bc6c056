"""What the vLLM engine samples: the embedded engine's tokens, as they finish, from a cache that rests in between."""

from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from lorl.errors import DivergedError
from lorl.experience import Completion, Prompt
from lorl.policy.load import TRAINED
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.torch_engine import TorchEngine
from vllm_engines import Opened, distance, draw, llama, needs_vllm, ordered, requests, resident_bytes, run

pytestmark = needs_vllm
__all__ = ["llama"]

SAMPLINGS = {
    "plain": Sampling(max_tokens=24),
    "greedy": Sampling(temperature=0.0, max_tokens=24),
    "cold": Sampling(temperature=0.6, max_tokens=24),
    "top-k": Sampling(top_k=5, max_tokens=24),
    "top-p": Sampling(top_p=0.7, max_tokens=24),
    "min-p": Sampling(min_p=0.1, max_tokens=24),
    "all": Sampling(temperature=1.3, top_k=40, top_p=0.9, min_p=0.02, max_tokens=24),
    "one": Sampling(max_tokens=1),
    "ignore_eos": Sampling(temperature=3.0, max_tokens=32, ignore_eos=True),
}


@pytest.fixture
def found(llama: Opened) -> Opened:
    draw(llama.policy, 1)
    llama.publish()
    return llama


@pytest.fixture
def folding(found: Opened) -> Iterator[Opened]:
    found.engine.folds = True
    yield found
    found.engine.folds = False


def embedded(found: Opened) -> TorchEngine:
    engine = TorchEngine(found.policy)
    engine.publish(TRAINED, 1, found.policy.checksum(TRAINED))
    return engine


def assert_same(one: list[Completion], other: list[Completion]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.prompt.id, a.sample, a.tokens, a.text, a.finish) == (
            b.prompt.id,
            b.sample,
            b.tokens,
            b.text,
            b.finish,
        )
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("adapter", [None, TRAINED])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_samples_are_the_embedded_engines_token_for_token(
    found: Opened, sampling: Sampling, adapter: str | None
) -> None:
    expected = run(embedded(found), adapter, sampling, n=4, count=5)
    answers = run(found.engine, adapter, sampling, n=4, count=5)  # 20, of which 8 at a time
    assert_same(answers, expected)
    assert {c.version for c in answers} == {1 if adapter else 0}


def test_folded_samples_are_the_embedded_engines(folding: Opened) -> None:
    checksum = folding.policy.base_checksum()
    sampling = SAMPLINGS["plain"]
    assert_same(run(folding.engine, TRAINED, sampling, n=4), run(embedded(folding), TRAINED, sampling, n=4))
    assert folding.policy.base_checksum() == checksum


def test_stop_strings_end_samples_as_in_the_embedded_engine(found: Opened) -> None:
    free = run(found.engine, None, Sampling(max_tokens=60), n=4)
    texts = "".join(c.text for c in free)
    pairs = [texts[i : i + 2] for i in range(len(texts)) if texts[i : i + 2].isascii()]
    stops = [pairs[5], pairs[20][0]]
    sampling = Sampling(max_tokens=60, stop=stops)
    stopped = run(found.engine, None, sampling, n=4)
    assert_same(stopped, run(embedded(found), None, sampling, n=4))
    assert all(stop not in c.text for c in stopped for stop in stops)
    assert any(len(a.tokens) < len(b.tokens) for a, b in zip(stopped, free, strict=True))


def test_samples_end_at_end_of_sequence_and_hold_it(found: Opened) -> None:
    answers = run(found.engine, None, Sampling(temperature=4.0, max_tokens=64), n=8)
    ended = [c for c in answers if c.finish == "stop"]
    assert ended, "none of 24 samples ended by itself"
    for c in answers:
        assert (c.finish == "stop") == (c.tokens[-1] == 1)
        assert 1 not in c.tokens[:-1]
        assert len(c.tokens) == 64 or c.finish == "stop"


def test_completions_come_as_they_finish(found: Opened) -> None:
    sampling = Sampling(max_tokens=64)
    stream = found.engine.generate(requests(8, 3), sampling, adapter=TRAINED)
    first = next(stream)
    unfinished = found.engine.inside.engine.get_num_unfinished_requests()
    rest = list(stream)
    assert unfinished > 0
    lengths = [len(c.tokens) for c in [first, *rest]]
    assert len(lengths) == 24
    assert lengths[0] < max(lengths)


def test_a_consumer_that_leaves_early_leaves_the_engine_usable(found: Opened) -> None:
    sampling = Sampling(max_tokens=24)
    expected = run(found.engine, TRAINED, sampling, n=6)
    for taken in (1, 3):
        stream = found.engine.generate(requests(6), sampling, adapter=TRAINED)
        assert len(list(islice(stream, taken))) == taken
        stream.close()
        assert found.engine.inside.engine.get_num_unfinished_requests() == 0
        assert_same(run(found.engine, TRAINED, sampling, n=6), expected)


def test_a_consumer_that_leaves_a_folded_rollout_early_leaves_the_base_as_it_was(folding: Opened) -> None:
    checksum = folding.policy.base_checksum()
    stream = folding.engine.generate(requests(6), Sampling(max_tokens=24), adapter=TRAINED)
    next(stream)
    stream.close()
    assert folding.policy.base_checksum() == checksum


def test_a_cache_too_small_for_all_samples_changes_none(found: Opened) -> None:
    """vLLM throws samples out and computes them again."""
    scheduler = found.engine.inside.core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    block = found.engine.inside.block_size
    wanted = [Request(Prompt("long", [7 + i % 90 for i in range(block - 20)], ""), list(range(6)))]
    sampling = Sampling(max_tokens=40, ignore_eos=True)  # every sample grows into a second block
    expected = ordered(found.engine.generate(wanted, sampling, adapter=TRAINED))
    found.engine.inside.engine.reset_prefix_cache()
    held = pool.get_new_blocks(pool.get_num_free_blocks() - 5)
    thrown_out: list[object] = []
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (thrown_out.append(args), preempt(*args, **kwargs))[1]
    try:
        answers = ordered(found.engine.generate(wanted, sampling, adapter=TRAINED))
    finally:
        del scheduler._preempt_request
        pool.free_blocks(held)
    assert thrown_out
    assert_same(answers, expected)


def test_outputs_that_are_not_finite_end_the_run(found: Opened) -> None:
    with torch.no_grad():
        for name, parameter in found.policy.parameters(TRAINED).items():
            if "layers.1" in name and "lora_B" in name:
                parameter.fill_(torch.inf)
    with pytest.raises(DivergedError, match="not finite"):
        found.publish(version=2)
    draw(found.policy, 1)
    found.publish(version=3)
    assert distance(found.policy, run(found.engine, TRAINED), TRAINED) < 1e-5


def test_rest_gives_the_caches_memory_back_and_waking_restores_the_same_samples(found: Opened) -> None:
    expected = run(found.engine, TRAINED, n=4)
    caches = found.engine.inside.kv_caches()
    size = sum(cache.untyped_storage().nbytes() for cache in caches)
    assert size > 2**24
    for cache in caches:
        cache.fill_(0.0)  # pages that were never written are not resident
    filled = resident_bytes()
    found.engine.rest()
    assert [cache.untyped_storage().nbytes() for cache in caches] == [0] * len(caches)
    assert resident_bytes() < filled - size // 2
    found.engine.rest()
    assert_same(run(found.engine, TRAINED, n=4), expected)  # wakes
    found.engine.wake()
    assert sum(cache.untyped_storage().nbytes() for cache in caches) == size


def test_the_next_rollout_of_a_long_prompt_reads_its_beginning_from_the_cache(found: Opened) -> None:
    """Not only the same answers: fewer tokens computed, until the next version."""
    length = found.engine.inside.block_size + 10
    long = [Request(Prompt("long", [9 + i % 200 for i in range(length)], ""), [5])]
    computed: list[int] = []
    runner = found.engine.inside.runner
    execute = runner.execute_model

    def counting(scheduled, *args, **kwargs):
        computed.append(scheduled.total_num_scheduled_tokens)
        return execute(scheduled, *args, **kwargs)

    def tokens_computed() -> int:
        computed.clear()
        list(found.engine.generate(long, Sampling(max_tokens=1), adapter=TRAINED))
        return sum(computed)

    runner.execute_model = counting
    try:
        assert tokens_computed() == length
        assert tokens_computed() == 10
        found.publish(version=2)
        assert tokens_computed() == length
    finally:
        runner.execute_model = execute
