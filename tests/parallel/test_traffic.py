"""What ranks send each other in a pass is what the plan says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_group import each
from test_ulysses import batch
from torch import Tensor

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig
from lorl.parallel.group import Ranks
from lorl.parallel.shared import load_cut, sharers_of
from lorl.parallel.ulysses import Ulysses
from lorl.plan.layout import Layout
from lorl.plan.shape import Shape
from lorl.plan.traffic import exchanged_bytes, gathered_bytes
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.policy import Policy


def run_pass(policy: Policy, *, gradient: bool, tokens: int = 48) -> None:
    with torch.set_grad_enabled(gradient):
        scores = policy.logprobs(batch(tokens).forest, adapter=TRAINED).logprobs
    if gradient:
        scores.sum().backward()


@pytest.mark.parametrize(("ranks", "tied"), [(2, True), (3, False)])
def test_a_shared_base_is_gathered_as_often_as_the_plan_says(ranks: int, tied: bool, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", hidden_size=96, intermediate_size=192, tie_word_embeddings=tied)

    def work(group: Ranks) -> Any:
        sharers, sizes = sharers_of(ranks, 60.0), list[int]()
        gather = sharers.gather

        def counted(part: Tensor) -> Any:
            sizes.append(part.nbytes)
            return gather(part)

        base, shared = load_cut(ModelConfig(path=str(folder)), sharers)
        policy = load_policy(ModelConfig(path=str(folder)), AdapterConfig(rank=4), seed=0, base=base)
        shared.free()
        setattr(sharers, "gather", counted)  # noqa: B010  (a method of one object)
        found = []
        for gradient in (False, True):
            sizes.clear()
            run_pass(policy, gradient=gradient)
            found.append(sum(sizes) * (ranks - 1))
        dist.barrier()
        return found, Shape.of(base.config)

    for found, shape in each(ranks, tmp_path, work):
        for gradient, received in zip((False, True), found, strict=True):
            planned = gathered_bytes(shape, 4, Layout("shared", ranks, ranks), gradient=gradient)
            assert received == pytest.approx(planned, rel=0.01)  # norms are whole, and parts padded


@pytest.mark.parametrize(
    ("ranks", "recompute", "shape"),
    [(2, False, {}), (2, True, {}), (4, False, {"num_hidden_layers": 3})],  # two heads of keys for four ranks
)
def test_ranks_that_split_a_pass_exchange_what_the_plan_says(
    ranks: int, recompute: bool, shape: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", **shape)
    model = ModelConfig(path=str(folder), gradient_checkpointing=recompute)

    def work(group: Ranks) -> Any:
        policy, part, sizes = load_policy(model, AdapterConfig(rank=4), seed=0), group.of_part(), list[int]()
        exchange = part.exchange

        def counted(values: Tensor, sends: Sequence[int], receives: Sequence[int], call: str) -> Tensor:
            others = sum(receives) - receives[part.rank]
            if list(receives) == [1] * ranks:  # a layer's; states are many or none
                sizes.append(others * values[0].nbytes)
            return exchange(values, sends, receives, call)

        setattr(part, "exchange", counted)  # noqa: B010
        policy.sequence = Ulysses(part)
        found = []
        for gradient in (False, True):
            sizes.clear()
            run_pass(policy, gradient=gradient)
            found.append(sum(sizes))
        group.gather("done", "done")
        return found, Shape.of(policy.config)

    for found, shape_of in each(ranks, tmp_path, work, sequence=ranks):
        assert found == [
            exchanged_bytes(shape_of, 4, 48, ranks, gradient=gradient, recompute=recompute)
            for gradient in (False, True)
        ]
