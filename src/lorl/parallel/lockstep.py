"""Equal numbers of passes on every rank, where a pass is collective: a sharded base is gathered by all ranks at once.

Ranks have different numbers of micro-batches, prompts and tokens to decode. Before each pass over the base they agree
on what kind it is; a rank that is done with a phase keeps the others company with passes over a single token until all
are done.
"""

from typing import Any

import torch
from torch import nn

from lorl.experience import Forest
from lorl.parallel.group import Group
from lorl.policy.attention import ForestAttention
from lorl.policy.policy import Policy

IDLE, FORWARD, BACKWARD = range(3)


class Lockstep:
    """Hooks onto the decoder, so that whatever passes over it is in step. All ranks make one at the same time."""

    def __init__(self, group: Group, policy: Policy, decoder: nn.Module) -> None:
        self._group = group
        self._policy = policy
        self._following = False
        decoder.register_forward_pre_hook(self._before_pass)

    def drain(self) -> None:
        """Follows the other ranks' passes until all ranks have come here."""
        while (kind := self._agree(IDLE)) != IDLE:
            self._following = True
            try:
                self._follow(kind)
            finally:
                self._following = False

    def _before_pass(self, *_: Any) -> None:
        if not self._following:
            self._agree(BACKWARD if torch.is_grad_enabled() else FORWARD)

    def _agree(self, kind: int) -> int:
        kinds = torch.zeros(3, dtype=torch.int32)
        kinds[kind] = 1
        self._group.sum_(kinds, "pass")
        return int(kinds.nonzero().max())

    def _follow(self, kind: int) -> None:
        device = self._policy.device
        token = torch.zeros(1, dtype=torch.int64, device=device)
        forest = Forest(
            tokens=token,
            positions=token,
            segments=torch.tensor([0, 1], dtype=torch.int32),
            parent=torch.tensor([-1], dtype=torch.int32),
            previous=token - 1,
            sampled=token[:0],
        )
        with torch.set_grad_enabled(kind == BACKWARD):
            hidden = self._policy.hidden(ForestAttention(forest), token, token, adapter=self._policy.trained)
        if kind == BACKWARD:
            (hidden.sum() * 0).backward()
