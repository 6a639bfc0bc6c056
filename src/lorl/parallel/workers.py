"""What the trainer asks of the processes that hold the model. It cannot tell one process from many GPUs."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lorl.experience import Completion, Experience
from lorl.rollout.engine import Request, Sampling


@dataclass(slots=True)
class WorkerState:
    """All that a checkpoint needs of the workers, on the CPU."""

    adapters: dict[str, tuple[dict[str, Tensor], dict[str, Any]]]  # name -> (tensors, adapter_config.json)
    optimizer: dict[str, Tensor]  # the policy's by its tensors' names; the critic's below "critic/"
    scalars: dict[str, Any] = field(default_factory=dict)  # JSON: adapter version, base fingerprint


@dataclass(slots=True)
class UpdateReport:
    """What an update did. `metrics` are means over the trained tokens of the global batch."""

    metrics: dict[str, float]
    skipped: str | None = None  # why no optimizer step was taken in (part of) this update
    trained_tokens: int = 0  # packed tokens that went through forward and backward
    mismatch: float | None = None  # mean |log-probability difference| of trainer and engine before the first step
    mismatch_max: float = 0.0


class Workers(Protocol):
    @property
    def reference(self) -> str | None:
        """The adapter that KL is measured against; None is the base."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None
    ) -> Generator[Completion]:
        """Completions as they finish, from the published adapter or the base."""
        ...

    def logprobs(self, experience: Experience, *, adapter: str | None) -> Tensor:
        """float32[M] on the CPU, without gradient."""
        ...

    def logprobs_and_squares(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """The trained adapter's log-probabilities, and the sums over the vocabulary of its squared probabilities."""
        ...

    def full_kl(self, experience: Experience) -> Tensor:
        """float32[M] on the CPU: the trained adapter's exact KL divergence from the reference, over the vocabulary."""
        ...

    def values(self, experience: Experience) -> Tensor:
        """float32[M] on the CPU: the critic's value of the state before each sampled token."""
        ...

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """The reward model's score of each answer. Answers to one prompt are adjacent."""
        ...

    def update(self, experience: Experience, *, step: int, total_steps: int, kl_coef: float) -> UpdateReport:
        """Optimizer steps over the experience's minibatches and epochs: the policy's, and the critic's where there is
        one. Raises DivergedError when engine and trainer disagree past `rollout.max_mismatch`: nothing was trained."""
        ...

    def publish(self) -> int:
        """Hands the trained adapter to the engine under a new version, which it returns."""
        ...

    def save(self) -> WorkerState: ...

    def load(self, state: WorkerState, origin: str) -> None: ...

    def close(self) -> None: ...
