"""From a row's columns to a question: verl's layout, or the simple one of a question and its answer.

verl: `data_source`, `prompt` (chat messages), `reward_model.ground_truth`, `extra_info`.
Simple: `prompt` or `question` (text, or chat messages) and `answer`; the other columns become `extra_info`. A run whose
reward needs no truth, such as a reward model's, sets `data.answer_key=null`.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorl.config import DataConfig
from lorl.data.sources import Row
from lorl.errors import UserError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]


class BadRowError(Exception):
    """Why a row can't be used; the loader's `bad_rows` policy decides what that means."""


@dataclass(frozen=True, slots=True)
class Question:
    """A row, checked."""

    given_id: str | None  # the row's own `id`, where it has one
    messages: list[Message]  # as the row has them, without the run's system prompt
    ground_truth: Any  # None only where data.answer_key is null
    data_source: str
    extra_info: dict[str, Any]

    def content_id(self) -> str:
        """16 hexadecimal digits of what is asked and what is right: the same wherever the row lies."""
        content = json.dumps([self.data_source, self.messages, self.ground_truth], sort_keys=True, default=str)
        return hashlib.blake2b(content.encode("ascii"), digest_size=8).hexdigest()


def check_columns(rows: Sequence[Row], config: DataConfig, source: str, key: str) -> None:
    """Refuse a file in which no row has a column that the config names: that is a wrong key, not a file of bad rows."""
    columns = {name for row in rows for name in row.values}
    if not columns:
        return
    wanted = {"prompt_key": "question" not in columns, "answer_key": "reward_model" not in columns, "source_key": False}
    for field, required in wanted.items():
        column, default = getattr(config, field), DataConfig.model_fields[field].default
        if column is None:
            continue
        # "question" stands in for the default prompt column only; a key that the user chose must exist
        if column not in columns and (required or column != default):
            raise UserError(
                f"{key}: {source} has no column {column!r} (data.{field}); {nearest(column, columns)}"
                + ("; where the reward needs no answer, set data.answer_key=null" if field == "answer_key" else "")
            )


def parse_row(row: Row, config: DataConfig) -> Question:
    """Check one row and bring it into one shape.

    Raises:
        BadRowError: The row was not readable, or lacks a prompt or an answer of a usable type.
    """
    if row.fault:
        raise BadRowError(row.fault)
    values = row.values
    data_source = values.get(config.source_key)
    if not isinstance(data_source, str | None):
        raise BadRowError(f"{config.source_key} is {_kind(data_source)}, not text")
    return Question(
        given_id=_given_id(values.get("id")),
        messages=messages_of(_prompt(values, config)),
        ground_truth=_ground_truth(values, config),
        data_source=data_source or "",
        extra_info=_extra_info(values, config),
    )


def _prompt(values: dict[str, Any], config: DataConfig) -> Any:
    prompt = values.get(config.prompt_key)
    if prompt is None and config.prompt_key == DataConfig.model_fields["prompt_key"].default:
        prompt = values.get("question")
    if prompt is None:
        raise BadRowError(f"has no {config.prompt_key!r}; {nearest(config.prompt_key, values)}")
    return prompt


def messages_of(prompt: Any) -> list[Message]:
    """A prompt as chat messages, from messages or text. Raises BadRowError."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise BadRowError(f"the prompt is {_kind(prompt)}, neither text nor a list of messages")
    messages = [_message(message) for message in prompt]
    if not any(message["content"].strip() for message in messages if message["role"] != "system"):
        raise BadRowError("the prompt is empty")
    if messages[-1]["role"] == "assistant":
        raise BadRowError("the last message is the assistant's, which leaves nothing to answer")
    return messages


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise BadRowError("the prompt's messages must be objects with role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise BadRowError(f"a message has the role {role!r}; {nearest(str(role), ROLES)}")
    if not isinstance(content, str):
        raise BadRowError(f"a message's content is {_kind(content)}, not text")
    if "\0" in content:
        raise BadRowError("the prompt holds a NUL character")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError("the prompt holds half a surrogate pair, which is no text") from None
    # parquet gives every message of a column the same keys, None where it has none
    return {name: value for name, value in message.items() if value is not None}


def _ground_truth(values: dict[str, Any], config: DataConfig) -> Any:
    reward_model = values.get("reward_model")
    if not isinstance(reward_model, dict | None):
        raise BadRowError(f"reward_model is {_kind(reward_model)}, not an object with ground_truth")
    truth = (reward_model or {}).get("ground_truth")
    if truth is None:
        if config.answer_key is None:
            return None
        truth = values.get(config.answer_key)
    if truth is None:
        raise BadRowError(f"has no answer, neither reward_model.ground_truth nor {config.answer_key!r}")
    if not isinstance(truth, str | int | float | list | dict):
        raise BadRowError(f"the answer is {_kind(truth)}, not text, a number, a list or an object")
    if truth in ([], {}) or (isinstance(truth, str) and not truth.strip()):
        raise BadRowError("the answer is empty")
    if isinstance(truth, float) and not math.isfinite(truth):
        raise BadRowError(f"the answer is {truth}")
    return truth


def _extra_info(values: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    extra_info = values.get("extra_info")
    if extra_info is None:
        used = {"id", "reward_model", "extra_info", config.prompt_key, config.answer_key, config.source_key}
        return {name: value for name, value in values.items() if name not in used}
    if not isinstance(extra_info, dict):
        raise BadRowError(f"extra_info is {_kind(extra_info)}, not an object")
    return extra_info


def _given_id(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadRowError(f"id is {_kind(value)}, not text or a whole number")
    return str(value)


def _kind(value: Any) -> str:
    """What a value is, for messages."""
    names = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
