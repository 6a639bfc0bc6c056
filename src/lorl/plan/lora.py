"""An adapter's size: which projections of which layers it reaches."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorl.errors import UserError, nearest
from lorl.plan.shape import Projection, Shape

if TYPE_CHECKING:
    from lorl.config import AdapterConfig, CriticConfig

Targets = str | Sequence[str]

SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM has kernels for; a slot is of the next larger one


@dataclass(frozen=True, slots=True)
class Lora:
    """Rank, and the adapted projections of each layer."""

    rank: int
    layers: tuple[tuple[Projection, ...], ...]

    @property
    def parameters(self) -> int:
        return sum(self.rank * (one.inputs + one.outputs) for layer in self.layers for one in layer)

    @property
    def tensors(self) -> list[int]:
        """Parameters of each tensor: A and B of each adapted projection."""
        return [self.rank * size for layer in self.layers for one in layer for size in (one.inputs, one.outputs)]

    def slot_parameters(self, ways: int) -> int:
        """What each of `ways` tensor-parallel ranks holds of it in vLLM: all of A and its own rows of B where a
        projection's outputs are split, its own columns of A and all of B where the inputs are."""
        return sum(
            self.rank * (one.inputs + one.outputs // ways if one.splits_outputs else one.inputs // ways + one.outputs)
            for layer in self.layers
            for one in layer
        )


def lora_on(
    shape: Shape, rank: int, targets: Targets, exclude: Targets | None = None, key: str = "adapter.target_modules"
) -> Lora:
    """The adapter that peft would attach: 'all-linear', names, or a regular expression over `model.layers.N.NAME`.

    Raises:
        UserError: a name that no projection of the model has; `key` is what named it.
    """
    leaves = [one.name.rpartition(".")[2] for one in shape.projections]
    for wanted in [] if isinstance(targets, str) else targets:
        if wanted.rpartition(".")[2] not in leaves:
            raise UserError(f"{key}: no linear layer is called {wanted!r}; {nearest(wanted, leaves)}")
    layers = tuple(
        tuple(
            one
            for one in shape.projections
            if _matches(f"model.layers.{index}.{one.name}", targets, key)
            and not (exclude and _matches(f"model.layers.{index}.{one.name}", exclude, "adapter.exclude_modules"))
        )
        for index in range(shape.layers)
    )
    if not any(layers):
        raise UserError(f"{key}={targets!r} matches no linear layer; {nearest(str(targets), leaves)}")
    return Lora(rank, layers)


def lora_at_most(shape: Shape, rank: int, targets: Targets, exclude: Targets | None = None) -> Lora:
    """As `lora_on`, but on all linear layers where it reaches modules that are in no layer: of an adapter that is there
    already, and that the run itself checks."""
    try:
        return lora_on(shape, rank, targets, exclude)
    except UserError:
        return lora_on(shape, rank, "all-linear")


def lora_of(shape: Shape, adapter: "AdapterConfig") -> Lora:
    """The policy's. Raises UserError where it fits nowhere."""
    if adapter.path:
        return lora_in(shape, adapter.path)
    return lora_on(shape, adapter.rank, adapter.target_modules, adapter.exclude_modules)


def critic_lora_of(
    shape: Shape, critic: "CriticConfig", adapter: "AdapterConfig", policy: Lora, *, checked: bool
) -> Lora:
    """The critic's: as the `policy`'s, but for what `critic` says. Raises UserError where it fits nowhere, unless that
    is `checked` elsewhere."""
    if critic.path:
        return lora_in(shape, critic.path, "critic.path")
    rank = critic.rank or policy.rank
    if critic.target_modules is None:
        return replace(policy, rank=rank)
    exclude = _saved(adapter.path, "adapter.path")[2] if adapter.path else adapter.exclude_modules
    if checked:
        return lora_at_most(shape, rank, critic.target_modules, exclude)
    return lora_on(shape, rank, critic.target_modules, exclude, "critic.target_modules")


def slot_rank(rank: int) -> int:
    """Of the slots of a vLLM that holds an adapter of `rank`."""
    return next((one for one in SLOT_RANKS if one >= rank), rank)


def lora_in(shape: Shape, folder: str, key: str = "adapter.path") -> Lora:
    """The adapter of a peft folder, with its largest rank everywhere. Raises UserError where its adapter_config.json
    cannot be read."""
    return lora_at_most(shape, *_saved(folder, key))


def reach(config: Mapping[str, Any]) -> tuple[int, Targets, Targets | None]:
    """Largest rank, target modules and excluded ones of a LoRA configuration of peft's, by its fields."""
    rank = max([int(config["r"]), *(config.get("rank_pattern") or {}).values()])
    targets, exclude = (
        one if one is None or isinstance(one, str) else sorted(one)
        for one in (config["target_modules"], config.get("exclude_modules"))
    )
    return rank, targets or "all-linear", exclude


def _saved(folder: str, key: str) -> tuple[int, Targets, Targets | None]:
    """Largest rank, target modules and excluded ones of a peft folder."""
    file = Path(folder).expanduser() / "adapter_config.json"
    try:
        return reach(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{key}={folder}: {file.name} cannot be read ({error}); name a folder that peft saved"
        ) from None


def _matches(name: str, wanted: Targets, key: str) -> bool:
    if wanted == "all-linear":
        return True
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, name) is not None or name.endswith(f".{wanted}")
        except re.error as error:
            raise UserError(f"{key}={wanted!r} is not a regular expression: {error}") from None
    return any(name == one or name.endswith(f".{one}") for one in wanted)
