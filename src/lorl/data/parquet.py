"""Writing prompt files in verl's parquet layout."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorl.errors import UserError

VerlRow = dict[str, Any]  # data_source, prompt, ability, reward_model, extra_info


def write_splits(output: Path, splits: Mapping[str, Sequence[VerlRow]]) -> dict[str, Path]:
    """Write `output`/SPLIT.parquet for every split and return their paths.

    All files are written beside their places before the first is renamed, so that an interrupted run leaves the old
    files or whole new ones.

    Raises:
        UserError: The folder can't be made or written to.
    """
    import pyarrow
    from pyarrow import parquet

    paths = {split: output / f"{split}.parquet" for split in splits}
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=output) as beside:
            for split, rows in splits.items():
                parquet.write_table(pyarrow.Table.from_pylist(list(rows)), Path(beside) / f"{split}.parquet")
            for split, path in paths.items():
                os.replace(Path(beside) / f"{split}.parquet", path)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror or error}") from error
    return paths
