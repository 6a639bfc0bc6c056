"""Where algorithms are registered by name: the built-in ones, and a user's own through the same decorators.

    from lorl.algorithms.registry import advantage

    @advantage("centred", source="ours")
    def centred(inputs, *, shift: float = 0.0):
        "A_i = R_i - mean(R) - shift"
        ...

A function's keyword-only parameters are the settings that it reads: `entry(..., settings=mapping)` passes those of the
mapping's entries that the function names, and its defaults hold for the rest.

What is registered is looked up in `lorl.algorithms.catalogue`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from lorl.algorithms import names
from lorl.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorl.algorithms.inputs import AdvantageInputs
    from lorl.experience import Sampled


class Estimate(NamedTuple):
    """What an advantage estimator gives."""

    advantages: "Tensor"  # float[M]
    returns: "Tensor | None"  # float[M], the critic's target; None where there is no critic


class LossTerms(NamedTuple):
    """What a policy loss gives, both without aggregation."""

    loss: "Tensor"  # float[M]
    metrics: "dict[str, Tensor]"  # name -> float[M]; its mean over the global minibatch's tokens is what is logged


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A registered function with what people and the trainer need to know of it."""

    name: str
    function: Callable[..., Any]
    source: str  # paper and equation

    @property
    def summary(self) -> str:
        """The docstring's first line."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings that the function reads."""
        return _keyword_only(self.function)


@dataclass(frozen=True, kw_only=True)
class AdvantageEntry(Entry):
    """An advantage estimator. `needs` names the optional fields of AdvantageInputs that must be filled in, and
    `min_group` the samples a prompt below which it has no gradient (unless group_of_one="reward")."""

    needs: tuple[str, ...] = ()
    min_group: int = 1

    def check_group(self, n: int, settings: Mapping[str, Any]) -> None:
        """Raises UserError where `n` samples a prompt leave this estimator nothing to compare."""
        bare = "group_of_one" in self.settings and settings.get("group_of_one") == "reward"
        if n >= self.min_group or bare:
            return
        way_out = " or algorithm.group_of_one=reward" if "group_of_one" in self.settings else ""
        raise UserError(
            f"algorithm.advantage={self.name} compares the answers to one prompt and learns nothing from "
            f"rollout.n={n}; use rollout.n={self.min_group} or more{way_out}"
        )

    def __call__(self, inputs: "AdvantageInputs", settings: Mapping[str, Any]) -> Estimate:
        """Advantages of a whole step's batch. Raises UserError where the batch lacks what the estimator needs."""
        missing = [need for need in self.needs if getattr(inputs, need) is None]
        if missing:
            raise UserError(f"advantage {self.name!r} needs {', '.join(missing)}, which this batch does not carry")
        result = self.function(inputs, **_chosen(self.function, settings))
        return Estimate(*result) if isinstance(result, tuple) else Estimate(result, None)


@dataclass(frozen=True, kw_only=True)
class PolicyLossEntry(Entry):
    """A policy loss. `aggregation`, where not None, replaces the configured mode.

    A loss whose terms depend on statistics of the whole minibatch has a `prepare` stage, run once a minibatch before it
    is cut into micro-batches: the gradient then does not depend on the cut. Its result, bool[M], comes back to the loss
    as `selected`, cut like every other array over M.

    With `moves_without_advantage`, a sequence whose advantages are all zero has a gradient nonetheless.
    """

    aggregation: str | None = None
    moves_without_advantage: bool = False
    prepare: "Callable[..., Tensor] | None" = None

    def select(
        self,
        logprobs: "Tensor",
        old_logprobs: "Tensor",
        advantages: "Tensor",
        layout: "Sampled",
        settings: Mapping[str, Any],
        generator: "torch.Generator | None" = None,
    ) -> "Tensor | None":
        """bool[M], the tokens that this loss treats apart; None for a loss without a `prepare` stage."""
        if self.prepare is None:
            return None
        chosen = _chosen(self.prepare, settings)
        return self.prepare(logprobs, old_logprobs, advantages, layout, generator=generator, **chosen)

    def __call__(
        self,
        logprobs: "Tensor",
        old_logprobs: "Tensor",
        advantages: "Tensor",
        layout: "Sampled",
        settings: Mapping[str, Any],
        selected: "Tensor | None" = None,
    ) -> LossTerms:
        """The loss of each token of a micro-batch, whole sequences of it."""
        chosen = _chosen(self.function, settings)
        if self.prepare is not None:
            if selected is None:
                raise ValueError(f"policy loss {self.name!r} needs the result of its select()")
            chosen["selected"] = selected
        return LossTerms(*self.function(logprobs, old_logprobs, advantages, layout, **chosen))


@dataclass(frozen=True, kw_only=True)
class KLEntry(Entry):
    """A KL estimator on log-probabilities, or (`needs_logits`) on the two policies' logits."""

    needs_logits: bool = False

    def __call__(self, policy: "Tensor", reference: "Tensor") -> "Tensor":
        """KL of each token, float[M], from float[M] log-probabilities (or float[M, V] logits)."""
        return self.function(policy, reference)


EntryT = TypeVar("EntryT", bound=Entry)


class Registry(Generic[EntryT]):
    """Entries of one kind by name."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, EntryT] = {}

    def add(self, entry: EntryT) -> None:
        if entry.name in self._entries or entry.name in names.ALIASES:
            raise UserError(f"{self.kind} {entry.name!r} is registered already; give yours another name")
        self._entries[entry.name] = entry

    def get(self, name: str) -> EntryT:
        """The entry called `name`, or its verl name. Raises UserError with the nearest name."""
        entry = self._entries.get(names.ALIASES.get(name, name))
        if entry is None:
            raise UserError(f"there is no {self.kind} {name!r}; {nearest(name, self._entries)}")
        return entry

    def __iter__(self) -> Iterator[EntryT]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))


ADVANTAGES: Registry[AdvantageEntry] = Registry("advantage")
POLICY_LOSSES: Registry[PolicyLossEntry] = Registry("policy loss")
KL_ESTIMATORS: Registry[KLEntry] = Registry("KL estimator")


def advantage(
    name: str, *, source: str = "", needs: tuple[str, ...] = (), min_group: int = 1
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers `fn(inputs, *, settings…) -> float[M]`, or `(advantages, returns)` where it trains a critic."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ADVANTAGES.add(AdvantageEntry(name=name, function=function, source=source, needs=needs, min_group=min_group))
        return function

    return register


def policy_loss(
    name: str,
    *,
    source: str = "",
    aggregation: str | None = None,
    prepare: "Callable[..., Tensor] | None" = None,
    moves_without_advantage: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers `fn(logprobs, old_logprobs, advantages, layout, *, settings…) -> (loss[M], metrics)`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        POLICY_LOSSES.add(
            PolicyLossEntry(
                name=name,
                function=function,
                source=source,
                aggregation=aggregation,
                prepare=prepare,
                moves_without_advantage=moves_without_advantage,
            )
        )
        return function

    return register


def kl(
    name: str, *, source: str = "", needs_logits: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers `fn(logprobs[M], ref_logprobs[M]) -> float[M]`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        KL_ESTIMATORS.add(KLEntry(name=name, function=function, source=source, needs_logits=needs_logits))
        return function

    return register


def _keyword_only(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def _chosen(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in _keyword_only(function) if name in settings}
