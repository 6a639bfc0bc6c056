"""What a verl command line says: every key's value, given or verl's default, and what has to be said about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from lorl import schema, settings
from lorl.errors import UserError, nearest
from lorl.verl.rows import Row
from lorl.verl.table import KEYS, ROWS, TABLE, find

# Names that verl knows and lorl does not, for sentences that say more than what is valid.
_VERLS_ALONE = {
    "ppo": "PPO's estimator is gae",
    "megatron": "lorl has no Megatron",
    "veomni": "lorl has no VeOmni",
    "torchtitan": "lorl has no TorchTitan",
    "mindspeed": "lorl has no MindSpeed",
    "sglang": "lorl has no SGLang engine (docs/engines.md says what one needs)",
    "trtllm": "lorl has no TensorRT-LLM engine",
    "npu": "lorl runs on CUDA and CPU",
    "middle": "lorl cuts prompts at one end",
    "full": "lorl keeps log-probabilities, not logits (nor does verl have it)",
    "full+": "lorl keeps log-probabilities, not logits (nor does verl have it)",
    "bypass_mode": "set algorithm.rollout_correction.bypass_mode=True",
    "prime": "lorl has no PRIME manager",
    "remote": "lorl has no remote manager",
    "rate_limited": "lorl has no rate-limited manager",
    "float16": "lorl trains in bfloat16 or float32",
    "half": "lorl trains in bfloat16 or float32",
}


Lorl = dict[str, Any]  # dotted lorl keys


@dataclass(frozen=True, slots=True)
class Given:
    """A key that the command line sets."""

    spelling: str  # as it was written
    value: Any


@dataclass(slots=True)
class Values:
    """All of verl's keys by their row's key; `given` are those on the command line."""

    given: dict[str, Given] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    without_effect: dict[str, list[str]] = field(default_factory=dict)  # reason -> keys as they were written

    def __getitem__(self, key: str) -> Any:
        return self.given[key].value if key in self.given else ROWS[key].default

    def has(self, key: str) -> bool:
        return key in self.given

    def spelled(self, key: str) -> str:
        """`key=value` as the user wrote the key; with "(verl's default)" where they did not."""
        if ROWS[key].prefix is not None:
            return self.given[key].spelling
        if key in self.given:
            return f"{self.given[key].spelling}={schema.shown(self.given[key].value)}"
        return f"{key}={schema.shown(ROWS[key].default)} (verl's default)"

    def fail(self, key: str, why: str) -> NoReturn:
        raise UserError(f"{self.spelled(key)}: {why}")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def idle(self, why: str, *keys: str) -> None:
        """Says that those of `keys` that were given have no effect, and why."""
        if names := [self.given[key].spelling for key in keys if key in self.given]:
            self.without_effect.setdefault(why, []).extend(names)

    def log(self) -> list[str]:
        """Lines for the run's log."""
        return [
            *self.notes,
            *(f"without effect here: {', '.join(k)} ({why})" for why, k in self.without_effect.items()),
        ]


def read(words: Sequence[str]) -> Values:
    """The command line's keys, found in the table, with `${...}` resolved and types checked. Raises UserError."""
    parser = OverridesParser.create()
    values = Values()
    for word in words:
        override = settings.parse_override(word, parser)
        if override.delete:
            _delete(values.given, override.key)
            continue
        for key, value in _leaves(override.key, override.value):
            if value in (None, {}) and _is_section(key):
                continue  # as in algorithm.filter_groups=null: nothing of it is set
            row, below = _row(key)
            if row.prefix is not None:
                _set_below(values.given, row, key, below, value)
            else:
                _set(values.given, row, key, _as_text(row, value, override.text))
    _resolve(values)
    for key, given in values.given.items():
        values.given[key] = Given(given.spelling, _checked(ROWS[key], given))
    return values


def _leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    """`a={b:1,c:2}` as a.b and a.c."""
    if isinstance(value, dict) and value:
        return [leaf for name, item in value.items() for leaf in _leaves(f"{key}.{name}", item)]
    return [(key, value)]


def _is_section(key: str) -> bool:
    return find(key) is None and any(name.startswith(f"{key}.") for name in KEYS)


def _row(key: str) -> tuple[Row, str]:
    if found := find(key):
        return found
    close = schema.closest_keys(key, [name.removesuffix(".*") for name in KEYS])[:2]
    hint = "did you mean " + " or ".join(map(repr, close)) + "?" if close else "docs/from-verl.md lists verl's keys"
    raise UserError(f"unknown key {key!r}; {hint}")


def _delete(given: dict[str, Given], key: str) -> None:
    """`~key`, of one key or of a section: verl's defaults hold again."""
    if not _is_section(key):
        given.pop(_row(key)[0].key, None)
        return
    for name in [name for name, item in given.items() if item.spelling.startswith(f"{key}.")]:
        del given[name]


def _set(given: dict[str, Given], row: Row, key: str, value: Any) -> None:
    former = given.get(row.key)
    if former is not None and former.spelling != key and former.value != value:
        raise UserError(
            f"{former.spelling}={schema.shown(former.value)} and {key}={schema.shown(value)} are two spellings of "
            "one key; keep one of them"
        )
    given[row.key] = Given(key, value)


def _set_below(given: dict[str, Given], row: Row, key: str, below: str, value: Any) -> None:
    """Sets `below` in the mapping of a row for `a.b.*`; "" is the mapping itself, which can only be emptied."""
    former = given.get(row.key)
    tree = former.value if former else {}
    if below:
        *path, last = below.split(".")
        leaf = tree
        for part in path:
            leaf = leaf.setdefault(part, {})
            if not isinstance(leaf, dict):
                raise UserError(f"{key}={schema.shown(value)}: {part} is {schema.shown(leaf)} already, no mapping")
        leaf[last] = value
    elif value not in ({}, None):
        raise UserError(f"{key}={schema.shown(value)}: expected a mapping")
    given[row.key] = Given(f"{former.spelling}, {key}" if former else key, tree)


def _as_text(row: Row, value: Any, text: str) -> Any:
    """trainer.experiment_name=1e5 is a name, as it was written."""
    if row.type in (str, str | None) and isinstance(value, int | float) and not isinstance(value, bool):
        return text
    return value


def _resolve(values: Values) -> None:
    """Replaces `${other.key}` by that key's value, given or default."""
    if not any("${" in str(given.value) for given in values.given.values()):
        return
    tree = OmegaConf.create({})
    for row in TABLE:
        if row.prefix is None:
            for spelling in (row.key, *row.spellings):
                OmegaConf.update(tree, spelling, values[row.key], force_add=True)
    for key, given in values.given.items():
        node = OmegaConf.create({"value": given.value})
        try:
            holder = OmegaConf.merge(tree, {"_": node})
            resolved = OmegaConf.to_container(holder._, resolve=True)
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{values.spelled(key)}: cannot resolve ${{...}}: {reason}") from None
        assert isinstance(resolved, dict)
        values.given[key] = Given(given.spelling, resolved["value"])


def _checked(row: Row, given: Given) -> Any:
    if row.prefix is not None:
        return given.value
    try:
        return TypeAdapter(row.type).validate_python(given.value, strict=True)
    except ValidationError:
        raise UserError(_mismatch(row, given)) from None


def _mismatch(row: Row, given: Given) -> str:
    value, said = given.value, f"{given.spelling}={schema.shown(given.value)}"
    expected = schema.in_words(row.type)
    if isinstance(value, str) and value in _VERLS_ALONE:
        return f"{said}: {_VERLS_ALONE[value]}; expected {expected}"
    options = schema.options(row.type)
    if isinstance(value, str) and options:
        hint = nearest(value, options)
        return f"{said}: expected {expected}" + (f"; {hint}" if hint.startswith("did you") else "")
    return f"{said}: expected {expected}"


def as_tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
