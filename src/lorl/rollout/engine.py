"""The protocol that every rollout engine meets."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lorl.experience import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. The truncations apply in the order top_k, top_p, min_p, each to what the last one left."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # -1 or 0: off
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)
    max_tokens: int = 512
    ignore_eos: bool = False  # go on to max_tokens whatever the model says: work of a fixed size, for measurements

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and the seeds of the completions wanted from it, one a sample."""

    prompt: Prompt
    seeds: list[int]


class Engine(Protocol):
    """Samples from the base or from a published adapter."""

    def publish(self, name: str, version: int, checksum: str) -> float:
        """Makes adapter `name` as it is now available as `version`. `checksum` is the trainer's of what it holds;
        an engine that ends up with anything else raises InfrastructureError. Returns the seconds that it took before
        the proof of it."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None
    ) -> Generator[Completion]:
        """Yields completions as they finish, in any order. `adapter=None` samples from the base."""
        ...

    def rest(self) -> None:
        """Gives the KV cache's memory back. The base does not move."""
        ...

    @property
    def resting_bytes(self) -> int:
        """GPU memory that `rest` gave back and torch still counts as allocated."""
        ...

    def wake(self) -> None:
        """Takes it again. `generate` does so by itself."""
        ...

    def rebuild(self) -> None:
        """After `generate` or `publish` raised: a fresh engine over the same weights. Nothing is published to it."""
        ...

    def close(self) -> None: ...
