"""The ranks of a run as passes and optimizer steps see them: sums and gathers, the same code for one rank and for many.

Every rank holds the whole adapter and its optimizer. What ranks exchange is what each has of a sum: gradients, losses,
metrics, arrays over tokens of which each computed a part. So all of it is all-reduces.
"""

import json
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorl.errors import InfrastructureError

SPARE_S = 60.0  # torch's own time limit ends the process without a word; ours comes first


class Group(Protocol):
    """This process among its peers. All ranks make the same calls in the same order; `call` names one in errors.

    Attributes:
        rank: of this process, 0 .. size-1.
        size: how many ranks there are.
    """

    rank: int
    size: int

    def sum_(self, values: Tensor, call: str) -> None:
        """Replaces `values` by its sum over ranks, the same bits on each.

        Raises InfrastructureError, here as below, when a rank is lost or does not come within the time limit.
        """
        ...

    def gather(self, value: Any, call: str) -> list[Any]:
        """Every rank's `value` (JSON), by rank."""
        ...

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: float, call: str) -> float:
        """Replaces each gradient by its sum over ranks, and returns the sum of `loss`. A parameter that has no gradient
        on any rank keeps none."""
        ...

    def drain(self) -> None:
        """This rank has no more passes to make in this phase. Returns when no rank has, where passes are collective."""
        ...


class Alone:
    """The group of a run in one process."""

    rank = 0
    size = 1

    def sum_(self, values: Tensor, call: str) -> None:
        """Nothing to add."""

    def gather(self, value: Any, call: str) -> list[Any]:
        return [value]

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: float, call: str) -> float:
        return loss

    def drain(self) -> None:
        """Nobody to wait for."""


class Ranks:
    """A `Group` over torch.distributed's default process group, which must handle CPU tensors too.

    Args:
        store: a torch.distributed Store, shared by the ranks. Each writes what call it is in, so that who waits in vain
            can say for whom.
        limit_s: how long a call waits for the other ranks.

    Attributes:
        follow: what `drain` does; set where the base is sharded (`lorl.parallel.lockstep`).
    """

    def __init__(self, store: Any, limit_s: float) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._store = store
        self._limit_s = limit_s
        self._calls = 0
        self.follow: Callable[[], None] = lambda: None

    def sum_(self, values: Tensor, call: str) -> None:
        self._calls += 1
        started = time.monotonic()
        try:
            self._store.set(_key(self.rank), f"{self._calls} {call}")
            work: Any = dist.all_reduce(values, async_op=True)
            work.wait(timedelta(seconds=self._limit_s))
        except RuntimeError as error:
            raise InfrastructureError(self._why(call, time.monotonic() - started, error)) from None

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
        flat = torch.cat([*(piece.reshape(-1) for piece in pieces), present, present.new_tensor([loss])])
        del pieces
        self.sum_(flat, call)
        *sums, present, total = flat.split([*(p.numel() for p in parameters), len(parameters), 1])
        for parameter, found, ranks in zip(parameters, sums, present.tolist(), strict=True):
            parameter.grad = found.view_as(parameter) if ranks else None
        return float(total)

    def drain(self) -> None:
        self.follow()

    def _why(self, call: str, waited: float, error: RuntimeError) -> str:
        """Who is missing, as far as the store tells."""
        what = f"rank {self.rank} waited {waited:.1f} s in {call!r} (its collective call {self._calls})"
        try:
            behind = [text for rank in range(self.size) if (text := self._behind(rank)) is not None]
        except RuntimeError:  # the store went with rank 0
            behind = ["rank 0 is gone"]
        reason = str(error).splitlines()[0][:200]
        limit = f"; the limit is parallel.collective_limit_s={self._limit_s:g}" if waited >= self._limit_s else ""
        return f"{what}: {'; '.join(behind) or reason}{limit}"

    def _behind(self, rank: int) -> str | None:
        if not self._store.check([_key(rank)]):
            return f"rank {rank} never came to any"
        number, _, call = self._store.get(_key(rank)).decode().partition(" ")
        return f"rank {rank} did not come, its last was {call!r} ({number})" if int(number) < self._calls else None


def _key(rank: int) -> str:
    return f"lorl/call/{rank}"
