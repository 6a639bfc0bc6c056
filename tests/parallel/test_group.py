"""Sums over ranks, on real process groups: gloo between processes of this machine."""

import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lorl.errors import InfrastructureError
from lorl.parallel.group import Alone, Ranks

LIMIT_S = 2.0


def each(
    size: int,
    folder: Path,
    work: Callable[[Ranks], Any],
    limit_s: float = 60.0,
    sequence: int = 1,
    end_s: float = 60.0,
) -> list[Any]:
    """What `work` returns, or the error that it raises, in each of `size` ranks, `sequence` to a part; None where one
    died or was not done after `end_s`."""
    context = get_context("fork")
    queue = context.SimpleQueue()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=dist.PrefixStore("torch", store), rank=rank, world_size=size)
        group = Ranks(store, limit_s, sequence=sequence)
        try:
            queue.put((rank, work(group)))
        except InfrastructureError as error:
            queue.put((rank, error))
        os._exit(0)

    processes = [context.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(end_s)
        process.kill()
    found: dict[int, Any] = {}
    while not queue.empty():
        rank, value = queue.get()
        found[rank] = value
    return [found.get(rank) for rank in range(size)]


def test_gradients_and_losses_add_up_and_a_parameter_that_nobody_reached_has_none(tmp_path: Path) -> None:
    def work(group: Ranks) -> list[Any]:
        a, b, c = (nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
        a.grad = torch.full((2, 3), float(group.rank + 1))
        if group.rank == 1:
            b.grad = torch.ones(2, 3)
        loss = group.sum_gradients([a, b, c], 10.0 * group.rank, "gradients")
        return [loss, a.grad.tolist(), b.grad is not None and b.grad.tolist(), c.grad]

    for found in each(3, tmp_path, work):
        assert found == [30.0, [[6.0] * 3] * 2, [[1.0] * 3] * 2, None]


def test_gather_gives_every_rank_what_each_has(tmp_path: Path) -> None:
    values = [{"a": [1.5, 2]}, "long " * 100, None]
    for found in each(3, tmp_path, lambda group: group.gather(values[group.rank], "values")):
        assert found == values


def test_alone_there_is_nothing_to_add() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert Alone().sum_gradients([parameter], 0.25, "gradients") == 0.25
    assert parameter.grad is None
    assert Alone().gather({"x": 1}, "x") == [{"x": 1}]


@pytest.mark.parametrize("late", [0, 1])
def test_who_waits_too_long_says_for_whom_and_in_which_call(tmp_path: Path, late: int) -> None:
    def work(group: Ranks) -> None:
        group.gather(0, "metrics")
        if group.rank == late:
            time.sleep(3 * LIMIT_S)
        group.sum_(torch.zeros(3), "policy gradients")

    found = each(2, tmp_path, work, LIMIT_S)
    said = str(found[1 - late])
    assert isinstance(found[1 - late], InfrastructureError)
    assert f"rank {1 - late} waited" in said
    assert "'policy gradients'" in said
    assert f"rank {late} did not come, its last was 'metrics'" in said
    assert f"parallel.collective_limit_s={LIMIT_S:g}" in said


def test_a_rank_that_dies_is_named_at_once(tmp_path: Path) -> None:
    def work(group: Ranks) -> None:
        group.gather(0, "metrics")
        if group.rank == 1:
            os._exit(9)
        group.sum_(torch.zeros(3), "policy gradients")

    started = time.monotonic()
    first, second = each(2, tmp_path, work)
    assert time.monotonic() - started < 30
    assert second is None
    assert "'policy gradients'" in str(first)
    assert "rank 1 did not come" in str(first)
