"""verl's command lines: `translate` turns one into a RunConfig, by the table in `lorl.verl.table`."""

from lorl.verl.translate import Translation, translate

__all__ = ["Translation", "translate"]
