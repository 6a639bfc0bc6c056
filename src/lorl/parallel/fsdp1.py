"""A base sharded by FullyShardedDataParallel (FSDP1): each layer's weights are one flat tensor, cut over the ranks.

FSDP1 puts a module of its own around each layer, whose name would get into the names of adapters and of checkpoints.
Here the wrappers stay outside of the model: a layer that is called asks its wrapper to gather the weights and to call
it again. So the model's tree is the one that peft and transformers know, and adapters, which are attached to it
afterwards, are none of FSDP's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, ShardingStrategy
from transformers import PreTrainedModel

from lorl.parallel.weights import Source


def shard(base: PreTrainedModel, source: Source, mesh: DeviceMesh, device: torch.device, *, offload: bool) -> None:
    """Shards the layers of `base`, which is empty, over the ranks of `mesh` [copy, fsdp], and fills it. No rank holds
    more than its share (`offload`: in host memory), a layer, and what is not in layers."""
    hybrid = mesh.size(0) > 1
    how: dict[str, Any] = {
        "device_mesh": mesh if hybrid else mesh["fsdp"],
        "sharding_strategy": ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD,
        "device_id": torch.cuda.current_device() if device.type == "cuda" else device,
        "use_orig_params": True,
        "forward_prefetch": True,
        "cpu_offload": CPUOffload(offload_params=offload and device.type == "cuda"),  # it pins memory
    }
    decoder: Any = base.base_model
    names = {id(module): name for name, module in base.named_modules()}
    layers = nn.ModuleList()
    for layer in decoder.layers:
        _fill(layer, f"{names[id(layer)]}.", source)
        layers.append(_wrap(layer, nn.ModuleList([layer]), how))
    _wrap(decoder, layers, how)  # the root: it gathers a layer ahead of the one that computes
    _fill(base, "", source)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `layer`, which `shard` has cut, are whole, on the device, and not to be kept. All ranks
    enter at the same time, once a pass was made."""
    sharded: Any = layer
    with FullyShardedDataParallel.summon_full_params(sharded.wrapper, recurse=False, writeback=False):
        yield


class _Called(nn.Module):
    """What FSDP wraps: the modules whose weights it looks after, and what to call while it has gathered them."""

    def __init__(self, held: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.held = held
        self._call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def _wrap(module: nn.Module, held: nn.Module, how: dict[str, Any]) -> nn.Module:
    """An FSDP wrapper of `held`. From now on a call of `module` goes through it."""
    plain: Any = type(module)
    wrapper = FullyShardedDataParallel(
        _Called(held, lambda *args, **kwargs: plain.__call__(module, *args, **kwargs)), **how
    )

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return wrapper(*args, **kwargs)

    # The wrapper is the class's, not the module's: it would be a part of the tree.
    module.__class__ = type(plain.__name__, (plain,), {"__call__": call, "wrapper": wrapper})
    return wrapper


def _fill(module: nn.Module, prefix: str, source: Source) -> None:
    """Replaces the parameters of `module` that are on the meta device."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            filled = nn.Parameter(source.whole(prefix + name), requires_grad=False)
            module.get_submodule(owner).register_parameter(leaf, filled)
