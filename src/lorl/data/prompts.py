"""Prompt files to Prompts: read, checked, rendered and tokenised in one pass at the start of a run.

What can't be used is an error that names its file and row, or, when the user says so, skipped and listed. No row
disappears.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lorl.config import DataConfig
from lorl.data.rows import BadRowError, Message, Question, check_columns, parse_row
from lorl.data.sources import Row, one_line, read_rows
from lorl.errors import UserError
from lorl.experience import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_ROWS = 5  # how many bad rows a message spells out


@dataclass(frozen=True, slots=True)
class RowNote:
    """What was found about one row, for people."""

    where: str  # FILE:ROW
    reason: str


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one split, in file order, and what was left out or cut."""

    prompts: list[Prompt]
    skipped: list[RowNote] = field(default_factory=list)
    truncated: list[RowNote] = field(default_factory=list)


def load_prompts(
    config: DataConfig, paths: str | Sequence[str], tokenizer: "PreTrainedTokenizerBase", split: Literal["train", "val"]
) -> PromptSet:
    """Read `paths` and turn every row into a Prompt.

    A prompt's id is the row's own `id`, or a hash of its content; equal rows are told apart by a counter. Neither
    depends on where the row lies, so that reordering or splitting files changes no draw.

    Rendering: the tokenizer's chat template with its generation prompt. A tokenizer without one (a base model) gets
    the messages' texts joined by blank lines, with the special tokens that the tokenizer puts at a text's start.

    Args:
        config: Its columns, limits and policies (`bad_rows`, `overlong`) hold; `config.train` and `val` are not read.
        paths: Files, dataset folders or `hf:NAME[:SPLIT]`.
        tokenizer: Of the model that will answer.
        split: Picks max_train_prompts or max_val_prompts (the first rows are taken), and the key named in messages.

    Raises:
        UserError: A source can't be read; a row can't be used and the policy is "error"; no row is left.
    """
    key = f"data.{split}"
    rows = _read_all([paths] if isinstance(paths, str) else paths, config, key)
    rows = rows[: config.max_train_prompts if split == "train" else config.max_val_prompts]
    if config.chat_template_kwargs and not tokenizer.chat_template:
        raise UserError("data.chat_template_kwargs is set, but the model's tokenizer has no chat template to read it")

    skipped: list[RowNote] = []
    rendered: list[_Rendered] = []
    ids = _Ids()
    for row in rows:
        try:
            question = parse_row(row, config)
            messages = _messages(question, config)
            text = _render(messages, config, tokenizer)
            rendered.append(_Rendered(row.where, ids.assign(question, row.where), question, messages, text))
        except BadRowError as error:
            skipped.append(RowNote(row.where, str(error)))
    if skipped and config.bad_rows == "error":
        raise UserError(
            f"{_summary(skipped, len(rows), key)}; correct the rows, or set data.bad_rows=skip to leave them out"
        )
    loaded = _tokenize(rendered, config, tokenizer, key)
    loaded.skipped[:0] = skipped
    if not loaded.prompts:
        raise UserError(f"{_summary(loaded.skipped, len(rows), key)}; no prompt is left")
    return loaded


def _read_all(paths: Sequence[str], config: DataConfig, key: str) -> list[Row]:
    if not paths or "" in paths:
        raise UserError(f"{key} names no file; set it to a .parquet or .jsonl file")
    rows: list[Row] = []
    for path in paths:
        found = read_rows(path, key)
        check_columns(found, config, path, key)
        rows += found
    return rows


@dataclass(frozen=True, slots=True)
class _Rendered:
    where: str
    id: str
    question: Question
    messages: list[Message]
    text: str


class _Ids:
    """Hands out ids that are stable and distinct."""

    def __init__(self) -> None:
        self._given: dict[str, str] = {}  # id -> where it was first seen
        self._content: dict[str, int] = {}  # content hash -> times seen

    def assign(self, question: Question, where: str) -> str:
        if question.given_id is not None:
            if (first := self._given.setdefault(question.given_id, where)) != where:
                raise BadRowError(f"has the id {question.given_id!r} of {first} again")
            return question.given_id
        content = question.content_id()
        self._content[content] = seen = self._content.get(content, 0) + 1
        return content if seen == 1 else f"{content}-{seen}"


def _messages(question: Question, config: DataConfig) -> list[Message]:
    """With the run's system prompt, where the row has none."""
    if config.system_prompt is None or question.messages[0]["role"] in ("system", "developer"):
        return question.messages
    return [{"role": "system", "content": config.system_prompt}, *question.messages]


def _render(messages: list[Message], config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **config.chat_template_kwargs
        )
    except Exception as error:  # templates are programs of the model's makers: they raise what they like
        raise BadRowError(f"the chat template refuses it: {one_line(error)}") from error
    assert isinstance(text, str)
    return text


def _tokenize(
    rendered: Sequence[_Rendered], config: DataConfig, tokenizer: "PreTrainedTokenizerBase", key: str
) -> PromptSet:
    """Apply the length policy to what was rendered. Truncation cuts tokens, the template's own included."""
    limit = config.max_prompt_tokens
    done = PromptSet(prompts=[])
    for item, tokens in zip(rendered, _encode([item.text for item in rendered], tokenizer), strict=True):
        text = item.text
        if len(tokens) > limit:
            note = RowNote(item.where, f"the prompt has {len(tokens)} tokens")
            if config.overlong in ("error", "skip"):
                done.skipped.append(note)
                continue
            done.truncated.append(note)
            tokens = tokens[-limit:] if config.overlong == "truncate_left" else tokens[:limit]
            text = str(tokenizer.decode(tokens))
        question = item.question
        done.prompts.append(
            Prompt(
                item.id,
                tokens,
                text,
                question.data_source,
                question.ground_truth,
                question.extra_info,
                item.messages,
            )
        )
    if done.skipped and config.overlong == "error":
        raise UserError(
            f"{_summary(done.skipped, len(rendered), key)} where data.max_prompt_tokens is {limit}; raise it, "
            "or set data.overlong to skip, truncate_left or truncate_right"
        )
    return done


def _encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids of all texts in one batch, which fast tokenizers spread over the cores."""
    if not texts:
        return []
    templated = bool(tokenizer.chat_template)  # a template writes its special tokens itself
    encoded = tokenizer(texts, add_special_tokens=not templated, return_attention_mask=False)["input_ids"]
    if templated:
        return encoded
    # some tokenizers also end a text; a prompt has to stay open
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


def _summary(notes: Sequence[RowNote], total: int, key: str) -> str:
    shown = "; ".join(f"{note.where} {note.reason}" for note in notes[:SHOWN_ROWS])
    more = f"; and {len(notes) - SHOWN_ROWS} more" if len(notes) > SHOWN_ROWS else ""
    return f"{key}: {len(notes)} of {total} rows can't be used: {shown}{more}"
