"""What vLLM is started with."""

import pytest

from lorl.rollout.vllm.launch import graph_sizes


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (6, [1, 2, 3, 4, 6]), (20, [1, 2, 3, 4, 6, 8, 12, 16, 20])])
def test_every_batch_has_a_graph_that_is_at_most_half_as_large_again(most: int, sizes: list[int]) -> None:
    assert graph_sizes(most) == sizes
    for batch in range(1, most + 1):
        assert min(size for size in sizes if size >= batch) <= 1.5 * batch
