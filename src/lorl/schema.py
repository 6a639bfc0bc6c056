"""The schema of `lorl.config`, flat: its dotted keys, what they take in a reader's words, and which is nearest."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorl.config import RunConfig


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


LEAVES: dict[str, FieldInfo] = dict(_leaves(RunConfig))
SECTIONS = list(dict.fromkeys(key.partition(".")[0] for key in LEAVES if "." in key))


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: lookup(tree, key) for key in LEAVES}


def lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def is_known(key: str) -> bool:
    """Whether `key` is a section, a leaf, or lies in a leaf that takes any mapping (such as reward.kwargs)."""
    if key in SECTIONS or key in LEAVES:
        return True
    return any(key.startswith(f"{leaf}.") and get_origin(field.annotation) is dict for leaf, field in LEAVES.items())


def takes_text(key: str) -> bool:
    annotation = LEAVES[key].annotation if key in LEAVES else None
    return annotation is str or (get_origin(annotation) in (Union, UnionType) and str in get_args(annotation))


def nearest_key(key: str) -> str:
    """A clause with the valid keys closest to `key`, or the valid ones of its section."""
    section = key.rpartition(".")[0]
    if found := closest_keys(key, [*LEAVES, *([] if section else SECTIONS)]):
        return "did you mean " + " or ".join(map(repr, found)) + "?"
    inside = [leaf for leaf in LEAVES if leaf.startswith(f"{section}.")]
    return "valid: " + ", ".join(inside or RunConfig.model_fields)


def closest_keys(key: str, candidates: Iterable[str]) -> list[str]:
    """The dotted `candidates` closest to `key`: by the last part above all, then by the section. Empty: none is."""
    section, _, name = key.rpartition(".")

    def likeness(candidate: str) -> float:
        other_section, _, other_name = candidate.rpartition(".")
        likely = _ratio(name, other_name)
        return 0.0 if likely < 0.5 else likely + (0.3 * _ratio(section, other_section) if section else 0.0)

    scores = {candidate: likeness(candidate) for candidate in candidates}
    best = max(scores.values())
    return [k for k, score in scores.items() if best - score < 0.01] if best else []


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def in_words(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    """A field's type and bounds as a reader would say them."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [c for extra in args[1:] for c in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return in_words(args[0], inner)
    if origin in (Union, UnionType):
        return " or ".join(in_words(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        size = next((f"{c.min_length} " for c in constraints if isinstance(c, annotated_types.MinLen)), "")
        item = in_words(args[0])
        return f"a list of {size}" + (
            item if item.startswith("text") else item.removeprefix("a ").replace("number", "numbers", 1)
        )
    if origin is dict:
        return "a mapping"
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}[annotation]
    symbols = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{symbols[k]} {getattr(c, k)}" for c in constraints for k in symbols if hasattr(c, k)]
    if name == "text" and any(isinstance(c, annotated_types.MinLen) for c in constraints):
        name = "text that is not empty"
    return f"{name} {' and '.join(bounds)}".rstrip()


def options(annotation: Any) -> list[str]:
    """The texts that a Literal, or a union with one, allows."""
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if isinstance(value, str)]
    if get_origin(annotation) in (Union, UnionType):
        return [value for arg in get_args(annotation) for value in options(arg)]
    return []


def shown(value: Any) -> str:
    """A value as it is written after `key=`, cut to what a message can hold. A numeral given as text is quoted."""
    if isinstance(value, str):
        text = value if value and not re.fullmatch(r"[-+.\d].*|true|false|null", value) else repr(value)
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
