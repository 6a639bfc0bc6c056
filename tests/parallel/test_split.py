"""Work is dealt to ranks by tokens: nothing is lost, nothing done twice, and no rank has much more than its part."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorl.experience import Completion, Experience, Outcome, Prompt
from lorl.packing import pack, select
from lorl.parallel.split import balance, share, share_answers, share_requests
from lorl.plan.demand import demand_of
from lorl.rollout.engine import Request
from lorl.settings import load


def answers(lengths: list[list[int]], prompt_tokens: int = 5) -> list[Completion]:
    """`lengths[g][j]` tokens in sample j of prompt g; samples differ from their first token on."""
    return [
        Completion(prompt, j, [10 * j + 1] * length, [0.0] * length, "", "stop", 1)
        for g, group in enumerate(lengths)
        for prompt in [Prompt(f"p{g}", [100 + g] * prompt_tokens, "")]
        for j, length in enumerate(group)
    ]


def packed(lengths: list[list[int]], prompt_tokens: int = 5) -> Experience:
    completions = answers(lengths, prompt_tokens)
    return pack(completions, [Outcome("ok", 0.0)] * len(completions))


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_every_piece_has_one_rank_and_no_rank_has_too_much(costs: list[int], size: int) -> None:
    shares = balance(costs, size)
    assert sorted(index for mine in shares for index in mine) == list(range(len(costs)))
    loads = [sum(costs[index] for index in mine) for mine in shares]
    # The rank with the most got its last piece when it had the least.
    assert max(loads) <= sum(costs) / size + max(costs, default=0)


@pytest.mark.parametrize(
    ("prompts", "samples", "prompt", "response", "ranks"),
    [
        (9, 8, 64, 64, 8),
        (3, 8, 128, 64, 2),
        (5, 8, 128, 64, 4),
        (2, 8, 512, 16, 8),
        (16, 4, 50, 50, 8),
        (1, 8, 64, 32, 4),
    ],
)
def test_the_plan_knows_the_largest_part(prompts: int, samples: int, prompt: int, response: int, ranks: int) -> None:
    """Answers of full length that have nothing in common, in micro-batches that hold any part."""
    fresh = iter(range(10**6))
    draw = lambda count: [next(fresh) for _ in range(count)]  # noqa: E731
    asked = [Prompt(f"p{i}", draw(prompt), "") for i in range(prompts)]
    made = [Completion(p, j, draw(response), [0.0] * response, "", "stop", 1) for p in asked for j in range(samples)]
    whole = pack(made, [Outcome("ok", 0.0)] * len(made))
    parts = [share(whole, torch.arange(len(made)), rank, ranks) for rank in range(ranks)]
    keys = [f"data.prompts_per_step={prompts}", f"rollout.n={samples}", f"data.max_prompt_tokens={prompt}"]
    keys += [f"rollout.max_response_tokens={response}", "parallel.microbatch_tokens=100000"]
    demand = demand_of(load(None, ["model.path=qwen2.5-1.5b", *keys]))[0]
    assert demand.microbatch(ranks) == max(select(whole, part).forest.tokens.numel() for part in parts)


def test_the_longest_go_first() -> None:
    assert balance([1, 1, 6, 1, 1, 1, 1], 2) == [[2], [0, 1, 3, 4, 5, 6]]


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=8),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_the_ranks_shares_of_a_batch_are_the_batch(lengths, size, random) -> None:  # type: ignore[no-untyped-def]
    experience = packed(lengths)
    total = experience.layout.num_sequences
    sequences = torch.tensor(sorted(random.sample(range(total), random.randint(1, total))))
    shares = [share(experience, sequences, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat(shares).sort().values, sequences)
    for mine in shares:
        assert torch.equal(mine, mine.sort().values)


def test_groups_stay_whole_where_there_are_enough_of_them() -> None:
    experience = packed([[4, 4], [4, 4], [9, 9], [1, 1]])
    groups = [set(experience.layout.group[share(experience, torch.arange(8), rank, 2)].tolist()) for rank in (0, 1)]
    assert groups[0].isdisjoint(groups[1])
    assert groups[0] | groups[1] == {0, 1, 2, 3}


def test_a_single_group_is_dealt_out_by_samples() -> None:
    experience = packed([[8, 4, 4, 7]])
    lengths = [int(experience.layout.lengths()[share(experience, torch.arange(4), rank, 2)].sum()) for rank in (0, 1)]
    assert sorted(lengths) == [11, 12]


def test_what_all_prompts_share_is_no_reason_to_split_a_group() -> None:
    """The system prompt is a segment of its own above every prompt, and each rank computes it anyway."""
    completions = [
        Completion(Prompt(f"p{g}", [7] * 200 + [g, g + 50], ""), j, [j + 1] * 3, [0.0] * 3, "", "stop", 1)
        for g in range(4)
        for j in range(2)
    ]
    experience = pack(completions, [Outcome("ok", 0.0)] * 8)
    for rank in (0, 1):
        assert len(set(experience.layout.group[share(experience, torch.arange(8), rank, 2)].tolist())) == 2


def test_answers_to_one_prompt_are_scored_on_one_rank() -> None:
    completions = answers([[3, 3], [20, 1], [5, 5]])
    shares = [share_answers(completions, rank, 2) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(6))
    prompts = [{completions[index].prompt.id for index in mine} for mine in shares]
    assert prompts[0].isdisjoint(prompts[1])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_rollouts_samples_keep_their_seeds_and_numbers(size: int) -> None:
    requests = [Request(Prompt(f"p{g}", [1] * (3 + g), ""), [100 * g + j for j in range(4)]) for g in range(2)]
    found = {}
    for part in share_requests(requests, 50, size):
        for request in part.requests:
            for seed, sample in zip(request.seeds, part.samples[request.prompt.id], strict=True):
                assert (request.prompt.id, sample) not in found
                found[request.prompt.id, sample] = seed
    assert found == {(r.prompt.id, j): seed for r in requests for j, seed in enumerate(r.seeds)}


def test_one_prompt_with_many_samples_keeps_every_rank_busy() -> None:
    (request,) = [Request(Prompt("p", [1] * 10, ""), list(range(16)))]
    assert [len(part.requests[0].seeds) for part in share_requests([request], 50, 4)] == [4] * 4
