"""A Hugging Face model on weights that someone else holds: its parameters become views, no byte is copied.

A rollout engine that fuses projections keeps `q_proj`, `k_proj` and `v_proj` as the rows of one tensor. A view of those
rows is what Hugging Face's own layer wants. Which projections are fused is data (vLLM's `packed_modules_mapping`), so
one mapping serves every dense architecture; what cannot be bound is an error that names the first such parameter.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lorl.config import ModelConfig
from lorl.policy import attention
from lorl.policy.fetch import resolve


class CannotBindError(Exception):
    """The owner's tensors don't hold what the Hugging Face model needs, in a layout that views can express."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What the owner holds: tensors by Hugging Face's names but for fused modules, which have names of their own.

    `fused` names each fused module's parts in the order of their rows, such as
    `{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}`. A tensor may have more rows than the model needs (a padded
    vocabulary).
    """

    tensors: Mapping[str, Tensor]
    fused: Mapping[str, Sequence[str]]


def empty_model(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config.path` with parameters on the meta device and real buffers (rotary frequencies)."""
    path = resolve(config.path, weights=not config.random_weights)
    shape = AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            shape, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=config.trust_remote_code
        )
    model.tie_weights()  # putting parameters on the meta device one by one parted those that are one
    with suppress(OSError):  # a folder without generation_config.json ends completions with the tokenizer's token
        model.generation_config = GenerationConfig.from_pretrained(path, revision=config.revision or "main")
    return model


def parameter_bytes(model: nn.Module) -> int:
    """Of all parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def bind(model: PreTrainedModel, weights: Weights) -> None:
    """Gives `model`, whose parameters are on the meta device, views of the owner's tensors.

    Raises:
        CannotBindError: a parameter has no counterpart, or one of another shape or dtype; or the owner holds rows that
            the model has no parameter for. The model is left as it was.
    """
    aliases: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    vocabulary = {
        id(parameter)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
        for parameter in module.parameters()
    }
    used: dict[str, int] = {}  # rows of each of the owner's tensors that found a parameter
    views: dict[int, Tensor] = {}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for key, names in aliases.items():
        owner, view = find(names, shapes, weights)
        wanted = parameters[key]
        if key in vocabulary:  # rows past the vocabulary are the owner's padding
            used[owner] = weights.tensors[owner].shape[0]
            view = view[: wanted.shape[0]]
        else:
            used[owner] = used.get(owner, 0) + view.shape[0]
        if view.shape != wanted.shape or view.dtype != wanted.dtype:
            raise CannotBindError(
                f"{names[0]} is {tuple(wanted.shape)} {wanted.dtype}, and the owner's {owner} gives "
                f"{tuple(view.shape)} {view.dtype}"
            )
        views[key] = view
    for owner, tensor in weights.tensors.items():
        if used.get(owner, 0) != tensor.shape[0]:
            raise CannotBindError(f"{owner} holds {tensor.shape[0]} rows and {used.get(owner, 0)} of them have a place")
    device = next(iter(views.values())).device
    frozen = {key: nn.Parameter(view.detach(), requires_grad=False) for key, view in views.items()}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = frozen[id(parameter)]
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)


def unshared_bytes(tensors: Mapping[str, Tensor], weights: Weights) -> int:
    """Bytes of the base's tensors that lie in storage of their own: what sharing failed to save."""
    owners = {tensor.untyped_storage().data_ptr() for tensor in weights.tensors.values()}
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in tensors.values()
        if tensor.untyped_storage().data_ptr() not in owners
    )


def find(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], weights: Weights) -> tuple[str, Tensor]:
    """The owner's tensor, and in it the view that the parameter with these (tied) names is. `shapes` are what the owner
    holds of each parameter. Raises CannotBindError."""
    for name in names:
        if name in weights.tensors:
            return name, weights.tensors[name]
        if found := _find_fused(name, shapes, weights):
            return found
    raise CannotBindError(f"the owner holds nothing for {names[0]}")


def _find_fused(name: str, shapes: Mapping[str, tuple[int, ...]], weights: Weights) -> tuple[str, Tensor] | None:
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    for fused, parts in weights.fused.items():
        owner = f"{parent}.{fused}.{kind}"
        if leaf not in parts or owner not in weights.tensors:
            continue
        rows: list[Any] = [shapes.get(f"{parent}.{part}.{kind}", (0,))[0] for part in parts]
        start = sum(rows[: list(parts).index(leaf)])
        return owner, weights.tensors[owner][start : start + shapes[name][0]]
    return None
