"""`python -m lorl.main_ppo key=value ...`: verl's command lines, run by lorl.

The same run as `lorl train` of the YAML that `--print-config` prints. docs/from-verl.md says what becomes of each key.
"""

import sys
from collections.abc import Sequence

from lorl import settings
from lorl.cli import fail, train_and_report
from lorl.errors import LorlError, UserError
from lorl.verl import translate
from lorl.verl.translate import in_verls_names

HELP = """\
usage: python -m lorl.main_ppo [--print-config] key=value ...

Takes the command line of `python -m verl.trainer.main_ppo` as it stands: key=value, +key=value, ++key=value, ~key,
lists, null and ${other.key}. docs/from-verl.md lists every key with what becomes of it.

  --print-config  print the run in lorl's YAML and end; what the log would say of verl's keys goes to standard error
  --help          this text
  +lorl.KEY=value a key of lorl's own, such as +lorl.algorithm.reference=base
"""


def main(words: Sequence[str]) -> None:
    """Runs, prints or explains what `words` say. Ends the process with lorl's exit codes on errors."""
    flags = [word for word in words if word.startswith("-") and word.partition("=")[0].lstrip("-")]
    if {"--help", "-h"} & set(flags):
        print(HELP, end="")
        return
    for flag in flags:
        if flag != "--print-config":
            raise UserError(_refusal(flag))
    translation = translate([word for word in words if word not in flags])
    if flags:
        print("\n".join(translation.notes), file=sys.stderr)
        print(settings.to_yaml(translation.config), end="")
        return
    from lorl.tracking.console import Console

    console = Console()
    for note in translation.notes:
        console.info(note)
    with in_verls_names():
        train_and_report(translation.config, console)


def _refusal(flag: str) -> str:
    name = flag.partition("=")[0]
    if name in ("--config-name", "--config-path", "--config-dir", "-cn", "-cp", "-cd"):
        return f"{name}: lorl reads verl's keys, not its YAML files; write their keys on the command line as key=value"
    return f"unknown option {name}; there are --print-config and --help, and verl's key=value"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LorlError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail("stopped before there was anything to save", 130)
