"""What the policy's and the critic's passes over a batch share: how it is cut, one guarded step, running means."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lorl.experience import Experience, Forest
from lorl.packing import cut, select


@torch.no_grad()
def read_tokens(experience: Experience, budget: int, read: Callable[[Forest], Tensor]) -> Tensor:
    """float32[..., M] on the CPU: what `read` says of the sampled tokens, in micro-batches of `budget` packed tokens.

    `read` maps a forest with m sampled tokens to [..., m].
    """
    out = torch.empty(0)
    everything = torch.arange(experience.layout.num_sequences)
    for sequences in cut(experience, everything, budget):
        found = read(select(experience, sequences).forest).float().cpu()
        if not out.numel():
            out = torch.zeros(*found.shape[:-1], experience.layout.num_tokens)
        out[..., torch.isin(experience.layout.sequence, sequences)] = found
    return out


def minibatches(experience: Experience, prompts: int | None) -> list[Tensor]:
    """Sequences (int64, ascending) of each optimizer step: `prompts` whole groups, or all, in the batch's order."""
    group = experience.layout.group
    size = prompts or int(group.max()) + 1
    return [torch.nonzero(group // size == part).flatten() for part in torch.unique(group // size)]


def guarded_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], loss: float, max_norm: float | None
) -> tuple[Tensor, str | None]:
    """Clips the gradient and steps. Returns its norm (a scalar), and why no step was taken where it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    if torch.isfinite(norm) and torch.isfinite(torch.tensor(loss)):
        optimizer.step()
        return norm.detach().cpu(), None
    optimizer.zero_grad(set_to_none=True)
    return norm.detach().cpu(), f"loss {loss:.3g}, gradient norm {float(norm):.3g}"


class Means:
    """Running means of per-token metrics over micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: Tensor) -> None:
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + float(values.detach().double().sum()), count + values.numel()

    def values(self) -> dict[str, float]:
        return {name: total / max(count, 1) for name, (total, count) in self._sums.items()}
