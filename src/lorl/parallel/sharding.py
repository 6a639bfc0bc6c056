"""The frozen base in parts: each rank keeps a share of every decoder layer, and gathers a layer as a pass comes to it.

Nothing of the base is ever reduced or written back: it has no gradient. Adapters are attached afterwards and stay whole
on every rank, as do the embeddings, the last norm and the head, which are read out of order.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorl.config import ModelConfig, ParallelConfig, RunConfig
from lorl.parallel import fsdp1
from lorl.parallel.group import Ranks
from lorl.parallel.lockstep import Lockstep
from lorl.parallel.weights import Source, open_source
from lorl.policy.load import load_policy, pick_device, pick_dtype
from lorl.policy.policy import Policy
from lorl.policy.sharing import empty_model, parameter_bytes

STRATEGIES = ("fsdp", "fsdp2")


class ShardedTrainer:
    """The trainer beside a vLLM that has a copy of the base (`lorl.rollout.vllm.copied`)."""

    def __init__(
        self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, group: Ranks, tell: Callable[[str], None]
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._group = group
        self._tell = tell

    def held_bytes(self, model: PreTrainedModel) -> int:
        decoder: Any = model.base_model
        layers = parameter_bytes(decoder.layers)
        away = self._config.parallel.param_offload and pick_device(self._config.model).type == "cuda"
        return parameter_bytes(model) - layers + (0 if away else -(-layers // shard_size(self._config)))

    def load(self) -> Policy:
        return sharded_policy(self._config, self._tokenizer, self._group, self._tell)

    def wholes(self, policy: Policy) -> Iterator[tuple[str, Tensor]]:
        base: Any = policy.peft.get_base_model()
        decoder: Any = base.base_model
        flat = self._config.parallel.strategy == "fsdp"
        names = {id(module): name for name, module in base.named_modules()}
        layers = [f"{names[id(layer)]}." for layer in decoder.layers]
        for prefix, layer in zip(layers, decoder.layers, strict=True):
            with fsdp1.gathered(layer) if flat else nullcontext():
                for name, parameter in _frozen(layer):
                    # A loader may keep what it is given, and fsdp1's memory of a layer is for the next one.
                    yield prefix + name, parameter.clone() if flat else _whole(parameter, policy.device)
        yield from ((name, parameter) for name, parameter in _frozen(base) if not name.startswith(tuple(layers)))


def shard_size(config: RunConfig) -> int:
    """Ranks that hold a copy of the base among them."""
    ranks = config.parallel.gpus * config.parallel.nodes
    return min(config.parallel.shard_size or ranks, ranks)


def sharded_policy(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, group: Ranks, tell: Callable[[str], None]
) -> Policy:
    """`load_policy` over a base of which each rank has a share. Every pass over it is one of all ranks: `group.drain`
    then follows those that have more to do."""
    base, source = load_sharded(config.model, config.parallel)
    tell(source.told())
    policy = load_policy(config.model, config.adapter, seed=config.seed, tokenizer=tokenizer, base=base)
    policy.fingerprint = source.fingerprint
    group.follow = Lockstep(group, policy, base.base_model).drain
    return policy


def load_sharded(config: ModelConfig, parallel: ParallelConfig) -> tuple[PreTrainedModel, Source]:
    """The base of `config` over the ranks of the process group, and where it was read from."""
    device = pick_device(config)
    dtype = pick_dtype(config, device)
    model = empty_model(config, dtype)
    model.requires_grad_(False)
    source = open_source(config, model, device, dtype)
    mesh = _mesh(device.type, parallel.shard_size)
    if parallel.strategy == "fsdp":
        fsdp1.shard(model, source, mesh, device, offload=parallel.param_offload)
    else:
        shard(model, mesh["fsdp"], offload=parallel.param_offload)
        _load(model, source, offload=parallel.param_offload)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    model.tie_weights()
    return model.eval(), source


def shard(base: PreTrainedModel, mesh: DeviceMesh, *, offload: bool) -> None:
    """Shards the layers of `base` over the ranks of `mesh`; `offload`: into their host memory."""
    decoder: Any = base.base_model
    how: dict[str, Any] = {"mesh": mesh}
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    layers = [fully_shard(layer, **how) for layer in decoder.layers]
    # By itself it takes the order of a backward pass from all forward passes since the last one. Those without gradient
    # are among them, so that the first layer would ask for the last one once more. It asks for itself: it is there.
    for layer, before in zip(layers, [layers[0], *layers], strict=False):
        layer.set_modules_to_backward_prefetch([before])
    rest = {parameter for name, parameter in decoder.named_parameters() if not name.startswith("layers.")}
    fully_shard(decoder, **how, ignored_params=rest)  # the root: it gathers a layer ahead of the one that computes


def _load(model: nn.Module, source: Source, *, offload: bool) -> None:
    """Gives the sharded, empty `model` this rank's parts of its weights."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        part = _part(parameter, name, source)
        state[name] = part.cpu() if offload and isinstance(part, DTensor) else part
    left = model.load_state_dict(state, strict=False, assign=True)  # not strict: tied parameters have one name here
    assert not left.unexpected_keys
    model.requires_grad_(False)


def _part(parameter: nn.Parameter, name: str, source: Source) -> torch.Tensor:
    """What this rank holds of `parameter`."""
    if not isinstance(parameter, DTensor):
        return source.whole(name)
    mesh = parameter.device_mesh
    assert parameter.placements == (Shard(0),)
    rows = -(-parameter.shape[0] // mesh.size())  # of each rank but the last ones, which may have fewer or none
    start, stop = (min(rows * rank, parameter.shape[0]) for rank in (mesh.get_local_rank(), mesh.get_local_rank() + 1))
    return DTensor.from_local(
        source.rows(name, start, stop),
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _frozen(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters under its own names: adapters that are attached to it are left out."""
    for name, parameter in module.named_parameters():
        if "lora_" not in name:
            yield name.replace(".base_layer", ""), parameter.detach()


def _whole(parameter: Tensor, device: torch.device) -> Tensor:
    """`parameter`, of which each rank may hold a part, maybe in host memory, whole on `device`."""
    if not isinstance(parameter, DTensor):
        return parameter
    here = DTensor.from_local(
        parameter.to_local().to(device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return here.full_tensor()


def _mesh(device: str, shard_size: int | None) -> DeviceMesh:
    """Ranks by copy of the base, and by share of it. peft takes weights on a mesh called fsdp for whole, which they are
    whenever a layer runs; with another name adapters would have the shape of the share."""
    ranks = dist.get_world_size()
    size = shard_size or ranks
    return init_device_mesh(device, (ranks // size, size), mesh_dim_names=("copy", "fsdp"))
