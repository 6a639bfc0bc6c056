"""One vLLM over several ranks: an engine in each one's process, all in step, and the parts of the base that each holds.

vLLM calls it `external_launcher`: every rank has a scheduler of its own, which decides alike because it is asked alike.
The requests have to be the same on all ranks, in the same order.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorl.errors import UserError
from lorl.plan.layout import deals_evenly
from lorl.plan.shape import Shape
from lorl.policy.shards import Shard, Sharers
from lorl.policy.sharing import CannotBindError, Weights, find
from lorl.rollout.vllm.versions import Inside, replaced


def check(config: Any, size: int) -> None:
    """Raises UserError unless `size` ranks can share the layers of a model of this (transformers') configuration."""
    shape = Shape.of(config.get_text_config())
    if not deals_evenly(shape, size):
        raise UserError(
            f"rollout.engine=vllm over {size} ranks: vLLM cannot deal out {shape.heads} heads, {shape.kv_heads} of "
            f"keys and values, {shape.ffn} inner units and {shape.vocabulary} words evenly; choose another "
            "parallel.shard_size, strategy=ddp, or rollout.engine=torch"
        )


def start(sharers: Sharers, launch: Callable[..., Inside], **extra: Any) -> Inside:
    """`launch`, as one of the engines that `sharers` run together. All ranks of the run call it at the same time."""
    from vllm.v1.executor.uniproc_executor import (  # pyright: ignore[reportMissingImports]
        ExecutorWithExternalLauncher,
    )

    # vLLM would read the rank from torchrun's variables. The method's name differs between ranks on purpose: with one
    # name vLLM's CPU build would reduce through shared memory, which waits for a lost rank for ever.
    os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")  # needs NVLink multicast and all GPUs in sight
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    place = (f"lorl:{sharers.rank}", sharers.rank, device)
    with replaced(ExecutorWithExternalLauncher, _distributed_args=lambda _: place):
        return launch(
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=sharers.size,
            disable_custom_all_reduce=True,  # it maps the other GPUs' memory, and a rank of Ray's sees but its own
            **extra,
        )


def shards(inside: Inside, model: PreTrainedModel, size: int) -> dict[str, Shard]:
    """Of every parameter of `model` the part that this rank's engine holds, by the parameter's (first) name.

    Raises:
        CannotBindError: a parameter has no counterpart, or one that is cut in a way that is not known here.
    """
    weights = Weights(inside.weights(), inside.packed_modules())
    layers = _fused_layers(inside.model)
    aliases: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
        rows = _part_rows(name, layers, weights)
        shapes[name] = tuple(parameter.shape) if rows is None else (rows, *parameter.shape[1:])
    vocabulary = {id(module.weight) for module in _vocabulary(model)}
    found: dict[str, Shard] = {}
    used: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner, held = find(aliases[id(parameter)], shapes, weights)
        if owner == name and owner.rpartition(".")[0] in layers:
            raise CannotBindError(f"{name} is fused in the checkpoint, and vLLM cuts each of its parts by itself")
        if held.dtype != parameter.dtype:
            raise CannotBindError(f"{name} is {parameter.dtype}, and the engine's is {held.dtype}")
        found[name] = _shard(name, held, parameter.shape, size, padded=id(parameter) in vocabulary)
        used[owner] = used.get(owner, 0) + held.shape[0]
    for owner, tensor in weights.tensors.items():
        if used.get(owner, 0) != tensor.shape[0]:
            raise CannotBindError(f"{owner} holds {tensor.shape[0]} rows and {used.get(owner, 0)} of them have a place")
    return found


def _shard(name: str, held: Tensor, shape: torch.Size, size: int, *, padded: bool) -> Shard:
    if held.shape == shape:
        return Shard(held, None)
    rows, whole = held.shape[0] * size, shape[0]
    if held.shape[1:] == shape[1:] and padded and rows >= whole:
        return Shard(held, 0)
    if held.shape[1:] == shape[1:] and rows >= whole and rows % whole == 0 and size % (rows // whole) == 0:
        return Shard(held, 0, rows // whole)
    if held.dim() == 2 and held.shape[0] == shape[0] and held.shape[1] * size == shape[1]:
        return Shard(held, 1)
    raise CannotBindError(f"{name} is {tuple(shape)}, and each of {size} ranks holds {tuple(held.shape)} of it")


def _vocabulary(model: PreTrainedModel) -> list[Any]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in ends if module is not None]


def _fused_layers(model: nn.Module) -> dict[str, Any]:
    """vLLM's layers of several parts by name, without the wrappers around adapted ones."""
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in model.named_modules()
        if len(getattr(layer, "output_sizes", [])) > 1
    }


def _part_rows(name: str, layers: Mapping[str, Any], weights: Weights) -> int | None:
    """How many rows of a fused layer's tensor are the Hugging Face parameter `name`, on this rank."""
    module, _, _ = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    for fused, parts in weights.fused.items():
        layer = layers.get(f"{parent}.{fused}")
        if leaf in parts and layer is not None:
            return layer.output_sizes[list(parts).index(leaf)] // layer.tp_size
    return None
