"""From a loss per token to the scalar that is differentiated, normalised by the global minibatch.

The divisors are `Totals` over all ranks and micro-batches, so `aggregate` of each micro-batch (whole sequences) adds up
to `aggregate` of the minibatch, and so do the gradients. (verl's FSDP actor divides by the micro-batch's own tokens,
and its gradient changes with the micro-batch size.)

Tokens that take no part, those of ungraded samples and those that rollout correction rejects, are dropped from all
arrays over M before a loss sees them (`keep_tokens`): what is left needs no mask, and sequence lengths count what is
left.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorl.algorithms.segments import sum_by
from lorl.errors import UserError, nearest
from lorl.experience import Sampled


class Mode(NamedTuple):
    summary: str
    source: str


MODES = {
    "token-mean": Mode("sum of all tokens / tokens", "DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 8 and 12"),
    "token-sum": Mode("sum of all tokens", "the policy gradient of a whole batch"),
    "seq-mean-token-sum": Mode("sum of all tokens / sequences", "REINFORCE, Williams 1992"),
    "seq-mean-token-mean": Mode(
        "sum of each sequence's mean / sequences", "GRPO, Shao et al. 2024, arXiv 2402.03300, eq. 3"
    ),
    "seq-mean-token-sum-norm": Mode(
        "sum of all tokens / (a constant length x sequences)", "Dr. GRPO, Liu et al. 2025, arXiv 2503.20783"
    ),
}


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over the global minibatch, of what takes part in the loss. Add the ranks' totals."""

    tokens: int
    sequences: int  # with at least one token

    @classmethod
    def of(cls, layout: Sampled, kept: Tensor | None = None) -> "Totals":
        """Counts in `layout`, or of its tokens that `kept`, bool[M], picks."""
        if kept is not None:
            layout = keep_tokens(layout, kept)
        return cls(tokens=layout.num_tokens, sequences=int((layout.lengths() > 0).sum()))

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.tokens + other.tokens, self.sequences + other.sequences)


def graded_tokens(rewards: Tensor, layout: Sampled) -> Tensor:
    """bool[M]: tokens of graded samples, from `rewards[S]` with NaN where a sample was not graded."""
    return ~torch.isnan(rewards)[layout.sequence]


def keep_tokens(layout: Sampled, kept: Tensor) -> Sampled:
    """The layout of the tokens that `kept`, bool[M], picks; sequences and groups keep their numbers."""
    return Sampled(sequence=layout.sequence[kept], group=layout.group)


def aggregate(per_token: Tensor, layout: Sampled, mode: str, totals: Totals, norm: float | None = None) -> Tensor:
    """A scalar from `per_token[M]`; sums over micro-batches to the value of the global minibatch.

    Tokens and sequences are counted by `totals`; `norm` is the constant length of seq-mean-token-sum-norm, where verl
    did not divide by the sequences before 2026.

    Without tokens the result is zero. Raises UserError for an unknown mode.
    """
    sequences = max(totals.sequences, 1)
    match mode:
        case "token-mean":
            return per_token.sum() / max(totals.tokens, 1)
        case "token-sum":
            return per_token.sum()
        case "seq-mean-token-sum":
            return per_token.sum() / sequences
        case "seq-mean-token-mean":
            means = sum_by(per_token, layout.sequence, layout.num_sequences) / layout.lengths().clamp(min=1)
            return means.sum() / sequences
        case "seq-mean-token-sum-norm":
            if norm is None or norm <= 0:
                raise ValueError(f"aggregation {mode!r} needs a positive norm, not {norm}")
            return per_token.sum() / (norm * sequences)
    raise UserError(f"there is no aggregation {mode!r}; {nearest(mode, MODES)}")
