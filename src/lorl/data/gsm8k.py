"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168) in verl's parquet layout, row for row as verl's own script writes it."""

import re
from pathlib import Path
from typing import Any

from lorl.data.parquet import VerlRow, write_splits
from lorl.data.sources import Row, read_rows
from lorl.errors import UserError

INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
SPLITS = ("train", "test")
_FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def write_gsm8k(source: Path | None, output: Path) -> dict[str, Path]:
    """Write `output`/train.parquet and test.parquet and return their paths.

    Args:
        source: Folder with GSM8K's own train.jsonl and test.jsonl; None loads openai/gsm8k from the hub.
        output: Folder to write to; made when missing.

    Raises:
        UserError: A file is missing or has a row that is not GSM8K's.
    """
    if source is not None and not source.is_dir():
        raise UserError(f"--source {source} is no folder; give the one that holds GSM8K's train.jsonl and test.jsonl")
    rows = {split: read_rows(_place(source, split), "--source") for split in SPLITS}
    return write_splits(
        output, {split: [_verl_row(row, split, i) for i, row in enumerate(rows[split])] for split in SPLITS}
    )


def _place(source: Path | None, split: str) -> str:
    return f"hf:openai/gsm8k/main:{split}" if source is None else str(source / f"{split}.jsonl")


def _verl_row(row: Row, split: str, index: int) -> VerlRow:
    if row.fault:
        raise UserError(f"{row.where} {row.fault}; this is not GSM8K's own file")
    question, answer = _text(row, "question"), _text(row, "answer")
    final = _FINAL_ANSWER.search(answer)
    if final is None:
        raise UserError(f"{row.where}: the answer does not end in '#### NUMBER', as GSM8K's do")
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": final.group(1).replace(",", "")},
        "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
    }


def _text(row: Row, column: str) -> str:
    value: Any = row.values.get(column)
    if not isinstance(value, str):
        raise UserError(f"{row.where} has no text under {column!r}; GSM8K's rows have question and answer")
    return value
