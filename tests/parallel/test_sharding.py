"""A sharded base: each rank holds its share of the layers, and together they hold the base."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from test_group import each
from torch.distributed.tensor import DTensor

from conftest import save_tiny_model
from lorl.config import ModelConfig, ParallelConfig
from lorl.parallel.group import Ranks
from lorl.parallel.sharding import load_sharded
from lorl.policy.checksums import fingerprint
from lorl.policy.load import load_base


@pytest.mark.parametrize(("ranks", "shard_size", "tied"), [(2, None, True), (3, None, False), (4, 2, True)])
def test_ranks_hold_a_share_of_each_layer_and_the_whole_among_them(
    ranks: int, shard_size: int | None, tied: bool, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(save_tiny_model(tmp_path / "model", tie_word_embeddings=tied)))
    whole = dict(load_base(model).named_parameters())

    def work(group: Ranks) -> Any:
        base, digest = load_sharded(model, ParallelConfig(gpus=ranks, shard_size=shard_size))
        held, equal = 0, True
        for name, parameter in base.named_parameters():
            if isinstance(parameter, DTensor):
                held += parameter.to_local().numel()
                parameter = parameter.full_tensor()
            equal &= bool((parameter == whole[name]).all())
        names = {name for name, _ in base.named_parameters()}
        group.gather("done", "done")
        dist.barrier()
        return held, equal, digest, sorted(names)

    layers = sum(parameter.numel() for name, parameter in whole.items() if ".layers." in name)
    found = each(ranks, tmp_path, work)
    for held, equal, digest, names in found:
        assert held <= layers / (shard_size or ranks) * 1.05
        assert equal
        assert digest == fingerprint({name: value.detach() for name, value in whole.items()})
        assert names == sorted(whole)
    assert sum(held for held, *_ in found) == layers * ranks / (shard_size or ranks)
