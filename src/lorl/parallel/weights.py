"""Where the weights of a sharded base come from.

Each rank maps the checkpoint's safetensors into memory and reads its own share of them, a tensor at a time. What
transformers renames or rebuilds as it loads can't be read so: then rank 0 loads the model and deals it out. Random
weights are drawn by every rank.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from lorl.config import ModelConfig
from lorl.policy.checksums import ends, fingerprint, fingerprint_of
from lorl.policy.load import draw_random, load_base, weights_path

_MIB = 2**20


class CannotMapError(Exception):
    """The checkpoint's tensors are not the model's own, by name and shape."""


class Source(Protocol):
    """A base's tensors by the model's names, in the run's dtype and on its device. All ranks ask for the same names in
    the same order.

    Attributes:
        fingerprint: of the whole base, once each of its tensors was asked for.
    """

    @property
    def fingerprint(self) -> str: ...

    def whole(self, name: str) -> Tensor:
        """A tensor of one's own."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`whole(name)[start:stop]`."""
        ...

    def told(self) -> str:
        """What a user should know once all was read."""
        ...


def open_source(config: ModelConfig, model: nn.Module, device: torch.device, dtype: torch.dtype) -> Source:
    """The weights of `config` for `model`, whose parameters are on the meta device."""
    if config.random_weights:
        return Drawn(model, device, dtype)
    try:
        return Mapped(checkpoint_files(config), model, device, dtype)
    except CannotMapError as error:
        return Dealt(config, model, device, dtype, str(error))


class Mapped:
    """Reads what is asked for out of mapped files.

    Attributes:
        bytes_read: by this process, but for the ends of tensors that the fingerprint is made of.

    Raises:
        CannotMapError: a parameter is in none of `files` under any of its (tied) names, or has another shape there.
    """

    def __init__(self, files: Sequence[Path], model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        found: dict[str, Tensor] = {}
        for path in files:
            opened: Any = safe_open(path, framework="pt")
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (mapped: nothing is read)
        self._tensors = _matched(model, found)
        self._device, self._dtype = device, dtype
        self.bytes_read = 0
        self.fingerprint = fingerprint(self._tensors, dtype)

    def whole(self, name: str) -> Tensor:
        return self._read(self._tensors[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._read(self._tensors[name][start:stop])

    def told(self) -> str:
        everything = sum(tensor.nbytes for tensor in self._tensors.values())
        return (
            f"rank 0 read {self.bytes_read / _MIB:,.1f} MiB of the base's {everything / _MIB:,.1f} MiB, by mapping it"
        )

    def _read(self, mapped: Tensor) -> Tensor:
        self.bytes_read += mapped.nbytes
        return mapped.to(self._device, self._dtype, copy=True)


class Dealt:
    """Rank 0 reads the base into the host's memory and gives each tensor to all ranks when they ask for it. No other
    rank, and no GPU, holds more of it than it asks for at a time."""

    def __init__(
        self, config: ModelConfig, model: nn.Module, device: torch.device, dtype: torch.dtype, why: str
    ) -> None:
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._device, self._dtype, self._why = device, dtype, why
        self._held: dict[str, Tensor] = {}
        self._first = dist.get_rank() == 0
        if self._first:
            on_host = config.model_copy(update={"device": "cpu", "dtype": str(dtype).removeprefix("torch.")})
            named = load_base(on_host).named_parameters()
            self._held = {name: parameter.detach() for name, parameter in named}
        told: list[Any] = [fingerprint(self._held) if self._first else None]
        dist.broadcast_object_list(told)
        self.fingerprint = told[0]

    def whole(self, name: str) -> Tensor:
        if self._first:
            value = self._held.pop(name).to(self._device)
        else:
            value = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
        dist.broadcast(value, 0)
        return value

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.whole(name)[start:stop].clone()

    def told(self) -> str:
        return f"rank 0 read the whole base into host memory and dealt it out: {self._why}"


class Drawn:
    """Every rank draws each tensor on its own device, the same values on all, and keeps what it asks for."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._config: Any = model.config
        self._device, self._dtype = device, dtype
        self._read: dict[str, tuple[tuple[int, ...], Tensor]] = {}

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self._read)

    def whole(self, name: str) -> Tensor:
        value = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
        draw_random(name, value, self._config)
        self._read[name] = (tuple(value.shape), ends(value))
        return value

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.whole(name)[start:stop].clone()

    def told(self) -> str:
        return "the base's weights are random: each rank drew them on its own device"


def checkpoint_files(config: ModelConfig) -> list[Path]:
    """The safetensors of `config.path`, fetched if need be. Raises CannotMapError where there are none of that name."""
    index = _file(config, "model.safetensors.index.json")
    names = (
        ["model.safetensors"] if index is None else sorted(set(json.loads(index.read_text())["weight_map"].values()))
    )
    found = {name: _file(config, name) for name in names}
    if missing := [name for name, path in found.items() if path is None]:
        raise CannotMapError(f"there is no {missing[0]}")
    return [path for path in found.values() if path is not None]


def _file(config: ModelConfig, name: str) -> Path | None:
    found = cached_file(
        weights_path(config), name, revision=config.revision, _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else Path(found)


def _matched(model: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `found` holds for each parameter, under the first of the parameter's names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    matched: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = next((found[alias] for alias in names[id(parameter)] if alias in found), None)
        if tensor is None:
            raise CannotMapError(f"the checkpoint has no tensor {name}")
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise CannotMapError(f"the checkpoint's {name} is {tuple(tensor.shape)} of {tensor.dtype}")
        matched[name] = tensor
    return matched
