"""What can be chosen by name: every algorithm that is registered, the built-in ones among them.

The modules of the built-in ones, which load torch, are imported when something is first looked up.
"""

import importlib
from typing import Any, NamedTuple

from lorl.algorithms.registry import (
    ADVANTAGES,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    AdvantageEntry,
    EntryT,
    KLEntry,
    PolicyLossEntry,
    Registry,
)

_BUILTIN_MODULES = (
    "advantages",
    "returns",
    "token_baselines",
    "policy_losses",
    "sequence_losses",
    "covariance_losses",
    "kl",
)


def filled(registry: Registry[EntryT]) -> Registry[EntryT]:
    """`registry`, with the built-in algorithms in it."""
    for module in _BUILTIN_MODULES:
        importlib.import_module(f"lorl.algorithms.{module}")
    return registry


def get_advantage(name: str) -> AdvantageEntry:
    return filled(ADVANTAGES).get(name)


def get_policy_loss(name: str) -> PolicyLossEntry:
    return filled(POLICY_LOSSES).get(name)


def get_kl(name: str) -> KLEntry:
    """The estimator called `name`; a trailing "+" gives its straight-through form (see `kl.straight_through`)."""
    estimators = filled(KL_ESTIMATORS)
    if not name.endswith("+"):
        return estimators.get(name)
    from lorl.algorithms.kl import straight_through

    return straight_through(estimators.get(name[:-1]))


class Listing(NamedTuple):
    """A line of `lorl algorithms`."""

    kind: str
    key: str  # what is set to `name` to choose it
    name: str
    summary: str
    source: str


def available() -> list[Listing]:
    """Everything that can be chosen by name, built-in and the user's, for `lorl algorithms`."""
    from lorl.algorithms import aggregation, correction
    from lorl.algorithms.kl import straight_through

    registries: tuple[tuple[str, Registry[Any]], ...] = (
        ("algorithm.advantage", filled(ADVANTAGES)),
        ("algorithm.policy_loss", filled(POLICY_LOSSES)),
        ("algorithm.kl_estimator", filled(KL_ESTIMATORS)),
    )
    entries = [(each.kind, key, entry) for key, each in registries for entry in each]
    # k2's straight-through form is k2
    carried = [straight_through(each) for each in KL_ESTIMATORS if not each.needs_logits and each.name != "k2"]
    entries += [(KL_ESTIMATORS.kind, "algorithm.kl_estimator", entry) for entry in carried]
    found = [Listing(kind, key, entry.name, entry.summary, entry.source) for kind, key, entry in entries]
    found += [
        Listing("aggregation", "algorithm.aggregation", name, mode.summary, mode.source)
        for name, mode in aggregation.MODES.items()
    ]
    found += [
        Listing("correction", "correction.preset", name, correction.describe(preset), correction.source_of(preset))
        for name, preset in correction.PRESETS.items()
    ]
    dapo = "clips higher than low, averages over tokens, refills groups without a gradient, and prices length"
    return [*found, Listing("preset", "algorithm.preset", "dapo", dapo, "Yu et al. 2025, arXiv 2503.14476")]
