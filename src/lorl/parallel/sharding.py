"""The frozen base in parts: each rank keeps a share of every decoder layer, and gathers a layer as a pass comes to it.

Nothing of the base is ever reduced or written back: it has no gradient. Adapters are attached afterwards and stay whole
on every rank, as do the embeddings, the last norm and the head, which are read out of order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorl.config import ModelConfig, ParallelConfig, RunConfig
from lorl.parallel.group import Ranks
from lorl.parallel.lockstep import Lockstep
from lorl.policy.checksums import fingerprint
from lorl.policy.load import load_base, load_policy, pick_device, pick_dtype
from lorl.policy.policy import Policy
from lorl.policy.sharing import empty_model


def sharded_policy(config: RunConfig, tokenizer: PreTrainedTokenizerBase, group: Ranks) -> Policy:
    """`load_policy` over a base of which each rank has a share. Every pass over it is one of all ranks: `group.drain`
    then follows those that have more to do."""
    base, digest = load_sharded(config.model, config.parallel)
    policy = load_policy(config.model, config.adapter, seed=config.seed, tokenizer=tokenizer, base=base)
    policy.fingerprint = digest
    group.follow = Lockstep(group, policy, base.base_model).drain
    return policy


def load_sharded(config: ModelConfig, parallel: ParallelConfig) -> tuple[PreTrainedModel, str]:
    """The base of `config` over the ranks of the process group, and its fingerprint.

    Rank 0 reads it into the host's memory and deals it out tensor by tensor. No other rank, and no GPU, ever holds more
    of it than its share and one tensor.
    """
    device = pick_device(config)
    dtype = pick_dtype(config, device)
    first = dist.get_rank() == 0
    on_host = config.model_copy(update={"device": "cpu", "dtype": str(dtype).removeprefix("torch.")})
    whole = dict(load_base(on_host).named_parameters()) if first else {}
    model = empty_model(config, dtype)
    model.requires_grad_(False)
    shard(model, device.type, parallel.shard_size)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    told: list[Any] = [fingerprint({name: value.detach() for name, value in whole.items()}) if first else None]
    dist.broadcast_object_list(told)
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = (
            whole.pop(name).detach().to(device) if first else torch.empty(parameter.shape, dtype=dtype, device=device)
        )
        state[name] = _dealt(value, parameter)
    left = model.load_state_dict(state, strict=False, assign=True)  # not strict: tied parameters have one name here
    assert not left.unexpected_keys
    model.requires_grad_(False)
    model.tie_weights()
    return model.eval(), told[0]


def shard(base: PreTrainedModel, device: str, shard_size: int | None) -> None:
    """Shards the layers of `base` over all ranks, or over groups of `shard_size` of them."""
    mesh = _mesh(device, shard_size)
    decoder: Any = base.base_model
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    rest = {parameter for name, parameter in decoder.named_parameters() if not name.startswith("layers.")}
    fully_shard(decoder, mesh=mesh, ignored_params=rest)  # the root: it gathers a layer ahead of the one that computes


def _mesh(device: str, shard_size: int | None) -> DeviceMesh:
    """The ranks that hold a copy among them. peft takes weights on a mesh of this name for whole, which they are
    whenever a layer runs; with another name adapters would have the shape of the share."""
    ranks = dist.get_world_size()
    size = shard_size or ranks
    return init_device_mesh(device, (ranks // size, size), mesh_dim_names=("copy", "fsdp"))["fsdp"]


def _dealt(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's part of `value`, which rank 0 has, as `parameter` is sharded."""
    dist.broadcast(value, 0)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
