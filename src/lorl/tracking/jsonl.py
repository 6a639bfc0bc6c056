"""metrics.jsonl: one JSON object a step, always on, and what resuming and the report read."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class JsonlTracker:
    """Appends `{"step": n, name: value, ...}` lines to a run's metrics.jsonl.

    A line is one `write` to an unbuffered file: a kill leaves at most one torn last line, and a disk that fills up half
    way through a line leaves none. On resumption from step n the lines of later steps are dropped, so that the file
    ends up as if the run had never stopped; without a step to resume from, the file starts empty.
    """

    name = "jsonl"

    def __init__(self, run_folder: Path, resume_step: int | None):
        path = run_folder / METRICS_FILE
        keep = [] if resume_step is None else [row for row in read_jsonl(path) if row.get("step", 0) <= resume_step]
        _replace(path, "".join(map(_line, keep)))
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line. Raises OSError where it could not be written whole; the file is then as before."""
        data = _line({"step": step, **metrics}).encode()
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(f"{self._file.name}: {written} of {len(data)} bytes written; is the disk full?")
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file that a kill may have cut short; a missing file has none.

    Lines that are no JSON object (the torn one) are left out. Universal newlines are off: a completion may hold any
    character, and only "\\n" ends a line.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as one dict a step, by step. Lines of one step are merged, the later ones winning; a non-finite
    number comes back as None."""
    steps: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(run_folder / METRICS_FILE):
        if isinstance(row.get("step"), int):
            steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def _line(row: dict[str, Any]) -> str:
    """Valid JSON: NaN and infinities, which JSON lacks, become null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
