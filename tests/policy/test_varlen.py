"""The GPU's attention, as far as a CPU can show it: which keys each segment sees, and what is done with gradients.

The kernel itself runs in tests/gpu. Here plain arithmetic stands in its place, over the same spans.
"""

import pytest
import torch
from torch import Tensor

from lorl.experience import Completion, Forest, Outcome, Prompt
from lorl.packing import pack
from lorl.policy import varlen
from lorl.policy.attention import ForestAttention, Rule


def random_forest(seed: int, *, prefix: int = 0, alphabet: int = 50) -> Forest:
    """Three prompts with four answers each; a small alphabet makes answers begin alike: segments of many depths."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda count: torch.randint(0, alphabet, (count,), generator=generator).tolist()  # noqa: E731
    common = draw(prefix)
    completions = []
    for group in range(3):
        prompt = Prompt(f"p{group}", [*common, 100 + group, *draw(group)], "")
        for sample in range(4):
            answer = draw(int(torch.randint(1, 9, (1,), generator=generator)))
            completions.append(Completion(prompt, sample, answer, [0.0] * len(answer), "", "stop", 1))
    return pack(completions, [Outcome("ok", 0.0)] * len(completions)).forest


def path(forest: Forest, token: int) -> list[int]:
    """The tokens that `token` sees, from the root to itself."""
    segment = int(torch.searchsorted(forest.segments, token, right=True)) - 1
    seen = list(range(int(forest.segments[segment]), token + 1))
    while (segment := int(forest.parent[segment])) >= 0:
        seen = [*range(int(forest.segments[segment]), int(forest.segments[segment + 1])), *seen]
    return seen


@pytest.mark.parametrize("alphabet", [2, 50])
@pytest.mark.parametrize("prefix", [0, 10])
def test_a_token_sees_what_lies_on_its_way_from_the_root(prefix: int, alphabet: int) -> None:
    for seed in range(5):
        forest = random_forest(seed, prefix=prefix, alphabet=alphabet)
        where = varlen.spans(forest)
        assert int(where.queries[-1]) == forest.tokens.numel()
        assert int(where.keys[-1]) == len(where.gathered) - 1
        assert int(where.bounds[0]) >= int(where.queries.diff().max())
        assert int(where.bounds[1]) >= int(where.keys.diff().max())
        for index, (start, end) in enumerate(zip(where.queries[:-1], where.queries[1:], strict=True)):
            read = where.gathered[where.keys[index] : where.keys[index + 1]].tolist()
            for token in range(int(start), int(end)):
                assert read[: len(read) - (int(end) - 1 - token)] == path(forest, token)


def test_a_forest_without_sharing_gathers_nothing() -> None:
    completions = [
        Completion(Prompt(f"p{i}", [i, 5, 6], ""), 0, [7] * length, [0.0] * length, "", "stop", 1)
        for i, length in enumerate((4, 2))
    ]
    where = varlen.spans(pack(completions, [Outcome("ok", 0.0)] * 2).forest)
    assert where.queries.tolist() == where.keys.tolist() == [0, 7, 12]
    assert where.gathered[:-1].tolist() == list(range(12))
    assert int(where.bounds[2]) == 0
    assert int(varlen.spans(random_forest(0)).bounds[2]) == 1


def by_the_definition(
    query: Tensor, key: Tensor, value: Tensor, where: varlen.Spans, scale: float, reach: int
) -> Tensor:
    """What FlashAttention computes: causal to the ends of queries and keys, `reach` positions back."""
    repeat = query.shape[1] // key.shape[1]
    pieces = []
    for start, end, first, last in zip(
        where.queries[:-1].tolist(),
        where.queries[1:].tolist(),
        where.keys[:-1].tolist(),
        where.keys[1:].tolist(),
        strict=True,
    ):
        tokens = where.gathered[first:last]
        k, v = (x[tokens].repeat_interleave(repeat, dim=1) for x in (key, value))
        back = torch.arange(end - start)[:, None] + (last - first) - (end - start) - torch.arange(last - first)
        seen = (back >= 0) & ((back <= reach) if reach >= 0 else True)
        scores = torch.einsum("qhd,khd->hqk", query[start:end], k) * scale
        pieces.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(pieces)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("prefix", [0, 10])
def test_spans_say_what_dense_masks_say(prefix: int, window: int | None) -> None:
    for seed in range(3):
        forest = random_forest(seed, prefix=prefix, alphabet=3)
        generator = torch.Generator().manual_seed(seed)
        total = forest.tokens.numel()
        query, key, value = (
            torch.randn(heads, total, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
        )
        dense = ForestAttention(forest).attend(0, query, key, value, Rule(0.3, window))
        flat = [x.transpose(0, 1) for x in (query, key, value)]
        reach = -1 if window is None else window - 1
        mine = by_the_definition(*flat, varlen.spans(forest), 0.3, reach)  # type: ignore[arg-type]
        assert torch.allclose(mine.transpose(0, 1), dense, atol=1e-12)


def test_gradients_of_a_shared_key_are_summed() -> None:
    grads = torch.randn(5, 2, 4)
    token = torch.tensor([0, 1, 0, 1, 2])
    found = varlen._scatter(grads, token, torch.empty(3, 2, 4))
    assert torch.allclose(found, torch.stack([grads[0] + grads[2], grads[1] + grads[3], grads[4]]))


def test_which_queries_the_kernel_takes() -> None:
    assert varlen.supports(torch.empty(1, 64, dtype=torch.bfloat16))
    assert not varlen.supports(torch.empty(1, 64))
    assert not varlen.supports(torch.empty(1, 512, dtype=torch.bfloat16))
