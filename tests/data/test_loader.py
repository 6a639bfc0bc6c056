from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorl.data.loader import PromptLoader
from lorl.errors import UserError
from lorl.experience import Prompt


def prompts(n: int) -> list[Prompt]:
    return [Prompt(id=f"p{i}", tokens=[i], text=str(i)) for i in range(n)]


def ids(batch: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in batch]


@given(st.integers(1, 30), st.integers(1, 30), st.booleans(), st.integers(0, 5))
def test_every_epoch_takes_every_prompt_once_and_no_batch_repeats_one(n, per_step, shuffle, seed):
    if n < per_step:
        n, per_step = per_step, n
    loader = PromptLoader(prompts(n), per_step, shuffle, seed)
    batches = [ids(loader.batch(step)) for step in range(n)]  # n steps are exactly per_step epochs
    assert all(len(set(batch)) == per_step for batch in batches)
    stream = [i for batch in batches for i in batch]
    for epoch in range(per_step):
        assert len(set(stream[epoch * n : (epoch + 1) * n])) == n
    assert set(Counter(stream).values()) == {per_step}


@given(st.integers(2, 24), st.integers(1, 24), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_batch_depends_on_nothing_but_seed_and_step(n, per_step, steps):
    per_step = min(n, per_step)
    straight = PromptLoader(prompts(n), per_step, shuffle=True, seed=1)
    expected = [ids(straight.batch(step)) for step in range(61)]
    jumping = PromptLoader(prompts(n), per_step, shuffle=True, seed=1)
    assert [ids(jumping.batch(step)) for step in steps] == [expected[step] for step in steps]


def test_shuffling_does_not_depend_on_the_order_of_the_files():
    one = PromptLoader(prompts(50), 8, shuffle=True, seed=3)
    other = PromptLoader(prompts(50)[::-1], 8, shuffle=True, seed=3)
    assert [ids(one.batch(s)) for s in range(20)] == [ids(other.batch(s)) for s in range(20)]


def test_seeds_and_epochs_differ_and_unshuffled_is_file_order():
    loader = PromptLoader(prompts(40), 40, shuffle=True, seed=0)
    orders = {tuple(ids(loader.batch(step))) for step in range(4)}
    orders.add(tuple(ids(PromptLoader(prompts(40), 40, shuffle=True, seed=1).batch(0))))
    assert len(orders) == 5
    in_order = PromptLoader(prompts(5), 3, shuffle=False, seed=0)
    assert [ids(in_order.batch(s)) for s in range(2)] == [["p0", "p1", "p2"], ["p3", "p4", "p0"]]


def test_steps_and_epochs_are_counted():
    loader = PromptLoader(prompts(10), 4, shuffle=True, seed=0)
    assert loader.steps_per_epoch == 3
    assert loader.steps(2) == 5  # 20 prompts, 4 a step
    assert [loader.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]


def test_too_few_prompts_is_told_with_both_numbers():
    with pytest.raises(UserError, match=r"data.prompts_per_step=8 .* 5 prompts .* use 5 or fewer"):
        PromptLoader(prompts(5), 8, shuffle=True, seed=0)
