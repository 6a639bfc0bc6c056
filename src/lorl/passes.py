"""What the policy's and the critic's passes over a batch share: how it is split and cut, one guarded step, means."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorl.experience import Experience, Forest
from lorl.packing import cut, select
from lorl.parallel.group import Group
from lorl.parallel.split import share


def micro_batches(experience: Experience, sequences: Tensor, budget: int, group: Group) -> Iterator[Tensor]:
    """The share of `sequences` (int64, ascending) of this rank's part, cut into micro-batches of `budget` packed tokens
    a rank. Ends when all ranks have made their passes, where passes are collective."""
    together = group.size // group.parts  # ranks that split a pass among them
    yield from cut(experience, share(experience, sequences, group.part, group.parts), together * budget)
    group.drain()


@torch.no_grad()
def read_tokens(
    experience: Experience,
    budget: int,
    read: Callable[[Forest], Tensor],
    group: Group,
    call: str,
    *,
    rows: tuple[int, ...] = (),
) -> Tensor:
    """float32[*rows, M] on the CPU: what `read` says of the sampled tokens, in micro-batches of `budget` packed tokens.

    `read` maps a forest with m sampled tokens to [*rows, m]. Parts read a part each, and all ranks get the whole.
    """
    out = torch.zeros(*rows, experience.layout.num_tokens)
    everything = torch.arange(experience.layout.num_sequences)
    for sequences in micro_batches(experience, everything, budget, group):
        found = read(select(experience, sequences).forest).float().cpu()
        if group.leads:
            out[..., torch.isin(experience.layout.sequence, sequences)] = found
    group.sum_(out, call)
    return out


def minibatches(experience: Experience, prompts: int | None) -> list[Tensor]:
    """Sequences (int64, ascending) of each optimizer step: `prompts` whole groups, or all, in the batch's order."""
    group = experience.layout.group
    size = prompts or int(group.max()) + 1
    return [torch.nonzero(group // size == part).flatten() for part in torch.unique(group // size)]


@dataclass(frozen=True, slots=True)
class Step:
    """What an optimizer step over all ranks' gradients came to, the same on each."""

    loss: float
    norm: Tensor  # a scalar: the gradient's, before clipping
    problem: str | None  # why no step was taken


def guarded_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    loss: float,
    max_norm: float | None,
    group: Group,
    call: str,
) -> Step:
    """Sums the ranks' gradients and losses, clips the gradient, and steps where all of it is finite."""
    parameters = list(parameters)
    loss = group.sum_gradients(parameters, loss, call)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf")).detach().cpu()
    if torch.isfinite(norm) and torch.isfinite(torch.tensor(loss)):
        optimizer.step()
        return Step(loss, norm, None)
    optimizer.zero_grad(set_to_none=True)
    return Step(loss, norm, f"loss {loss:.3g}, gradient norm {float(norm):.3g}")


class Means:
    """Running means of per-token metrics over micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: Tensor) -> None:
        self._add(name, float(values.detach().double().sum()), values.numel())

    def over(self, group: Group) -> dict[str, float]:
        """The means over all ranks. What every rank added alike keeps its value."""
        whole = Means()
        for sums in group.gather(self._sums, "metrics"):
            for name, (total, count) in sums.items():
                whole._add(name, total, count)
        return {name: total / max(count, 1) for name, (total, count) in whole._sums.items()}

    def _add(self, name: str, total: float, count: int) -> None:
        before, counted = self._sums.get(name, (0.0, 0))
        self._sums[name] = before + total, counted + count
