"""What pydantic says of a configuration, in one sentence."""

import difflib
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lorl.schema import LEAVES, SECTIONS, in_words, lookup, nearest_key, shown, takes_text

_REFUSED_BY_NAME = {
    "rollout.engine=sglang": "lorl has no SGLang engine (docs/engines.md says what one needs); use vllm or torch",
}


def sentence(error: ValidationError, tree: Any) -> str:
    """The first mistake, and how many keys are wrong besides."""
    messages: dict[str, str] = {}  # by key: a union reports one error for each of its members
    for detail in error.errors(include_url=False):
        key = _key_of(detail)
        messages.setdefault(key, _message(key, detail, tree))
    first, *others = messages.values()
    return first + (f" (and {len(others)} more mistake{'s' if len(others) > 1 else ''})" if others else "")


def _key_of(detail: ErrorDetails) -> str:
    """The dotted key that an error is about: the schema's leaf or section, or the unknown key."""
    parts = [str(part) for part in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        value = detail["input"]
        while isinstance(value, dict) and value:  # what was written is `optm.lr`, not `optm`
            part, value = next(iter(value.items()))
            parts.append(str(part))
        return ".".join(parts)
    for length in range(1, len(parts)):
        if ".".join(parts[:length]) in LEAVES:
            return ".".join(parts[:length])
    return ".".join(parts)


def _message(key: str, detail: ErrorDetails, tree: Any) -> str:
    if detail["type"] == "value_error":  # the schema's own cross-field checks are sentences already
        return detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        if key in LEAVES:  # written flat, as in `optim.lr: 3e-5`
            section, _, name = key.partition(".")
            return f"key {key!r} is written flat; YAML nests it: '{section}:' and, indented below, '{name}: ...'"
        return f"unknown key {key!r}; {nearest_key(key)}"
    value = lookup(tree, key)
    if key in SECTIONS:
        example = next(leaf for leaf in LEAVES if leaf.startswith(f"{key}."))
        return f"{key}={shown(value)}: {key!r} is a section; set its keys, such as {example}"
    field = LEAVES[key]
    message = f"{key}={shown(value)}: expected {in_words(field.annotation, field.metadata)}"
    if why := _REFUSED_BY_NAME.get(f"{key}={value}"):
        return f"{key}={value}: {why}"
    if get_origin(field.annotation) is Literal and isinstance(value, str):
        close = difflib.get_close_matches(value, map(str, get_args(field.annotation)), n=1)
        message += f"; did you mean {close[0]!r}?" if close else ""
    elif isinstance(value, int | float) and takes_text(key):
        message += "; put it in quotes"
    return message
