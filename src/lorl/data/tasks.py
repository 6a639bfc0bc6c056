"""Procedural tasks of reasoning-gym, written as prompt files in verl's layout.

Every row keeps its whole entry, so that the reward can ask reasoning-gym's own scorer.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import numpy as np

from lorl.data.parquet import VerlRow, write_splits
from lorl.data.sources import one_line
from lorl.errors import UserError, nearest
from lorl.seeding import stable_seed

Entry = dict[str, Any]  # reasoning-gym's: question, answer, metadata
ShotStyle = Literal["turns", "inline"]

DRAWS_PER_QUESTION = 50  # a task this hard pressed for new questions has no more to give
_RESERVED = ("seed", "size")


def write_task(
    name: str,
    output: Path,
    *,
    train: int,
    val: int,
    seed: int = 0,
    shots: int = 0,
    options: Mapping[str, Any] | None = None,
    template: str = "{question}",
    answer_template: str = "{answer}",
    where: Mapping[str, Any] | None = None,
    shot_style: ShotStyle = "turns",
) -> dict[str, Path]:
    """Write `output`/train.parquet and val.parquet with distinct questions of reasoning-gym's task `name`.

    No question is in two of: train, val, the worked examples. All three come from seeds of their own.

    Args:
        name: A dataset of reasoning-gym, such as number_sorting or gsm_symbolic.
        output: Folder to write to; made when missing.
        train: Questions in train.parquet.
        val: Questions in val.parquet.
        seed: Same seed, same files.
        shots: Worked examples before every question (the same ones).
        options: Fields of the dataset's config, such as min_numbers.
        template: What the question looks like. Fields: question, answer and the entry's metadata; lists are joined by
            ", " and whole numbers lose their ".0", so that "Sort {direction}: {original_numbers}" gives
            "Sort ascending: 48, 12, 77".
        answer_template: What a worked example's answer looks like; reasoning-gym's scorer must take it for right.
        where: Metadata that an entry must have, such as {"direction": "ascending"}; others are drawn again.
        shot_style: "turns" puts the examples into user and assistant messages, "inline" into the one user message.

    Raises:
        UserError: reasoning-gym is missing; the task, an option or a field is unknown; a value is wrong; the task has
            too few distinct questions; the scorer refuses the rendered answers.
    """
    if train < 1 or val < 1 or shots < 0:
        raise UserError(f"a task takes train and val from 1 and shots from 0, not {train=}, {val=}, {shots=}")
    if shot_style not in typing.get_args(ShotStyle):
        raise UserError(f"there is no shot style {shot_style!r}; {nearest(shot_style, typing.get_args(ShotStyle))}")
    task = _Task(name, dict(options or {}), template, answer_template, dict(where or {}))
    seen: set[str] = set()  # val before train: val stays the same however many train questions are asked for
    examples = task.items(shots, stable_seed(seed, name, "shots"), seen)
    val_items = task.items(val, stable_seed(seed, name, "val"), seen)
    train_items = task.items(train, stable_seed(seed, name, "train"), seen)
    splits = {
        split: [_verl_row(name, _messages(examples, item, shot_style), item, split, i) for i, item in enumerate(items)]
        for split, items in (("train", train_items), ("val", val_items))
    }
    return write_splits(output, splits)


def render(template: str, fields: Mapping[str, str]) -> str:
    """`template` with its {field}s filled in; "{{" and "}}" stand for braces.

    Raises:
        UserError: The template is malformed, or names a field that is not there.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"the template {template!r} is malformed: {error}") from error
    text = ""
    for literal, name, spec, conversion in parts:
        text += literal
        if name is None:
            continue
        if name not in fields or spec or conversion:
            raise UserError(f"the template {template!r} names an unknown field {name!r}; {nearest(name, fields)}")
        text += fields[name]
    return text


def check_options(name: str, config_class: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with their values brought to the types of `config_class`'s fields ("3" becomes 3).

    Raises:
        UserError: An option is not a field, or its value is of another type.
    """
    import pydantic

    types = typing.get_type_hints(config_class)
    valid = [field.name for field in dataclasses.fields(config_class) if field.name not in _RESERVED]
    checked: dict[str, Any] = {}
    for option, value in options.items():
        if option in _RESERVED:
            raise UserError(f"the option {option!r} is lorl's own to set; use seed, train and val")
        if option not in valid:
            raise UserError(f"reasoning-gym's {name} has no option {option!r}; {nearest(option, valid)}")
        try:
            checked[option] = pydantic.TypeAdapter(types[option]).validate_python(value)
        except pydantic.ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"reasoning-gym's {name} can't take {option}={value!r}: {reason}") from error
    return checked


def json_safe(value: Any) -> Any:
    """For `json.dumps(default=...)`: what entries hold besides JSON's own types."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return str(value)  # Decimal, Fraction, datetime, sympy expressions: scorers read them from text


@dataclasses.dataclass(frozen=True, slots=True)
class _Item:
    question: str  # as rendered
    answer: str  # as rendered
    entry: Entry  # as it comes back from JSON


class _Task:
    """One reasoning-gym dataset with its options, and how its entries are rendered."""

    def __init__(
        self,
        name: str,
        options: dict[str, Any],
        template: str,
        answer_template: str,
        where: dict[str, Any],
    ) -> None:
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise UserError("tasks come from reasoning-gym, which is missing: pip install 'lorl[tasks]'") from error
        if name not in DATASETS:
            raise UserError(f"reasoning-gym has no task {name!r}; {nearest(name, DATASETS)}")
        self.name = name
        self.template = template
        self.answer_template = answer_template
        self.where = where
        self._dataset_class, self._config_class = DATASETS[name]
        self._options = check_options(name, self._config_class, options)
        self._score = self._dataset(seed=0, size=1).score_answer

    def items(self, count: int, seed: int, seen: set[str]) -> list[_Item]:
        """`count` items whose questions are not in `seen`, which grows by them."""
        items: list[_Item] = []
        limit = DRAWS_PER_QUESTION * count + 1000
        entries = self._entries(seed % 2**31, limit)  # some datasets seed numpy, which takes 32 bits
        while len(items) < count:
            entry = next(entries, None)
            if entry is None:
                raise UserError(
                    f"reasoning-gym's {self.name} gave {len(items)} new questions in {limit} draws and {count} are "
                    f"wanted; ask for fewer, or widen its options {self._options} or the filter {self.where}"
                )
            item = self._item(entry)
            if item is not None and item.question not in seen:
                seen.add(item.question)
                items.append(item)
        return items

    def _dataset(self, seed: int, size: int) -> Any:
        try:
            return self._dataset_class(config=self._config_class(**self._options, seed=seed, size=size))
        except Exception as error:  # most check their options by assert
            raise self._refusal(error) from error

    def _entries(self, seed: int, limit: int) -> Iterator[Entry]:
        dataset = self._dataset(seed, limit)
        for index in range(limit):
            try:
                entry = dataset[index]
            except Exception as error:  # what a generator raises when odd options leave it nothing to draw
                raise self._refusal(error) from error
            yield json.loads(json.dumps(entry, default=json_safe))

    def _refusal(self, error: Exception) -> UserError:
        return UserError(f"reasoning-gym's {self.name} refuses the options {self._options}: {one_line(error)}")

    def _item(self, entry: Entry) -> _Item | None:
        """The entry rendered, or None where the filter leaves it out."""
        fields = {"question": entry["question"], "answer": entry["answer"] or ""}
        fields = {name: _text(value) for name, value in entry["metadata"].items()} | fields
        for name, value in self.where.items():
            if name not in fields:
                raise UserError(f"{self.name}'s entries have no {name!r} to filter by; {nearest(name, fields)}")
            if fields[name] != str(value):
                return None
        item = _Item(render(self.template, fields), render(self.answer_template, fields), entry)
        self._check_answer(item)
        return item

    def _check_answer(self, item: _Item) -> None:
        """Each row's own answer must be right for the scorer that will grade the model's."""
        if item.entry["answer"] is None:  # any of many answers is right; the scorer works from the metadata
            return
        if self._score(item.answer, item.entry) == 1:
            return
        question = item.question.splitlines()[0][:80]
        if self._score(item.entry["answer"], item.entry) != 1:  # some scorers tell tuples from lists
            raise UserError(
                f"{self.name} can't be written: after JSON its scorer refuses its own answer to {question!r}"
            )
        raise UserError(
            f"reasoning-gym's scorer refuses the answer {item.answer!r} to {question!r}; "
            f"render answers in the form that {self.name} asks for, such as {item.entry['answer']!r}"
        )


def _text(value: Any) -> str:
    """A metadata value as a template shows it."""
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    text = str(value)
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text)


def _messages(examples: list[_Item], item: _Item, style: ShotStyle) -> list[dict[str, str]]:
    if style == "inline":
        worked = [f"{example.question}\n{example.answer}" for example in examples]
        return [{"role": "user", "content": "\n\n".join([*worked, item.question])}]
    turns: list[dict[str, str]] = []
    for example in examples:
        turns.append({"role": "user", "content": example.question})
        turns.append({"role": "assistant", "content": example.answer})
    return [*turns, {"role": "user", "content": item.question}]


def _verl_row(name: str, messages: list[dict[str, str]], item: _Item, split: str, index: int) -> VerlRow:
    answer = item.entry["answer"]
    return {
        "data_source": f"reasoning_gym/{name}",
        "prompt": messages,
        "ability": "reasoning",
        "reward_model": {"style": "rule", "ground_truth": "any that the scorer takes" if answer is None else answer},
        "extra_info": {"split": split, "index": index, "entry": json.dumps(item.entry)},
    }
