"""From YAML and `key=value` to a checked RunConfig, with every mistake told in one sentence.

One pipeline: the file is laid over the defaults, the overrides over the file (read by Hydra's own parser, so that
verl's quoting holds here too), interpolations are resolved, and pydantic validates the result against `lorl.config`.
Nothing here imports torch: a typo is answered before anything loads.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from lorl.config import RunConfig
from lorl.errors import UserError, nearest
from lorl.mistakes import sentence
from lorl.schema import LEAVES, SECTIONS, flat, in_words, is_known, lookup, nearest_key, shown, takes_text

RESUME_FREE = (
    "trainer.total_steps",
    "trainer.total_epochs",
    "trainer.trackers",
    "trainer.eval_every",
    "checkpoint.*",
    "resume",
    "reward.workers",
    "rollout.retries",
    "parallel.strategy",
    "parallel.shard_size",
    "parallel.gpus",
    "parallel.nodes",
    "parallel.threads",
    "parallel.collective_limit_s",
    "run.*",
)
"""Patterns of keys that may differ when a run is resumed: none of them changes what an earlier step computed."""


DAPO: dict[str, Any] = {
    "advantage": "grpo",
    "policy_loss": "ppo_clip",
    "clip_low": 0.2,
    "clip_high": 0.28,
    "clip_dual": None,
    "aggregation": "token-mean",
    "kl_coef": 0.0,
    "dynamic_sampling": True,
    "overlong_penalty": 1.0,
}
"""algorithm.preset=dapo (Yu et al. 2025, arXiv 2503.14476, section 4.1). Its length punishment begins at four fifths of
rollout.max_response_tokens (the paper: 16,384 of 20,480). verl's recipe clips negative advantages at 10 besides."""


class Key(NamedTuple):
    """One row of the configuration's reference."""

    name: str  # dotted
    type: str  # in words, with bounds
    default: str  # as it would be written after `key=`
    description: str


def load(file: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run.

    Args:
        file: YAML, nested as RunConfig is; None for defaults alone. `${section.key}` refers to another key.
        overrides: Hydra's `key=value` (`a.b=3`, `a=[x,y]`, `a=null`, `a="some text"`). `+key` and `++key` mean the same
            as `key`; `~key` goes back to the default.

    Raises:
        UserError: for the first mistake found, with the nearest valid key or value, and how many more there are.
    """
    given = _read_yaml(Path(file)) if file is not None else {}
    parser = OverridesParser.create()
    for override in overrides:
        _apply(given, override, parser)
    return validate(given)


def validate(given: Mapping[str, Any]) -> RunConfig:
    """`given`, nested as RunConfig is, over the defaults. Raises UserError as `load` does."""
    tree = overlay(RunConfig.model_validate({}).model_dump(), given)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        place = f" (at {error.full_key})" if error.full_key else ""
        raise UserError(f"cannot resolve ${{...}} in the config{place}: {_first_line(error)}") from None
    _apply_preset(resolved, given)
    try:
        return RunConfig.model_validate(resolved)
    except ValidationError as error:
        raise UserError(sentence(error, resolved)) from None


def _apply_preset(tree: Any, given: Mapping[str, Any]) -> None:
    """Puts algorithm.preset's values where nothing was given."""
    algorithm, chosen = tree.get("algorithm"), given.get("algorithm")
    if not isinstance(algorithm, dict) or algorithm.get("preset") != "dapo":
        return
    limit = lookup(tree, "rollout.max_response_tokens") if isinstance(tree.get("rollout"), dict) else None
    values = {**DAPO, "overlong_buffer_tokens": limit // 5 if type(limit) is int else 0}
    algorithm |= {key: value for key, value in values.items() if not (isinstance(chosen, dict) and key in chosen)}


def parse_values(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words of any keys, read as overrides are: `n=3` is a number, `a.b=x` nests. Raises UserError."""
    tree: dict[str, Any] = {}
    parser = OverridesParser.create()
    for word in words:
        _apply(tree, word, parser)
    return tree


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, in the schema's order; `load` gives an equal one back."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(config.model_dump())))


def describe() -> list[Key]:
    """Every key with its type, default and meaning, in the schema's order."""
    defaults = flat(RunConfig.model_validate({}).model_dump())
    return [
        Key(name, in_words(field.annotation, field.metadata), shown(defaults[name]), field.description or "")
        for name, field in LEAVES.items()
    ]


def diff(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with (old, new)."""
    before, after = flat(old.model_dump()), flat(new.model_dump())
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def resume_conflicts(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """`diff` without the keys of RESUME_FREE: what forbids to continue `old`'s run under `new`."""
    return {
        key: change
        for key, change in diff(old, new).items()
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in RESUME_FREE)
    }


# Reading


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = f"; {nearest(str(path), siblings)}" if siblings else ""
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"config file {path} {what}{hint}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"config file {path}{line} is not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError, OSError) as error:
        raise UserError(f"config file {path} cannot be read: {_first_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} holds a list; expected sections such as 'model:' and 'optim:'")
    return {str(key): _section(value) if key in SECTIONS else value for key, value in tree.items()}


def _section(value: Any) -> Any:
    """A section as YAML gave it, with its keys as text; one whose keys are all commented out reads as null."""
    value = {} if value is None else value
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


class Override(NamedTuple):
    """One word of the command line, read."""

    key: str  # dotted
    value: Any
    text: str  # what was written after "="
    delete: bool  # ~key


def parse_override(word: str, parser: OverridesParser | None = None) -> Override:
    """Reads Hydra's `key=value`, `+key=value`, `++key=value` or `~key`. Raises UserError."""
    try:
        parsed = (parser or OverridesParser.create()).parse_override(word)
    except HydraException as error:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"cannot read {word!r}: expected key=value") from None
        quoted = value.strip("'\"").replace("'", "\\'")
        raise UserError(
            f"cannot read {word!r}: {_first_line(error)}; quote values that hold spaces or special characters, "
            f"as in \"{key}='{quoted}'\""
        ) from None
    key = parsed.key_or_group
    if parsed.package is not None or "/" in key or not key:
        raise UserError(f"cannot read {word!r}: expected a dotted key such as optim.lr, got {key or 'none'!r}")
    if parsed.is_sweep_override():
        raise UserError(
            f"{word!r} is a sweep; a run takes one value for a key (a list is written {key}=[a,b], and text that "
            f"holds a comma {key}=\"'a,b'\")"
        )
    if parsed.is_delete() and "=" in word:
        raise UserError(f"{word!r}: write ~{key} to go back to the default, or {key}=value to set it")
    return Override(key, parsed.value(), word.partition("=")[2].strip(), parsed.is_delete())


def _apply(tree: dict[str, Any], word: str, parser: OverridesParser) -> None:
    """Sets what one override says in the nested `tree`."""
    key, value, text, delete = parse_override(word, parser)
    *path, last = key.split(".")
    for part in path:
        child = tree.get(part)
        tree[part] = tree = dict(child) if isinstance(child, dict) else {}
    if delete:
        if not is_known(key):
            raise UserError(f"unknown key {key!r}; {nearest_key(key)}")
        tree.pop(last, None)
        return
    if isinstance(value, int | float) and not isinstance(value, bool) and takes_text(key):
        value = text  # run.name=1e5 is a name, and 1e5 is how it was written
    existing = tree.get(last)
    tree[last] = overlay(existing, value) if isinstance(existing, dict) and isinstance(value, dict) else value


def overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _escape(value: Any) -> Any:
    """Text so that OmegaConf reads it back as it is: `${` would start an interpolation."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
