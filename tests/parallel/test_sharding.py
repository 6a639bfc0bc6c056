"""A sharded base: each rank holds its share of the layers, and together they hold the base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_group import each
from torch.profiler import ProfilerActivity, profile

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig, ParallelConfig
from lorl.experience import Forest
from lorl.parallel.group import Ranks
from lorl.parallel.sharding import load_sharded
from lorl.policy.checksums import fingerprint
from lorl.policy.load import load_base, load_policy

Strategy = Literal["fsdp", "fsdp2"]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize(("ranks", "shard_size", "tied"), [(2, None, True), (3, None, False), (4, 2, True)])
def test_ranks_hold_a_share_of_each_layer_and_the_whole_among_them(
    strategy: Strategy, ranks: int, shard_size: int | None, tied: bool, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(save_tiny_model(tmp_path / "model", tie_word_embeddings=tied)))
    whole = {name: value.detach() for name, value in load_base(model).named_parameters()}

    def work(group: Ranks) -> Any:
        parallel = ParallelConfig(gpus=ranks, shard_size=shard_size, strategy=strategy)
        base, source = load_sharded(model, parallel)
        held = {name: local(value).detach().flatten() for name, value in base.named_parameters()}
        save_file(held, tmp_path / f"{group.rank}.safetensors")
        dist.barrier()
        return source.fingerprint

    digests = each(ranks, tmp_path, work)
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(ranks)]
    copy = found[: shard_size or ranks]  # the ranks that hold one copy among them
    layers = sum(value.numel() for name, value in whole.items() if ".layers." in name)
    assert digests == [fingerprint(whole)] * ranks
    for held in found:
        assert sum(part.numel() for name, part in held.items() if ".layers." in name) <= layers / len(copy) * 1.05
        assert held.keys() == whole.keys()
    for name, value in whole.items():
        parts = [held[name] for held in copy]
        assert torch.equal(torch.cat(parts) if ".layers." in name else parts[0], value.flatten()), name


def local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_a_rank_reads_its_share_of_the_checkpoint_and_adapters_stay_whole_under_their_own_names(
    strategy: Strategy, tmp_path: Path
) -> None:
    model = ModelConfig(path=str(save_tiny_model(tmp_path / "model", num_hidden_layers=4)))
    adapter = AdapterConfig(rank=4)
    whole = load_policy(model, adapter, seed=0)
    shapes = {name: tuple(value.shape) for name, value in whole.parameters("policy").items()}
    names = list(whole.base_tensors())

    def work(group: Ranks) -> Any:
        base, source = load_sharded(model, ParallelConfig(gpus=2, strategy=strategy))
        policy = load_policy(model, adapter, seed=0, base=base)
        found = {name: tuple(value.shape) for name, value in policy.parameters("policy").items()}
        dist.barrier()
        return source.bytes_read, found, list(policy.base_tensors()), policy.checksum("policy")  # type: ignore[attr-defined]

    layers = sum(value.nbytes for name, value in whole.base_tensors().items() if ".layers." in name)
    rest = sum(value.nbytes for name, value in whole.base_tensors().items() if ".layers." not in name)
    for read, adapters, base_names, checksum in each(2, tmp_path, work):
        assert read == rest + (layers if strategy == "fsdp" else layers // 2)  # fsdp: it cuts a layer that is whole
        assert adapters == shapes
        assert base_names == names
        assert checksum == whole.checksum("policy")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_in_many_files_is_read_in_the_dtype_of_the_run(
    dtype: Literal["float32", "bfloat16"], tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model")
    load_base(ModelConfig(path=str(folder))).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    model = ModelConfig(path=str(folder), dtype=dtype)
    whole = {name: value.detach() for name, value in load_base(model).named_parameters()}

    def work(group: Ranks) -> Any:
        base, source = load_sharded(model, ParallelConfig(gpus=2, strategy="fsdp2"))
        equal = all(torch.equal(value.full_tensor(), whole[name]) for name, value in base.named_parameters()
                    if hasattr(value, "full_tensor"))  # fmt: skip
        dist.barrier()
        return equal, source.fingerprint, source.told()

    for equal, digest, told in each(2, tmp_path, work):
        assert equal
        assert digest == fingerprint(whole)
        assert "by mapping it" in told


def test_a_checkpoint_with_other_names_is_dealt_out_and_the_user_is_told(tmp_path: Path) -> None:
    """transformers puts the head before names that a bare decoder was saved with."""
    folder = save_tiny_model(tmp_path / "model")
    whole = load_base(ModelConfig(path=str(folder)))
    whole.base_model.save_pretrained(folder)
    model = ModelConfig(path=str(folder))

    def work(group: Ranks) -> Any:
        base, source = load_sharded(model, ParallelConfig(gpus=2, strategy="fsdp2"))
        layer: Any = base.get_parameter("model.layers.1.mlp.up_proj.weight")
        equal = torch.equal(layer.full_tensor(), whole.get_parameter("model.layers.1.mlp.up_proj.weight"))
        dist.barrier()
        return equal, source.told()

    for equal, told in each(2, tmp_path, work):
        assert equal
        assert "rank 0 read the whole base" in told
        assert "the checkpoint has no tensor model.embed_tokens.weight" in told


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_each_layer_is_gathered_once_forwards_and_once_backwards(strategy: Strategy, tmp_path: Path) -> None:
    """After passes without gradient as well, from which torch would take the order of the next backward pass."""
    model = ModelConfig(path=str(save_tiny_model(tmp_path / "model", num_hidden_layers=4)))

    def work(group: Ranks) -> Any:
        base, _ = load_sharded(model, ParallelConfig(gpus=2, strategy=strategy))
        policy = load_policy(model, AdapterConfig(rank=4), seed=0, base=base)

        def score() -> torch.Tensor:
            return policy.logprobs(forest(), adapter="policy").logprobs

        with torch.no_grad():
            score()
            read = gathers(score)
        trained = [gathers(lambda: score().sum().backward()) for _ in range(2)]
        dist.barrier()
        return read, trained

    assert each(2, tmp_path, work) == [(4, [8, 8])] * 2


def forest() -> Forest:
    return Forest(
        tokens=torch.arange(10, 34),
        positions=torch.arange(24),
        segments=torch.tensor([0, 24], dtype=torch.int32),
        parent=torch.tensor([-1], dtype=torch.int32),
        previous=torch.arange(24) - 1,
        sampled=torch.arange(8, 24),
    )


def gathers(work: Callable[[], Any]) -> int:
    """How often `work` has torch.distributed gather."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return sum(event.count for event in seen.key_averages() if "allgather" in event.key and "c10d" in event.key)
