"""A frozen base of which each rank holds a part: gathered layer by layer as a pass comes to it, and let go again.

Who holds the parts is another's business (an engine with tensor parallelism, or `lorl.parallel.shared`): it names this
rank's part of each parameter. The Hugging Face model's parameters keep their tensors and have memory only while they
are gathered, so what autograd saved of them in the forward pass is valid again once the backward pass has had them
gathered anew (the way of PyTorch's FSDP). Frozen weights make the rest simple: no gradient, no optimizer, nothing to
write back.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorl.errors import InfrastructureError
from lorl.policy.checksums import ends, fingerprint_of
from lorl.policy.sharing import CannotBindError

_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of a parameter.

    Attributes:
        held: the part, in memory of the holder's.
        dim: what the ranks' parts follow each other along, 0 (rows) or 1 (columns); None: each holds the whole. Rows
            past the parameter's own are padding.
        copies: how many ranks in a row hold the same part: key and value heads may be fewer than ranks.
    """

    held: Tensor
    dim: int | None
    copies: int = 1

    def join(self, parts: Tensor, whole: Tensor) -> None:
        """Fills `whole` from all ranks' parts [size, *held.shape]."""
        parts = parts[:: self.copies]
        if self.dim == 1:
            whole.view(whole.shape[0], len(parts), -1).copy_(parts.transpose(0, 1))
        elif parts.shape[0] * parts.shape[1] == whole.shape[0]:
            whole.view(parts.shape).copy_(parts)
        else:
            for rows, part in zip(whole.split(parts.shape[1]), parts, strict=False):  # past the last row lies padding
                rows.copy_(part[: len(rows)])

    def take(self, whole: Tensor, rank: int) -> None:
        """Fills `held` from the whole parameter; padding keeps its value."""
        length = self.held.shape[self.dim or 0]
        start = 0 if self.dim is None else rank // self.copies * length
        stop = min(start + length, whole.shape[self.dim or 0])
        count = max(0, stop - start)
        self.held.narrow(self.dim or 0, 0, count).copy_(whole.narrow(self.dim or 0, stop - count, count))


class Sharers:
    """The ranks that hold one base among them.

    Args:
        group: of torch.distributed, for tensors of the base's device and of the CPU. Nothing else uses it: gathers are
            under way while other collective calls are made.
        limit_s: how long a call waits for the other ranks.

    Attributes:
        rank: of this process among them, 0 .. size-1.
        size: how many they are.
        ranks: their ranks in the run.
    """

    def __init__(self, group: dist.ProcessGroup, limit_s: float) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.ranks = dist.get_process_group_ranks(group)
        self._group = group
        self._limit_s = limit_s

    def gather(self, part: Tensor) -> tuple[Tensor, Any]:
        """Starts gathering `part` [n] from each; returns [size, n], which `wait` fills."""
        out = part.new_empty(self.size * part.numel())
        work = _gather(out, part, group=self._group, async_op=True)
        return out.view(self.size, -1), work

    def wait(self, gathering: tuple[Tensor, Any], what: str) -> Tensor:
        """What `gather` returned, filled. Raises InfrastructureError when a rank is lost or late; on a GPU it is the
        device that waits, and torch's own time limit holds."""
        out, work = gathering
        started = time.monotonic()
        try:
            if out.is_cuda:
                work.wait()
            else:
                work.wait(timedelta(seconds=self._limit_s))
        except RuntimeError as error:
            waited = time.monotonic() - started
            reason = str(error).splitlines()[0][:200]
            raise InfrastructureError(
                f"rank {dist.get_rank()} waited {waited:.1f} s for the other ranks' parts of {what}: {reason}"
            ) from None
        return out

    def values(self, value: int, what: str) -> list[int]:
        """Every rank's `value` (int64), by rank."""
        return self.wait(self.gather(torch.tensor([value], dtype=torch.int64)), what).flatten().tolist()


class _Unit:
    """Parameters that are gathered together, in one collective call."""

    def __init__(self, name: str, parts: Sequence[tuple[nn.Parameter, Shard]], sharers: Sharers) -> None:
        self.name = name
        self.parts = parts
        self._sharers = sharers
        # Writing to `.data` leaves the parameters' version counters alone: the values are those that autograd saved.
        self._storages = [(parameter.data, parameter.untyped_storage(), parameter.nbytes) for parameter, _ in parts]
        self._pending: tuple[Tensor, Any] | None = None
        self._present = True
        self.free()

    @property
    def gathered_bytes(self) -> int:
        buffer = self._pending[0].nbytes if self._pending else 0
        return buffer + sum(storage.nbytes() for _, storage, _ in self._storages)

    def start(self) -> None:
        """Has the parts on their way."""
        if self.parts and not self._present and self._pending is None:
            flat = torch.cat([shard.held.reshape(-1) for _, shard in self.parts])
            self._pending = self._sharers.gather(flat)

    def gather(self) -> None:
        """The parameters have their values when this returns (on a GPU: for what is queued after it)."""
        self.start()
        if self._pending is None:
            return
        out = self._sharers.wait(self._pending, self.name)
        self._allocate()
        sizes = [shard.held.numel() for _, shard in self.parts]
        for (whole, *_), (_, shard), parts in zip(self._storages, self.parts, out.split(sizes, dim=1), strict=True):
            shard.join(parts.unflatten(1, shard.held.shape), whole)
        self._pending = None

    def free(self) -> None:
        """Gives the memory back; what is on its way is waited for and dropped."""
        if self._pending is not None:
            self._sharers.wait(self._pending, self.name)
            self._pending = None
        if self._present:
            for _, storage, _ in self._storages:
                storage.resize_(0)
            self._present = False

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        """Inside, the parameters are there to be written; what is written goes to the parts."""
        self._allocate()
        yield
        for parameter, shard in self.parts:
            shard.take(parameter.data, self._sharers.rank)
        self.free()

    def _allocate(self) -> None:
        for _, storage, size in self._storages:
            storage.resize_(size)
        self._present = True


class ShardedBase:
    """`model`, whose parameters are on the meta device, on parts that the ranks hold among them.

    All ranks make the same passes (`lorl.parallel.lockstep` sees to it), and none holds more than its parts and two
    layers. The embedding is gathered for its lookup, the head at the end of each pass, since it is read after it, and
    kept until the backward pass leaves it or the next pass begins; a tied one is gathered twice.

    Args:
        shards: this rank's part of every parameter, by its name in `model` (tied ones by their first).

    Raises:
        CannotBindError: a parameter is in parts that no unit gathers.

    Attributes:
        decoder: of `model`, without its head.
        sharers: the ranks that hold the parts.
    """

    def __init__(self, model: PreTrainedModel, shards: Mapping[str, Shard], sharers: Sharers) -> None:
        self._shards = shards
        self.sharers = sharers
        self._parameters = _materialised(model, shards)
        decoder: Any = model.base_model
        self.decoder: nn.Module = decoder
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        self._layers = [self._unit(f"layer {i}", layer) for i, layer in enumerate(decoder.layers)]
        self._embedding = self._unit("the embedding", embedding)
        tied = head.weight is embedding.weight
        self._head = self._embedding if tied else self._unit("the head", head)
        self._backward = False
        embedding.register_forward_pre_hook(lambda *_: self._embedding.gather())
        embedding.register_forward_hook(lambda *_: self._embedding.free())
        decoder.register_forward_pre_hook(lambda *_: self._begin())
        decoder.register_forward_hook(lambda *_: self._head.gather())
        for index, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            layer.register_forward_hook(lambda _, args, out, index=index: self._leave(index, out))
        reached = {id(parameter) for unit in self._units() for parameter, _ in unit.parts}
        for name, parameter in self._parameters.items():
            if shards[name].dim is not None and id(parameter) not in reached:
                raise CannotBindError(f"{name} is in parts, and lies outside the layers, the embedding and the head")

    @property
    def held_bytes(self) -> int:
        """Of the parts that this rank holds."""
        return sum(shard.held.nbytes for shard in self._shards.values())

    @property
    def gathered_bytes(self) -> int:
        """Of what is gathered at the moment, or on its way."""
        return sum(unit.gathered_bytes for unit in self._units())

    def fingerprint(self) -> str:
        """`lorl.policy.checksums.fingerprint` of the whole. All ranks call it at the same time."""
        found = {
            name: (tuple(parameter.shape), ends(parameter.data))
            for name, parameter in self._parameters.items()
            if self._shards[name].dim is None
        }
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for unit in self._units():
            unit.gather()
            for parameter, _ in unit.parts:
                found[names[id(parameter)]] = (tuple(parameter.shape), ends(parameter.data))
            unit.free()
        return fingerprint_of(found)

    def free(self) -> None:
        """Drops all that is gathered: what an engine needs between passes."""
        for unit in self._units():
            unit.free()

    @contextmanager
    def rewriting(self, parameter: nn.Parameter) -> Iterator[None]:
        """Inside, `parameter` may be given other values, the same ones on all ranks."""
        name = next(name for name, own in self._parameters.items() if own is parameter)
        shard = self._shards[name]
        if shard.dim is None:
            yield
            return
        with _Unit(name, [(parameter, shard)], self.sharers).rewriting():
            yield

    def _unit(self, name: str, module: nn.Module) -> _Unit:
        mine = {id(parameter) for parameter in module.parameters()}
        return _Unit(
            name,
            [
                (parameter, self._shards[key])
                for key, parameter in self._parameters.items()
                if id(parameter) in mine and self._shards[key].dim is not None
            ],
            self.sharers,
        )

    def _units(self) -> list[_Unit]:
        return [*self._layers, self._embedding, self._head]

    def _begin(self) -> None:
        self.free()
        self._backward = False
        self._embedding.start()
        self._layers[0].start()

    def _enter(self, index: int) -> None:
        self._layers[index].gather()
        following = self._layers[index + 1] if index + 1 < len(self._layers) else self._head
        following.start()

    def _leave(self, index: int, out: Any) -> None:
        self._layers[index].free()
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._enter_backward(index))

    def _enter_backward(self, index: int) -> None:
        """The gradient of this layer's output is whole: what follows the layer has been left."""
        if not self._backward:
            self._backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        (self._layers[index + 1] if index + 1 < len(self._layers) else self._head).free()
        self._layers[index].gather()
        if index:
            self._layers[index - 1].start()

    def _end_backward(self) -> None:
        self._backward = False
        self.free()


def _materialised(model: PreTrainedModel, shards: Mapping[str, Shard]) -> dict[str, nn.Parameter]:
    """Gives `model` parameters on the holder's device by their names: whole ones are the holder's own tensors, the
    others have room of their own, a unit's at a time. Buffers follow."""
    device = next(iter(shards.values())).held.device
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        held = shards[name].held
        if shards[name].dim is None:
            value = held
        else:
            value = torch.empty(parameter.shape, dtype=held.dtype, device=device)
            value.untyped_storage().resize_(0)
        made[name] = nn.Parameter(value, requires_grad=False)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = made[names[id(parameter)]]
        for leaf, buffer in module._buffers.items():
            module._buffers[leaf] = None if buffer is None else buffer.to(device)
    return made
