"""verl's keys and what becomes of each in lorl: one table, read by the translation, its tests and docs/from-verl.md."""

from lorl.verl import actor_rows, rollout_rows, run_rows, task_rows
from lorl.verl.rows import Row

TABLE: tuple[Row, ...] = (*task_rows.ROWS, *actor_rows.ROWS, *rollout_rows.ROWS, *run_rows.ROWS)

ROWS: dict[str, Row] = {row.key: row for row in TABLE}
_SPELLINGS: dict[str, Row] = {spelling: row for row in TABLE for spelling in (row.key, *row.spellings)}
KEYS: tuple[str, ...] = tuple(_SPELLINGS)  # every spelling


def find(key: str) -> tuple[Row, str] | None:
    """The row of a key, and what of the key lies below a `.*` row ("" for a key of its own); None: no such key."""
    if row := _SPELLINGS.get(key):
        return row, ""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if row := _SPELLINGS.get(".".join(parts[:length]) + ".*"):
            return row, ".".join(parts[length:])
    return None
