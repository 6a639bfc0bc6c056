"""vLLM's adapter slots: written from the trainer's adapter in one batched copy, and proved to hold it.

A slot is a row of every adapted layer's `lora_a_stacked` and `lora_b_stacked`; fused layers have an entry of each for
every part. vLLM multiplies nothing by alpha / rank: the factor goes into B.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorl.errors import DivergedError, InfrastructureError, UserError, nearest

_each: Any = torch  # its functions over lists are public in all but name
_CHUNK = 64 << 20  # bytes of scaled copies that a publish holds at a time


@dataclass(frozen=True, slots=True)
class Link:
    """One adapter tensor and its place in a slot."""

    name: str  # peft's, for people
    source: Tensor  # the trainer's float32 master
    target: Tensor  # the view of the slot that it fills
    scaling: float  # what the source is multiplied by on its way


def link(adapter: Mapping[str, Tensor], scaling: Mapping[str, float], layers: Any, fused: Any, slot: int) -> list[Link]:
    """Pairs every tensor of `adapter` (peft's names) with its place in `slot`.

    Args:
        scaling: of each adapted module, by the name that its tensors begin with.
        layers: vLLM's adapted layers by module name.
        fused: parts of each fused module, in the order of its slices.

    Raises:
        UserError: a tensor has no place in the engine, or does not fit it.
    """
    links: list[Link] = []
    for name, source in adapter.items():
        module, kind = _split(name)
        for index, rows in _places(module, kind, layers, fused, name):
            owner = layers[_owner(module, layers, fused)]
            if kind == "lora_A":
                target = owner.lora_a_stacked[index][slot, 0]
                part = _columns(source, owner, target.shape[1])
                view = target[: source.shape[0]]
            else:
                target = owner.lora_b_stacked[index][slot, 0]
                part = _rows(source if rows is None else source[rows], owner, index, target.shape[0])
                view = target[:, : source.shape[1]]
            if view.shape != part.shape:
                raise UserError(
                    f"adapter tensor {name!r} has shape {tuple(part.shape)} and the engine's slot takes "
                    f"{tuple(target.shape)}; lower adapter.rank, or use rollout.engine=torch."
                )
            links.append(Link(name, part, view, scaling[module] if kind == "lora_B" else 1.0))
    return links


def _columns(source: Tensor, owner: Any, width: int) -> Tensor:
    """What this rank's slot takes of an A: with tensor parallelism a row-parallel layer sees a part of the inputs."""
    if source.shape[1] != width * owner.tp_size:
        return source
    return source.narrow(1, owner.tp_rank * width, width)


def _rows(source: Tensor, owner: Any, index: int, rows: int) -> Tensor:
    """What this rank's slot takes of a B: a column-parallel layer has a part of the outputs. Key and value heads that
    are fewer than ranks are on several."""
    if source.shape[0] == rows or owner.tp_size == 1:
        return source
    part = owner.output_ids[index] if hasattr(owner, "output_ids") else owner.tp_rank
    return source[part * rows : (part + 1) * rows]


def clear(layers: Mapping[str, Any], slot: int) -> None:
    """Zeroes a slot: what an adapter does not reach must not act."""
    for layer in layers.values():
        layer.reset_lora(slot)


@torch.no_grad()
def write(links: Sequence[Link]) -> None:
    """Copies every source into its place, device to device, rounding once to the slot's dtype."""
    for chunk in _chunks(links):
        _each._foreach_copy_([one.target for one in chunk], _scaled(chunk))


@torch.no_grad()
def differing(links: Sequence[Link]) -> list[str]:
    """Names of the tensors whose slot does not hold exactly what the trainer holds, rounded once."""
    worst: list[Tensor] = []
    for chunk in _chunks(links):
        expected = [value.to(one.target.dtype) for one, value in zip(chunk, _scaled(chunk), strict=True)]
        # Not in place: what needs no rounding is the master itself.
        worst += _each._foreach_norm(_each._foreach_sub(expected, [one.target for one in chunk]), float("inf"))
    unequal = torch.stack(worst).ne(0).tolist()  # NaN is unequal too
    return [one.name for one, bad in zip(links, unequal, strict=True) if bad]


def check(links: Sequence[Link], what: str) -> None:
    """Raises InfrastructureError unless the slot holds what the trainer holds; DivergedError if that is not finite."""
    if wrong := differing(links):
        if not all(bool(one.source.isfinite().all()) for one in links):
            raise DivergedError(
                f"{what} holds values that are not finite: it ran away; lower optim.lr, and begin anew or from an "
                "earlier checkpoint (another run.name, resume=CHECKPOINT)"
            )
        raise InfrastructureError(
            f"{what}: the engine's slot differs from the trainer in {len(wrong)} of {len(links)} tensors, the first is "
            f"{wrong[0]!r}: a stale or damaged adapter."
        )


def _scaled(chunk: Sequence[Link]) -> list[Tensor]:
    if all(one.scaling == 1.0 for one in chunk):
        return [one.source for one in chunk]
    return list(_each._foreach_mul([one.source for one in chunk], [one.scaling for one in chunk]))


def _chunks(links: Sequence[Link]) -> Iterator[Sequence[Link]]:
    start, size = 0, 0
    for index, one in enumerate(links):
        size += one.source.numel() * one.source.element_size()
        if size >= _CHUNK:
            yield links[start : index + 1]
            start, size = index + 1, 0
    if start < len(links):
        yield links[start:]


def module_of(name: str) -> str:
    """The base's module that a peft tensor belongs to: `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` ->
    `model.layers.0.mlp.up_proj`."""
    return _split(name)[0]


def _split(name: str) -> tuple[str, str]:
    module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
    kind = f"lora_{rest.partition('.')[0]}"
    if kind not in ("lora_A", "lora_B"):
        raise UserError(
            f"adapter tensor {name!r} is of a kind that vLLM has no slot for (DoRA, biases, embeddings); use "
            "rollout.engine=torch."
        )
    return module, kind


def _owner(module: str, layers: Mapping[str, Any], fused: Mapping[str, Sequence[str]]) -> str:
    if module in layers:
        return module
    parent, _, leaf = module.rpartition(".")
    for name, parts in fused.items():
        if leaf in parts and f"{parent}.{name}" in layers:
            return f"{parent}.{name}"
    return ""


def _places(
    module: str, kind: str, layers: Mapping[str, Any], fused: Mapping[str, Sequence[str]], name: str
) -> list[tuple[int, slice | None]]:
    """The slices of the owning layer that a tensor goes to, with the rows of B that each takes (None: all)."""
    owner = _owner(module, layers, fused)
    if not owner:
        raise UserError(
            f"adapter tensor {name!r} binds to nothing in vLLM's model; {nearest(module, layers)} Leave the module out "
            "with adapter.exclude_modules, or use rollout.engine=torch."
        )
    stacked = layers[owner].lora_b_stacked
    if owner != module:
        return [(list(fused[owner.rpartition(".")[2]]).index(module.rpartition(".")[2]), None)]
    layer = layers[owner]
    if layer.tp_size > 1 and len(getattr(layer.base_layer, "output_sizes", [])) > 1:
        raise UserError(
            f"adapter tensor {name!r} is of a module that the checkpoint fuses, and a vLLM over {layer.tp_size} ranks "
            "cuts each of its parts by itself; leave the module out with adapter.exclude_modules, or use strategy=ddp "
            "or rollout.engine=torch."
        )
    if len(stacked) == 1:
        return [(0, None)]
    # The checkpoint fuses what vLLM slices: every slice takes the same A and its own rows of B.
    rows = [tensor.shape[2] for tensor in stacked]
    starts = [sum(rows[:index]) for index in range(len(rows))]
    return [(index, slice(starts[index], starts[index] + rows[index])) for index in range(len(rows))]
