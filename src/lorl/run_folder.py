"""The folder of a run, `runs/NAME/`: who may use it, where it goes on, and what lies in it.

    config.yaml            resolved; `lorl train` reads it again
    environment.json       versions, machine, git state, command line
    metrics.jsonl          one line a step (lorl.tracking)
    rollouts/step-N.jsonl  one line a sample
    checkpoints/step-N/    lorl.checkpoint
    summary.json           at the end: its presence says that the run is finished

One process uses it at a time. The lock is the kernel's, so it goes with the process, however that ends.
"""

import fcntl
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorl import checkpoint, environment, settings
from lorl.checkpoint import SaveFailed, fsync_folder, write_durably
from lorl.config import RunConfig
from lorl.errors import UserError

log = logging.getLogger("lorl")

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
ROLLOUTS = "rollouts"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROLLOUT_FILE = re.compile(r"step-(\d+)\.jsonl")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, held by this process until `close`."""

    path: Path
    resume_from: Path | None  # the checkpoint that the run goes on from; None: from its start
    config: RunConfig
    _lock: int  # file descriptor
    _made: bool  # by this process: it was not there before

    @classmethod
    def open(cls, config: RunConfig, config_yaml: str) -> "RunFolder":
        """Makes or reopens the folder that `config` names, locks it, and decides where the run goes on.

        A new folder starts from the beginning, or from the checkpoint that `resume` names (of any run). A folder whose
        run did not finish goes on from its newest whole checkpoint, if nothing but `settings.RESUME_FREE` changed.

        Args:
            config_yaml: `config` as text, written to config.yaml.

        Raises:
            UserError: the name is not allowed, the folder is in use, finished, or no run's; it may not be resumed under
                this configuration; or the configuration holds a secret.
        """
        if secret := environment.secret_in(config_yaml):
            raise UserError(
                f"the configuration holds {secret}, and {CONFIG} is readable text; let the code that uses it read it "
                "from the environment"
            )
        named = _named_checkpoint(config.resume)
        path = path_for(config)
        try:
            if path.exists() and not (path / CONFIG).exists() and _holds_something_else(path):
                raise UserError(f"{path} exists and is not the folder of a run; choose another run.name")
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            lock = _acquire(path)
        except OSError as error:
            raise UserError(f"run folder {path} cannot be used: {error.strerror}; set run.dir or run.name") from None
        try:
            start = _start(path, config, named)
            if start is not None and start.parent != path / CHECKPOINTS:
                # Killed before its first checkpoint, the run has to know where it began.
                config_yaml = settings.to_yaml(config.model_copy(update={"resume": str(start)}))
            _replace(path / CONFIG, config_yaml.encode())
            _replace(path / ENVIRONMENT, _pretty(environment.describe(sys.argv, Path.cwd())))
        except OSError as error:
            os.close(lock)
            raise UserError(f"run folder {path} cannot be written: {error.strerror}; set run.dir") from None
        except BaseException:
            os.close(lock)
            raise
        return cls(path, start, config, lock, made)

    def rewind(self, step: int | None) -> None:
        """Removes rollouts of steps after `step` (all of them for None): the run goes on from there and makes them
        anew. metrics.jsonl is the tracker's to rewind."""
        for file in (self.path / ROLLOUTS).glob("step-*.jsonl"):
            match = _ROLLOUT_FILE.fullmatch(file.name)
            if match and (step is None or int(match[1]) > step):
                file.unlink()

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rollouts/step-N.jsonl, one line a row, whole or not at all. A full disk is a warning: training can do
        without the file."""
        lines = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        try:
            _replace(self.path / ROLLOUTS / f"step-{step}.jsonl", lines.encode())
        except OSError as error:
            log.warning("rollouts of step %d were not written: %s", step, error.strerror or error)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, which ends the run. `summary["steps"]` is the last step.

        Raises:
            SaveFailed: the file system refused it; the run counts as unfinished and can be resumed.
        """
        try:
            _replace(self.path / SUMMARY, _pretty({**summary, "epochs": self.config.trainer.total_epochs}))
        except OSError as error:
            raise SaveFailed(f"{self.path / SUMMARY} was not written: {error.strerror or error}") from error

    def close(self) -> None:
        """Lets another process have the folder."""
        os.close(self._lock)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._made and isinstance(error, UserError):
            self._remove_unbegun()
        self.close()

    def _remove_unbegun(self) -> None:
        """Where a mistake showed before the run began, nothing in the folder is worth more than the corrected command
        makes again, and under a name made from the time that command would leave it lying."""
        files = [self.path / name for name in (CONFIG, ENVIRONMENT, LOCK)]
        with suppress(OSError):  # the mistake is what has to be said
            if set(self.path.iterdir()) <= set(files):
                for file in files:
                    file.unlink(missing_ok=True)
                self.path.rmdir()


# Names and locks


def path_for(config: RunConfig) -> Path:
    """The folder that `config` names, or, where it names none, one that does not exist yet. Raises UserError."""
    root, name = Path(config.run.dir), config.run.name
    if name is not None:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"run.name={name!r} cannot name a folder: use up to 64 letters, digits, '.', '_' and '-', the first a "
                "letter or digit"
            )
        return root / name
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.model.path).name).lstrip("._-")[:24] or "run"
    algorithm = re.sub(r"[^A-Za-z0-9._-]+", "-", config.algorithm.advantage)[:20]
    made = f"{stem}-{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = root / made, 1
    while path.exists():
        count += 1
        path = root / f"{made}-{count}"
    return path


def _holds_something_else(path: Path) -> bool:
    """Whether something lies in `path` that a run killed while it was starting does not leave."""
    return not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())


def _acquire(path: Path) -> int:
    """The descriptor of the locked lock file. Closing it, or the death of the process, frees the folder."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 64, 0).decode(errors="replace").strip()
        os.close(lock)
        raise UserError(
            f"run folder {path} is in use by process {holder or 'unknown'}; wait for it, stop it, or choose another "
            "run.name"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


# Where to go on


def _named_checkpoint(resume: str) -> Path | None:
    """The checkpoint that `resume` names, checked; None for auto and never."""
    if resume in ("auto", "never"):
        return None
    if not Path(resume).exists():
        raise UserError(f"resume={resume}: expected auto, never, or the folder of a step, and no such folder exists")
    checkpoint.verify(Path(resume))
    return Path(resume).resolve()


def _start(path: Path, config: RunConfig, named: Path | None) -> Path | None:
    """The checkpoint that the run in `path` goes on from, or None for its beginning."""
    if not (path / CONFIG).exists():
        return named
    if config.resume == "never":
        raise UserError(f"run folder {path} exists already and resume=never; choose another run.name")
    root = path / CHECKPOINTS
    newest = checkpoint.latest(root)
    _refuse_finished(path, config)
    if newest is None:
        if damaged := sorted(root.glob("step-*")):
            raise UserError(f"none of the {len(damaged)} checkpoints in {root} is whole; choose another run.name")
        return named or _named_checkpoint(_former(path).resume)
    if named is not None and named != newest.resolve():
        raise UserError(
            f"resume={config.resume} is not the newest checkpoint of {path}, which has {newest.name}; resume=auto goes "
            "on from that one, and another run.name branches off"
        )
    conflicts = settings.resume_conflicts(_former(path), config)
    if conflicts:
        key, (old, new) = next(iter(conflicts.items()))
        more = f" (and {len(conflicts) - 1} more keys differ)" if len(conflicts) > 1 else ""
        raise UserError(
            f"run folder {path} was begun with {key}={old} and this run has {key}={new}{more}; set it back, or choose "
            "another run.name"
        )
    return newest


def _former(path: Path) -> RunConfig:
    try:
        return settings.load(path / CONFIG)
    except UserError as error:
        raise UserError(f"run folder {path} cannot be resumed by this version of lorl: {error}") from None


def _refuse_finished(path: Path, config: RunConfig) -> None:
    """Raises UserError if the run has its summary and `config` does not ask for more steps or epochs than it had."""
    try:
        summary = json.loads((path / SUMMARY).read_bytes())
        steps, epochs = int(summary["steps"]), int(summary["epochs"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{path / SUMMARY} cannot be read; choose another run.name") from None
    total = config.trainer.total_steps
    more = config.trainer.total_epochs > epochs if total is None else total > steps
    if not more:
        raise UserError(
            f"run folder {path} holds a finished run of {steps} steps; choose another run.name, or raise "
            "trainer.total_steps to go on"
        )


def _pretty(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _replace(path: Path, data: bytes) -> None:
    """Writes `path` whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        write_durably(beside, data)
        os.replace(beside, path)
        fsync_folder(path.parent)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
