"""Reading rows: parquet, JSON lines, JSON lists and Hugging Face datasets, with every fault told by file and row.

A fault of one row (a line that is no JSON) stays with its row, for the caller's `bad_rows` policy. A fault of a whole
file (missing, truncated, of another kind) is a UserError at once: nobody means to skip a file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorl.errors import UserError, nearest

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".parquet", *JSON_SUFFIXES)
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # UTF-16 and UTF-32


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read: its columns, or why they could not be read."""

    where: str  # FILE:ROW, counted from 1 (a JSON-lines file's line)
    values: dict[str, Any]
    fault: str = ""


def read_rows(source: str, key: str) -> list[Row]:
    """All rows of one source: a file, a dataset folder, or `hf:NAME[:SPLIT]`.

    Args:
        source: What the user wrote.
        key: The config key it was written under ("data.train" or "data.val"), for messages; a Hugging Face dataset
            without a split gives its train split to data.train, its validation or test split to data.val.

    Raises:
        UserError: The source is missing, unreadable, empty, or of a kind that lorl does not read.
    """
    if source.startswith("hf:"):
        rows = _read_dataset(source, key)
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            rows = _read_dataset(f"hf:{path}", key)
        elif not path.exists():
            raise UserError(f"{key}: there is no file {source}; {_nearest_file(path)}")
        elif path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{key}: {source} has the suffix {path.suffix!r}; lorl reads {', '.join(SUFFIXES)}")
        elif path.suffix.lower() in JSON_SUFFIXES:
            rows = read_json(path)
        else:
            rows = _read_parquet(path)
    if not rows:
        raise UserError(f"{key}: {source} holds no rows; give a file with at least one prompt")
    return rows


def read_json(path: Path) -> list[Row]:
    """Rows of a JSON-lines file, or of a .json file that holds one list. A UTF-8 byte-order mark is left out."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if data.startswith(_WIDE_BOMS):
        raise UserError(f"{path} is UTF-16 or UTF-32 text; save it as UTF-8")
    if data.startswith(b"PAR1"):
        raise UserError(f"{path} is a parquet file under the wrong suffix; rename it to {path.stem}.parquet")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if path.suffix.lower() == ".json" and data.lstrip().startswith(b"["):
        return _json_list(path, data)
    return [_json_row(f"{path}:{n}", line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def _json_list(path: Path, data: bytes) -> list[Row]:
    try:
        items = _loads(data)
    except _JSON_ERRORS as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from error
    return [_row(f"{path}:{n}", item) for n, item in enumerate(items, 1)]


def _json_row(where: str, line: bytes) -> Row:
    if b"\0" in line:
        return Row(where, {}, "holds a NUL byte")
    try:
        return _row(where, _loads(line))
    except UnicodeDecodeError:
        return Row(where, {}, "is not UTF-8 text")
    except _JSON_ERRORS as error:
        return Row(where, {}, f"is not valid JSON: {one_line(error)}")


# RecursionError: a line of a million "[" is a broken line, not a reason to stop with a traceback
_JSON_ERRORS = (ValueError, RecursionError)


def _loads(data: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON value")

    return json.loads(data.decode("utf-8"), parse_constant=refuse)


def _row(where: str, item: Any) -> Row:
    if isinstance(item, dict):
        return Row(where, item)
    return Row(where, {}, f"is a JSON {type(item).__name__}, not an object with columns")


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        items = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a whole parquet file ({one_line(error)}); write or download it again"
        ) from error
    return [Row(f"{path}:{n}", item) for n, item in enumerate(items, 1)]


def _read_dataset(source: str, key: str) -> list[Row]:
    """Rows of `hf:NAME[:SPLIT]`. NAME is a hub id, a hub id with a configuration (openai/gsm8k/main), or a folder."""
    import datasets

    name, _, split = source.removeprefix("hf:").partition(":")
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            loaded = datasets.load_from_disk(str(folder))
        elif folder.is_dir():
            loaded = datasets.load_dataset(str(folder))
        else:
            owner, *rest = name.split("/", 2)
            configuration = rest.pop() if len(rest) == 2 else None
            loaded = datasets.load_dataset("/".join([owner, *rest]), configuration)
    except Exception as error:  # datasets raises what its readers, fsspec and the network raise
        raise UserError(f"{key}: cannot load {source}: {one_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_pick_split(source, split, key, [str(name) for name in loaded])]
    elif split and split != str(loaded.split):
        raise UserError(f"{key}: {source} is a dataset without splits; leave ':{split}' away")
    return [Row(f"{source}:{n}", dict(item)) for n, item in enumerate(loaded, 1)]


def _pick_split(source: str, split: str, key: str, splits: list[str]) -> str:
    if split in splits:
        return split
    if split:
        raise UserError(f"{key}: {source} has no split {split!r}; {nearest(split, splits)}")
    usual = ["train"] if key == "data.train" else ["validation", "val", "test"]
    for candidate in usual:
        if candidate in splits:
            return candidate
    raise UserError(f"{key}: {source} has no {' or '.join(usual)} split; add one of its own: {', '.join(splits)}")


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"its folder {path.parent} does not exist either"
    names = [p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES]
    return nearest(path.name, names) if names else f"no {', '.join(SUFFIXES)} file lies in {path.parent.resolve()}"


def one_line(error: BaseException) -> str:
    """What a library's error says, as a part of one sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
