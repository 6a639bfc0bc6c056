"""What flows through a training step: Prompt -> Completion -> Graded -> Experience.

A batch is a forest of segments (a prompt, and the completions that hang off it), flat and unpadded. Two kinds of array
describe it:

* over all T tokens of the forest: what the model reads (`tokens`, `positions`, `previous`);
* over the M tokens that the policy sampled, in forest order: everything that the algorithms compute with. Prompt and
  tool tokens have no log-probability, advantage or loss, so they have no slot either; no formula needs a mask.

Suffixes in shapes: T tokens, N segments, M sampled tokens, S sequences (samples), G groups (prompts).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised, with what its reward needs to know."""

    id: str  # stable across runs and orders: it seeds the sampling of this prompt's completions
    tokens: list[int]
    text: str  # the rendered prompt, for people
    data_source: str = ""  # picks the built-in reward, as in verl
    ground_truth: Any = None
    extra_info: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)  # for a reward model with a chat template of its own


Finish = Literal["stop", "length", "failed"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. `logprobs[i]` is the engine's log-probability of `tokens[i]` at the sampling temperature,
    before top-k, top-p and min-p."""

    prompt: Prompt
    sample: int  # 0 .. n-1 within the prompt's group
    tokens: list[int]  # with the end-of-sequence token where the model gave one
    logprobs: list[float]
    text: str  # without special tokens and without the stop string
    finish: Finish
    version: int  # of the adapter that produced it


OutcomeStatus = Literal["ok", "raised", "timeout", "memory", "crashed", "invalid", "lost"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What grading a completion came to. A failure is an outcome of its own, never a reward of zero."""

    status: OutcomeStatus
    reward: float | None = None  # None unless status is "ok"
    detail: str = ""  # one line for people when status is not "ok"
    extras: dict[str, float | str] = field(default_factory=dict)  # a dict reward's other entries
    seconds: float = 0.0


@dataclass(slots=True)
class Sampled:
    """Which sequence and group each of the M sampled tokens belongs to: the layout that algorithms read.

    Tokens of one sequence are adjacent and in order, and `sequence` does not decrease. A sequence may own no token
    at all (fully masked), a group may hold a single sequence.
    """

    sequence: Tensor  # int64[M], 0 .. S-1
    group: Tensor  # int64[S], 0 .. G-1

    @property
    def num_sequences(self) -> int:
        return self.group.numel()

    @property
    def num_tokens(self) -> int:
        return self.sequence.numel()

    def lengths(self) -> Tensor:
        """int64[S]: sampled tokens in each sequence."""
        return torch.bincount(self.sequence, minlength=self.num_sequences)


@dataclass(slots=True)
class Forest:
    """The packed tokens that one forward pass reads. A token attends to its segment's ancestors and to its own
    segment up to itself."""

    tokens: Tensor  # int64[T]
    positions: Tensor  # int64[T]; a completion goes on where its parent ends
    segments: Tensor  # int32[N+1], offsets into the T tokens
    parent: Tensor  # int32[N], the segment that this one continues; -1 at a root. A parent comes before its children
    previous: Tensor  # int64[T], the token before this one (across the join for a segment's first token); -1 at a root
    sampled: Tensor  # int64[M], where each sampled token lies; samples that begin alike share tokens, so it can repeat

    def distinct(self) -> tuple[Tensor, Tensor]:
        """int64[U], the sampled tokens without repetition, ascending; int64[M], where among them each one is."""
        return torch.unique(self.sampled, return_inverse=True)

    def to(self, device: torch.device | str) -> "Forest":
        return Forest(**{name: getattr(self, name).to(device) for name in self.__slots__})


@dataclass(slots=True)
class Experience:
    """A batch of graded samples, packed. Arrays over M are None until something computes them."""

    forest: Forest
    layout: Sampled
    leaf: Tensor  # int64[S], each sequence's last segment: it and its ancestors hold the sequence's tokens
    rewards: Tensor  # float32[S]; NaN where the sample was not graded (it then takes no part in baselines or loss)
    rollout_logprobs: Tensor  # float32[M]
    version: int  # of the adapter that sampled it
    old_logprobs: Tensor | None = None  # float32[M], under the policy at the step's start
    ref_logprobs: Tensor | None = None  # float32[M]
    values: Tensor | None = None  # float32[M]
    advantages: Tensor | None = None  # float32[M]
    returns: Tensor | None = None  # float32[M]
    weights: Tensor | None = None  # float32[M], rollout correction's factors of the policy loss; None: ones
    kept: Tensor | None = None  # bool[M], tokens that rollout correction leaves in the loss; None: all
    selected: Tensor | None = None  # bool[M], tokens that the policy loss treats apart


COMPUTED = (
    "old_logprobs",
    "ref_logprobs",
    "values",
    "advantages",
    "returns",
    "weights",
    "kept",
    "selected",
)  # the arrays over M that an Experience may lack
