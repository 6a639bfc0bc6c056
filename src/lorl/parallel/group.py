"""The ranks of a run as passes and optimizer steps see them: sums and gathers, the same code for one rank and for many.

Every rank holds the whole adapter and its optimizer. What ranks exchange is what each has of a sum: gradients, losses,
metrics, arrays over tokens of which each computed a part. So all of it is all-reduces.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorl.errors import InfrastructureError

stores: Any = dist  # where torch's checker does not see them

SPARE_S = 60.0  # torch's own time limit ends the process without a word; ours comes first


class Group(Protocol):
    """This process among its peers. All ranks make the same calls in the same order; `call` names one in errors.

    Attributes:
        rank: of this process, 0 .. size-1.
        size: how many ranks there are.
        part, parts: which part of a batch this rank computes, of how many. Ranks of one part, which follow each other,
            make every pass over it together, and each knows what all of it came to (`lorl.parallel.ulysses`).
        leads: whether this rank is the one of its part that sums over the batch count.
    """

    rank: int
    size: int
    part: int
    parts: int
    leads: bool

    def sum_(self, values: Tensor, call: str) -> None:
        """Replaces `values` by its sum over ranks, the same bits on each.

        Raises InfrastructureError, here as below, when a rank is lost or does not come within the time limit.
        """
        ...

    def gather(self, value: Any, call: str) -> list[Any]:
        """Every rank's `value` (JSON), by rank."""
        ...

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: float, call: str) -> float:
        """Replaces each gradient by its sum over ranks, and returns the sum of `loss` over parts. A parameter that has
        no gradient on any rank keeps none."""
        ...

    def drain(self) -> None:
        """This rank has no more passes to make in this phase. Returns when no rank has, where passes are collective."""
        ...


class Alone:
    """The group of a run in one process."""

    rank = 0
    size = 1
    part = 0
    parts = 1
    leads = True

    def sum_(self, values: Tensor, call: str) -> None:
        """Nothing to add."""

    def gather(self, value: Any, call: str) -> list[Any]:
        return [value]

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: float, call: str) -> float:
        return loss

    def drain(self) -> None:
        """Nobody to wait for."""


class Ranks:
    """A `Group` over a process group, which must handle CPU tensors too.

    Args:
        store: a torch.distributed Store, shared by the ranks. Each writes what call it is in, so that who waits in vain
            can say for whom.
        limit_s: how long a call waits for the other ranks.
        sequence: how many ranks make up a part; it divides their number.
        within: torch.distributed's process group; None: the default one, of all ranks of the run.

    Attributes:
        name: of the process group, as torch.distributed knows it.
        follow: what `drain` does; set where the base is sharded (`lorl.parallel.lockstep`).
    """

    def __init__(self, store: Any, limit_s: float, *, sequence: int = 1, within: Any = None) -> None:
        default: Any = dist.group.WORLD
        self.rank = dist.get_rank(within)
        self.size = dist.get_world_size(within)
        self.part = self.rank // sequence
        self.parts = self.size // sequence
        self.leads = self.rank % sequence == 0
        self.name: str = (within or default).group_name
        self._within = within
        self._names = dist.get_process_group_ranks(within)  # the run's numbers of these ranks, which errors give
        self._store = store
        self._limit_s = limit_s
        self._calls = 0
        self.follow: Callable[[], None] = lambda: None

    def of_part(self) -> "Ranks":
        """The ranks of this one's part among themselves. All ranks call it, once."""
        limit = timedelta(seconds=self._limit_s + SPARE_S)
        within, _ = dist.new_subgroups(group_size=self.size // self.parts, timeout=limit)
        return Ranks(stores.PrefixStore(f"part/{self.part}", self._store), self._limit_s, within=within)

    def sum_(self, values: Tensor, call: str) -> None:
        self._wait(lambda: dist.all_reduce(values, group=self._within, async_op=True), call)

    def exchange(self, values: Tensor, sends: Sequence[int], receives: Sequence[int], call: str) -> Tensor:
        """Gives the first `sends[0]` rows of `values` [rows, ...] to rank 0, the next `sends[1]` to rank 1 and so on.
        Returns the `receives` rows that the ranks gave to this one, by rank."""
        found = values.new_empty(sum(receives), *values.shape[1:])
        values = values.contiguous()
        if values.is_cuda:  # in the stream's order. Waiting with a time limit would have the host wait for every layer
            dist.all_to_all_single(found, values, list(receives), list(sends), group=self._within)
            return found
        how = {"group": self._within, "async_op": True}
        self._wait(lambda: dist.all_to_all_single(found, values, list(receives), list(sends), **how), call)
        return found

    def gather(self, value: Any, call: str) -> list[Any]:
        data = json.dumps(value).encode()
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(data)
        self.sum_(lengths, call)
        rows = torch.zeros(self.size, int(lengths.max()), dtype=torch.uint8)
        rows[self.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.sum_(rows, call)
        return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths.tolist(), strict=True)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: float, call: str) -> float:
        parameters = list(parameters)
        device = parameters[0].device
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=device)
        flat = torch.cat(
            [*(piece.reshape(-1) for piece in pieces), present, present.new_tensor([loss if self.leads else 0.0])]
        )
        del pieces
        self.sum_(flat, call)
        *sums, present, total = flat.split([*(p.numel() for p in parameters), len(parameters), 1])
        for parameter, found, ranks in zip(parameters, sums, present.tolist(), strict=True):
            parameter.grad = found.view_as(parameter) if ranks else None
        return float(total)

    def drain(self) -> None:
        self.follow()

    def _wait(self, start: Callable[[], Any], call: str) -> None:
        self._calls += 1
        started = time.monotonic()
        try:
            self._store.set(_key(self.rank), f"{self._calls} {call}")
            start().wait(timedelta(seconds=self._limit_s))
        except RuntimeError as error:
            raise InfrastructureError(self._why(call, time.monotonic() - started, error)) from None

    def _why(self, call: str, waited: float, error: RuntimeError) -> str:
        """Who is missing, as far as the store tells."""
        what = f"rank {self._names[self.rank]} waited {waited:.1f} s in {call!r} (its collective call {self._calls})"
        try:
            behind = [text for rank in range(self.size) if (text := self._behind(rank)) is not None]
        except RuntimeError:  # the store went with rank 0
            behind = ["rank 0 is gone"]
        reason = str(error).splitlines()[0][:200]
        limit = f"; the limit is parallel.collective_limit_s={self._limit_s:g}" if waited >= self._limit_s else ""
        return f"{what}: {'; '.join(behind) or reason}{limit}"

    def _behind(self, rank: int) -> str | None:
        if not self._store.check([_key(rank)]):
            return f"rank {self._names[rank]} never came to any"
        number, _, call = self._store.get(_key(rank)).decode().partition(" ")
        late = int(number) < self._calls
        return f"rank {self._names[rank]} did not come, its last was {call!r} ({number})" if late else None


def _key(rank: int) -> str:
    return f"lorl/call/{rank}"
