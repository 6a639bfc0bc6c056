"""From verl's command line to lorl's configuration."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorl import schema, settings
from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.verl import objective, placement
from lorl.verl.table import ROWS, TABLE
from lorl.verl.values import Values, as_tree, read

_DECISIVE = (
    "actor_rollout_ref.model.path",
    "data.train_files",
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "algorithm.adv_estimator",
    "actor_rollout_ref.actor.optim.lr",
    "actor_rollout_ref.rollout.n",
    "trainer.total_epochs",
    "trainer.n_gpus_per_node",
)
OWN = "lorl."  # `+lorl.algorithm.reference=base` sets a key of lorl's that verl has not


@dataclass(frozen=True, slots=True)
class Translation:
    """A run in lorl's terms, and what its log has to say about verl's keys, a line each."""

    config: RunConfig
    notes: list[str]


def translate(words: Sequence[str]) -> Translation:
    """The run that `python -m verl.trainer.main_ppo WORDS...` would be.

    What the words leave out has verl's defaults (docs/from-verl.md names the few that have not). `+lorl.KEY=value` sets
    a key of lorl's own on top.

    Raises:
        UserError: an unknown key, with the nearest of verl's; a wrong value; keys that contradict each other; or what
            lorl does not do. One sentence, in verl's names.
    """
    own = [word.lstrip("+~") for word in words if word.lstrip("+~").startswith(OWN)]
    values = read([word for word in words if not word.lstrip("+~").startswith(OWN)])
    _refuse(values)
    for key in values.given:
        row = ROWS[key]
        if not (row.sets or row.joint or row.refused):
            values.idle(row.why, key)
    flat = _one_by_one(values)
    for group in (*placement.GROUPS, *objective.GROUPS):
        flat |= group(values)
    given = settings.overlay(as_tree(flat), settings.parse_values([word.removeprefix(OWN) for word in own]))
    with in_verls_names():
        config = settings.validate(given)
    return Translation(config, [*_defaults(values), *values.log()])


def _defaults(values: Values) -> list[str]:
    """verl's defaults that decide most, where the command line says nothing."""
    absent = [f"{key}={schema.shown(ROWS[key].default)}" for key in _DECISIVE if not values.has(key)]
    return [f"not given, so as in verl: {', '.join(absent)}"] if absent else []


def _refuse(values: Values) -> None:
    for key, given in values.given.items():
        row = ROWS[key]
        if row.prefix is not None and row.refused and given.value:
            raise UserError(f"{given.spelling}: {row.why}")
        if row.prefix is None and row.refused and given.value not in row.off:
            values.fail(key, row.why)


def _one_by_one(values: Values) -> dict[str, Any]:
    """lorl's keys from the rows that stand for themselves."""
    flat: dict[str, Any] = {}
    for row in TABLE:
        if row.sets and not row.joint and (values.has(row.key) or not row.only_given):
            value = values[row.key]
            flat |= dict.fromkeys(row.sets, row.convert(value) if row.convert else value)
    return flat


class in_verls_names:  # noqa: N801  (reads as a statement)
    """Adds verl's names of the lorl keys that a UserError mentions."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            raise type(error)(add_names(str(error))) from None


def add_names(message: str) -> str:
    """`message`, followed by what verl calls the lorl keys in it."""
    found: dict[str, list[str]] = {}
    for row in TABLE:
        for key in row.sets:
            if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", message) and row.key not in message:
                found.setdefault(key, []).append(row.key)
    names = "; ".join(f"{key} is {' or '.join(verls)}" for key, verls in found.items())
    return f"{message} (in verl's names: {names})" if names else message
