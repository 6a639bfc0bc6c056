"""What is answered in place of vLLM's block manager is what it would say; the cache holds for others what it did."""

from pathlib import Path
from typing import Any

import pytest

from lorl.experience import Prompt
from lorl.policy.load import TRAINED
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.vllm.scheduling import skip_known_answers
from vllm_engines import Opened, draw, llama, needs_vllm, ordered
from vllm_scheduler import Played, Workload, make_requests, make_scheduler, play, save_shape

pytestmark = needs_vllm
__all__ = ["llama"]


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shape(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("ahead", [False, True], ids=["one step at a time", "a step ahead"])
@pytest.mark.parametrize(("blocks", "running"), [(4000, 16), (60, 16), (30, 8)])
def test_vllm_schedules_every_step_as_it_would(shape: Path, blocks: int, running: int, ahead: bool) -> None:
    """Real scheduler, no model: tokens, blocks and their numbers, what is free and what the cache holds in the end."""
    for seed in range(4):
        work = Workload(seed, blocks, running)
        theirs, asked = schedule(shape, work, ahead=ahead, quick=False)
        ours, still_asked = schedule(shape, work, ahead=ahead, quick=True)
        assert ours == theirs
        assert (ours.thrown_out > 0) == (blocks < 100)
        assert still_asked < asked / 3
        assert len(ours.cached) > work.groups


def test_a_sliding_window_is_asked_about_as_before(shape: Path) -> None:
    """Its manager gives blocks back as a sample grows."""
    work = Workload(0, blocks=60, running=16)
    theirs, ours = (schedule(shape, work, ahead=True, quick=quick, window=24) for quick in (False, True))
    assert ours == theirs


def schedule(shape: Path, work: Workload, *, ahead: bool, quick: bool, window: int | None = None) -> tuple[Played, int]:
    """What a workload comes to, and how often vLLM's block manager was asked."""
    scheduler, asked = make_scheduler(shape, work, ahead=ahead, window=window), list[int]()
    coordinator = scheduler.kv_cache_manager.coordinator
    needed = coordinator.get_num_blocks_to_allocate
    coordinator.get_num_blocks_to_allocate = lambda **call: (asked.append(1), needed(**call))[1]
    if quick:
        skip_known_answers(scheduler.kv_cache_manager)
    return play(scheduler, make_requests(work), ahead=ahead), len(asked)


@pytest.fixture
def found(llama: Opened) -> Opened:
    draw(llama.policy, 1)
    llama.publish()
    return llama


def long_prompts(found: Opened, count: int = 3) -> list[Request]:
    """Prompts that end at different places before a block does."""
    block = found.engine.inside.block_size
    return [
        Request(Prompt(f"p{i}", [7 + (i + j) % 90 for j in range(block - 9 - i)], ""), [i, 9 + i]) for i in range(count)
    ]


def test_the_engine_asks_vllm_for_two_tokens_of_a_block(found: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator, asked = found.engine.inside.blocks.coordinator, list[int]()
    needed = coordinator.get_num_blocks_to_allocate

    def counting(*args: Any, **kwargs: Any) -> int:
        asked.append(kwargs["num_tokens"])
        return needed(*args, **kwargs)

    monkeypatch.setattr(coordinator, "get_num_blocks_to_allocate", counting)
    (request,) = long_prompts(found, 1)
    list(
        found.engine.generate([Request(request.prompt, [3])], Sampling(max_tokens=40, ignore_eos=True), adapter=TRAINED)
    )
    block = found.engine.inside.block_size
    assert [count for count in asked if count > len(request.prompt.tokens)] == [block, block + 1]


def test_a_conversation_finds_its_earlier_answer_in_the_cache(found: Opened) -> None:
    (request, *_) = long_prompts(found)
    sampling = Sampling(max_tokens=40, ignore_eos=True)
    (answer, _) = ordered(found.engine.generate([request], sampling, adapter=TRAINED))
    whole = request.prompt.tokens + answer.tokens
    runner, computed = found.engine.inside.runner, list[int]()
    execute = runner.execute_model

    def counting(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        computed.append(scheduled.total_num_scheduled_tokens)
        return execute(scheduled, *args, **kwargs)

    runner.execute_model = counting
    try:
        list(found.engine.generate([Request(Prompt("next", whole, ""), [1])], Sampling(max_tokens=1), adapter=TRAINED))
    finally:
        runner.execute_model = execute
    assert computed[0] == len(whole) - found.engine.inside.block_size
