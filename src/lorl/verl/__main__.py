"""`python -m lorl.verl [FILE]`: the table as Markdown, for docs/from-verl.md."""

import sys
from pathlib import Path

from lorl.verl.docs import markdown

if __name__ == "__main__":
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
    else:
        sys.stdout.write(markdown())
