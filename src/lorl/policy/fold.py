"""An adapter added into its base for the length of a rollout, and every byte of the base restored afterwards.

An engine that shares the base's memory then samples from W + scaling * B A as if there were no adapter, and pays
nothing for one. Weights are written in place and never rebound: the engine's tensors are the same memory.

Subtracting the product does not bring W back. Where the sum rounds to a coarser grid than W lies on (another power of
two, or W small beside its delta), bits are lost. So the fold carries the subtraction out beforehand and keeps the
entries that it would get wrong. A checksum of the weights from before, compared after undoing, is the proof.
"""

import traceback
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from lorl.errors import InfrastructureError, UserError
from lorl.policy.checksums import tensor_checksum
from lorl.policy.policy import Policy

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an entry


class Fold:
    """What undoing a fold takes; leaving it as a context undoes it. `fold` makes it."""

    def __init__(self, policy: Policy, adapter: str) -> None:
        self._policy = policy
        self._adapter = adapter
        self._layers: list[_Layer] = []
        self._undone = False

    @property
    def entries(self) -> int:
        """Weights that the adapter was added into."""
        return sum(layer.weight.numel() for layer in self._layers)

    @property
    def lost(self) -> int:
        """Of these, the ones that subtraction alone would not restore."""
        return sum(layer.lost for layer in self._layers)

    @property
    def record_bytes(self) -> int:
        """Memory that is held until the fold is undone."""
        return sum(layer.record.nbytes for layer in self._layers if layer.record is not None)

    def undo(self) -> None:
        """Restores the base and checks that it did; does nothing the second time.

        When it runs out of memory on the way, the base stays unreadable, and undoing again goes on where it stopped.

        Raises:
            InfrastructureError: layers hold other bytes than before the fold; they are named. The base is lost, and the
                policy refuses to read it from here on.
        """
        if self._undone:
            return
        with torch.no_grad():
            _wait_for(self._policy.device)
            for layer in self._layers:
                layer.restore()
            damaged = self._damaged()
        self._undone = True
        self._policy.altered = None
        if damaged:
            named = ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
            self._policy.altered = f"undoing the fold of adapter {self._adapter!r} did not restore {named}"
            raise InfrastructureError(
                f"{self._policy.altered}: something else wrote there meanwhile, or torch's settings for products "
                "changed; load the base again."
            )

    def _damaged(self) -> list[str]:
        """Names of the layers whose checksum has changed; one wait for the device for all of them."""
        if not self._layers:
            return []
        before = torch.stack([layer.checksum for layer in self._layers])
        after = torch.stack([tensor_checksum(layer.weight) for layer in self._layers])
        equal = (before == after).tolist()
        return [layer.name for layer, same in zip(self._layers, equal, strict=True) if not same]

    def __enter__(self) -> "Fold":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def fold(policy: Policy, adapter: str) -> Fold:
    """Adds scaling * B A of `adapter` into every weight that it adapts: the factors in the weight's dtype, as a slot
    holds them, their product and the sum in float32, rounded once.

    Until it is undone, nothing reads the base by way of the policy. The adapter itself may go on changing: undoing
    uses a copy of it that is made here. The memory needed for a moment is that of one layer: its float32 product and
    two copies of its weight.

    Raises:
        UserError: the adapter is more than plain LoRA on linear layers. Nothing was changed.
        InfrastructureError: an adapter is folded in already, or memory ran out. The base is as it was.
    """
    targets = _targets(policy, adapter)
    folded = Fold(policy, adapter)
    policy.altered = f"adapter {adapter!r} is folded into its weights and has to be taken out first"
    try:
        with torch.no_grad():
            for name, module in targets.items():
                layer, summed = _prepare(name, module, adapter)
                folded._layers.append(layer)  # before the write: an interrupt in between is then seen by the checksum
                layer.weight.copy_(summed)
        _wait_for(policy.device)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold a layer's product: undoing needs that memory
        folded.undo()
        if isinstance(error, torch.OutOfMemoryError):
            raise InfrastructureError(
                f"no memory is left to fold adapter {adapter!r} into the base; set rollout.adapter_mode=adapter, or a "
                "smaller rollout.memory_fraction."
            ) from None
        raise
    return folded


@dataclass(frozen=True, slots=True)
class _Copy:
    """The weight itself."""

    weight: Tensor

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def original(self, folded: Tensor) -> Tensor:
        return self.weight


@dataclass(frozen=True, slots=True)
class _Fixups:
    """The factors of the delta, and the entries that subtracting it gets wrong."""

    up: Tensor  # float32[out, rank], scaling included
    down: Tensor  # float32[rank, in]
    index: Tensor  # int32 or int64 [K], into the flat weight
    values: Tensor  # [K], the weight's dtype

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes + self.index.nbytes + self.values.nbytes

    def original(self, folded: Tensor) -> Tensor:
        weight = _subtract(folded, _product(self.up, self.down))
        weight.view(-1).index_copy_(0, self.index.long(), self.values)
        return weight


@dataclass(slots=True)
class _Layer:
    """One weight with an adapter in it."""

    name: str
    weight: Tensor
    checksum: Tensor  # int64[], from before
    lost: int  # entries that subtraction alone does not restore
    record: _Copy | _Fixups | None  # None once restored

    def restore(self) -> None:
        if self.record is not None:
            self.weight.copy_(self.record.original(self.weight))
            self.record = None


def _targets(policy: Policy, adapter: str) -> dict[str, Linear]:
    """The layers that `adapter` adapts, by their names in the base. Raises UserError unless they are all of it."""
    base = policy.peft.get_base_model()
    uses = Counter(parameter.data_ptr() for _, parameter in base.named_parameters(remove_duplicate=False))
    found = {
        name: module
        for name, module in base.named_modules()
        if type(module) is Linear and adapter in module.lora_A and _is_plain(module, adapter, uses)
    }
    covered = {id(half[adapter].weight) for layer in found.values() for half in (layer.lora_A, layer.lora_B)}
    for name, parameter in policy.parameters(adapter).items():
        if id(parameter) not in covered and ".base_layer." not in name:  # peft saves an adapted head's weight as well
            raise UserError(
                f"adapter {adapter!r} can't be folded into the base: {name!r} is not plain LoRA on a linear layer with "
                "a weight of its own (nor are DoRA, biases, embeddings, tied heads); use rollout.adapter_mode=adapter."
            )
    return found


def _is_plain(layer: Linear, adapter: str, uses: Counter[int]) -> bool:
    if type(layer.base_layer) is not nn.Linear or adapter in layer.lora_variant or layer.fan_in_fan_out:
        return False
    weight = layer.base_layer.weight
    return weight.is_contiguous() and uses[weight.data_ptr()] == 1  # a tied weight would carry the delta elsewhere


def _prepare(name: str, module: Linear, adapter: str) -> tuple[_Layer, Tensor]:
    """What restores the layer's weight, and what to write into it. The weight is left as it is."""
    base: Any = module.base_layer
    weight: Tensor = base.weight.detach()
    up = _rounded(_weight(module.lora_B[adapter]) * module.scaling[adapter], weight.dtype)
    down = _rounded(_weight(module.lora_A[adapter]), weight.dtype)
    delta = _product(up, down)
    # A narrow and a float32 tensor are added in float32; `out` rounds the sum once, in the same pass over memory.
    summed = torch.add(weight, delta, out=torch.empty_like(weight))
    wrong = (_bits(_subtract(summed, delta)) != _bits(weight)).view(-1)
    del delta
    lost = int(wrong.count_nonzero())
    index_type = torch.int32 if weight.numel() <= 2**31 else torch.int64
    fixups_bytes = up.nbytes + down.nbytes + lost * (index_type.itemsize + weight.itemsize)
    record: _Copy | _Fixups
    if fixups_bytes < weight.nbytes:
        index = wrong.nonzero().view(-1)
        record = _Fixups(up, down, index.to(index_type), weight.view(-1)[index])
    else:
        record = _Copy(weight.clone())
    return _Layer(name, weight, tensor_checksum(weight), lost, record), summed


def _weight(half: nn.Module) -> Tensor:
    weight: Any = half.weight
    return weight.detach().float()


def _rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 copy that holds what a slot of `dtype`, or the trainer's own sum of the weights, has of it."""
    return factor.to(dtype, copy=True).float()


def _product(up: Tensor, down: Tensor) -> Tensor:
    """[out, rank] @ [rank, in] in float32.

    Undoing needs the bits that the fold had. It gets them from the same memory times the same memory by the same call:
    one shape, one alignment, so one kernel. Autocast could differ between the two places, so it is off. Nothing more is
    promised by the libraries underneath, which is what the checksum is for.
    """
    with torch.autocast(up.device.type, enabled=False):
        return up @ down


def _subtract(folded: Tensor, delta: Tensor) -> Tensor:
    """folded - delta, in float32, rounded once to the dtype of `folded`."""
    return torch.sub(folded, delta, out=torch.empty_like(folded))


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: -0.0 is not 0.0 then, and NaN equals itself."""
    return tensor.view(_BITS[tensor.itemsize])


def _wait_for(device: torch.device) -> None:
    """An engine may compute on a stream of its own: what it has begun ends first, what is written here is seen."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
