"""A vLLM engine with a copy of the base of its own, in parts over several ranks, beside a trainer that has other parts.

The copy is the trainer's base, tensor by tensor, and nothing is read a second time.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from lorl.config import RunConfig
from lorl.policy.policy import Policy
from lorl.policy.shards import Sharers
from lorl.rollout.vllm import loader
from lorl.rollout.vllm.engine import VllmEngine
from lorl.rollout.vllm.opening import open_together
from lorl.rollout.vllm.versions import Inside


class Trainer(Protocol):
    """The trainer's side of such a layout. All ranks make the same calls at the same time."""

    def held_bytes(self, model: PreTrainedModel) -> int:
        """What this rank's device will hold of `model`, whose parameters are on the meta device."""
        ...

    def load(self) -> Policy: ...

    def wholes(self, policy: Policy) -> Iterable[tuple[str, Tensor]]:
        """Each of the base's tensors in turn, whole on its device, by the base's own name."""
        ...


def policy_and_engine(
    config: RunConfig, trainer: Trainer, tell: Callable[[str], None], sharers: Sharers
) -> tuple[Policy, VllmEngine]:
    """The trainer's policy, and one vLLM of all `sharers` beside it. `tell` gets what the copy costs.

    Raises:
        UserError: vLLM or its version is not at hand, the memory does not suffice, or vLLM does not compute this base
            in parts, or this kind of adapter.
    """
    opening = open_together(config, sharers)
    policy = trainer.load()
    held = trainer.held_bytes(opening.model)
    tell(
        f"the base is in memory twice, {held / 2**20:,.1f} MiB more on each rank than with parallel.strategy=shared: "
        f"one vLLM over {sharers.size} ranks has a copy beside the trainer's parts"
    )
    fresh = partial(_start, opening.start, partial(trainer.wholes, policy))
    inside = fresh()
    try:
        return policy, opening.engine(inside, policy, fresh)
    except BaseException:
        inside.shut_down(resting=False)
        raise


def _start(start: Callable[..., Inside], wholes: Callable[[], Iterable[tuple[str, Tensor]]]) -> Inside:
    """vLLM on a new copy of the trainer's base."""
    with loader.copying(wholes):
        return start(load_format=loader.FORMAT)
