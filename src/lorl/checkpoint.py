"""Atomic checkpoints: adapters in peft's layout, optimizer tensors and counters, committed by one manifest.

    checkpoints/step-40/
      adapter/adapter_model.safetensors, adapter_config.json    peft loads it; `critic/` and others alike
      optimizer.safetensors                                     flat names to tensors
      state.json                                                step, loader, versions, best: whatever resumes a run
      manifest.json                                             size and SHA-256 of each of these, written last

A step is written beside, in `.tmp-step-40-PID/`; its files and folders are fsynced; then it is renamed. So a folder
named `step-N` was whole when it got that name, and the manifest tells whether it still is. There is no pointer file:
the latest checkpoint is the newest step whose manifest holds. Only safetensors and JSON are read, never pickle.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from safetensors import SafetensorError

from lorl.errors import InfrastructureError, UserError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("lorl")

FORMAT = "lorl-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTER_TENSORS = "adapter_model.safetensors"  # this name and the next are peft's
ADAPTER_CONFIG = "adapter_config.json"

_ADAPTER_FILE = re.compile(rf"([A-Za-z0-9][A-Za-z0-9_-]*)/(?:{re.escape(ADAPTER_TENSORS)}|{re.escape(ADAPTER_CONFIG)})")
_STEP_FOLDER = re.compile(r"step-(\d+)(\.replaced)?")
_LEFTOVER = re.compile(r"\.(?:tmp|trash)-step-.*-(\d+)")
_CHUNK = 64 << 20  # bytes read or written at a time; Linux writes no more than 2 GiB in one call
_SPARE = 1 << 20  # bytes of directories and file-system bookkeeping


class SaveFailed(InfrastructureError):  # noqa: N818 - it reads as what happened
    """Nothing was saved (disk full, over quota, no permission), and what was there before is untouched."""


@dataclass(frozen=True)
class Adapter:
    """One adapter as peft keeps it."""

    tensors: Mapping[str, "Tensor"]  # names as in peft's get_peft_model_state_dict
    config: Mapping[str, Any]  # adapter_config.json, as LoraConfig.to_dict() gives it


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a step is resumed from. What `save` takes, `load` returns, on the CPU."""

    step: int
    adapters: Mapping[str, Adapter]  # "adapter" is the policy's; "critic" and others lie beside it
    optimizer: Mapping[str, "Tensor"] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)  # what JSON holds: text, numbers, lists, mappings


def save(root: Path, checkpoint: Checkpoint) -> Path:
    """Writes `checkpoint` to `root/step-N` in one atomic step, and returns that folder.

    A process killed at any moment leaves the earlier checkpoints, and either all of this one or none of it. A step that
    exists already is replaced, or left alone when its content is the same.

    Raises:
        SaveFailed: the file system refused (full, over quota, read-only). Nothing of this step remains, and the earlier
            checkpoints are whole: training can go on and try again later.
    """
    files = _serialize(checkpoint)
    files[MANIFEST] = _manifest(checkpoint.step, files)  # written last: a dict keeps its order
    target = root / f"step-{checkpoint.step}"
    work = root / f".tmp-step-{checkpoint.step}-{os.getpid()}"
    try:
        if not root.is_dir():
            root.mkdir(parents=True)
            fsync_folder(root.parent)
        _remove_leftovers(root)
        if _fault(target) is None and (target / MANIFEST).read_bytes() == files[MANIFEST]:
            return target
        _check_space(root, sum(map(len, files.values())))
        for name, data in files.items():
            write_durably(work / name, data)
        for folder in sorted({(work / name).parent for name in files}):
            fsync_folder(folder)
        _commit(work, target)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        reason = error.strerror or error
        raise SaveFailed(
            f"step {checkpoint.step} was not saved below {root}: {reason}; earlier checkpoints are whole"
        ) from error
    return target


def load(path: Path) -> Checkpoint:
    """Reads a step's folder, after checking every file against the manifest. Raises UserError as `verify` does."""
    manifest = verify(path)
    names = sorted({match[1] for name in manifest["files"] if (match := _ADAPTER_FILE.fullmatch(name))})
    try:
        adapters = {
            name: Adapter(
                _unpack(path / name / ADAPTER_TENSORS), json.loads((path / name / ADAPTER_CONFIG).read_bytes())
            )
            for name in names
        }
        state = json.loads((path / STATE).read_bytes())
        return Checkpoint(manifest["step"], adapters, _unpack(path / OPTIMIZER), state)
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"checkpoint {path} holds something that lorl did not write: {error}") from None


def verify(path: Path, hashes: bool = True) -> dict[str, Any]:
    """Checks that a step's folder is what was saved, by names and sizes and, with `hashes`, by content.

    Returns:
        The manifest.

    Raises:
        UserError: `path` is no checkpoint, is of another version, or was cut short or changed.
    """
    manifest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            intact = size == entry["bytes"] and (not hashes or _sha256(file) == entry["sha256"])
        except OSError as error:
            raise UserError(f"checkpoint {path} is damaged: {name}: {error.strerror}") from None
        if not intact:
            how = (
                f"has {size} bytes of {entry['bytes']}" if size != entry["bytes"] else "is not what was saved (SHA-256)"
            )
            raise UserError(f"checkpoint {path} is damaged: {name} {how}")
    return manifest


def latest(root: Path) -> Path | None:
    """The newest step below `root` whose manifest holds, sizes and hashes. One that doesn't is skipped, with a warning
    that says which and why."""
    for folder in _steps(root):
        fault = _fault(folder)
        if fault is None:
            return folder
        log.warning("skipping it: %s", fault)
    return None


def prune(root: Path, keep: int | None, protect: Iterable[int] = ()) -> list[int]:
    """Removes the steps older than the newest `keep`, less those in `protect`. Call it once a newer one is committed.
    None keeps all.

    Folders that are not whole (by names and sizes) don't count towards `keep`: pruning never leaves damaged ones alone.

    Returns:
        The steps that were removed. What cannot be removed stays, with a warning.
    """
    if keep is None:
        return []
    whole, removed, protected = 0, [], set(protect)
    for folder in _steps(root):
        step = _step_of(folder)
        if whole < keep:
            whole += _fault(folder, hashes=False) is None
        elif step not in protected:
            try:
                _discard(folder)
                removed.append(step)
            except OSError as error:
                log.warning("old checkpoint %s cannot be removed: %s", folder, error.strerror or error)
    return removed


def write_durably(path: Path, data: bytes) -> None:
    """Creates or overwrites `path` with `data`, on the disk when this returns. Makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        rest = memoryview(data)
        while rest:  # a nearly full disk takes a part first and refuses the next
            rest = rest[os.write(descriptor, rest[:_CHUNK]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Puts the names in a folder on the disk: a rename survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Folders


def _steps(root: Path) -> list[Path]:
    """Step folders, newest first; `step-N.replaced` (left by a kill during replacement) comes after `step-N`."""
    found = [path for path in root.glob("step-*") if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_step_of(path), path.suffix == ""), reverse=True)


def _step_of(folder: Path) -> int:
    match = _STEP_FOLDER.fullmatch(folder.name)
    assert match
    return int(match[1])


def _commit(work: Path, target: Path) -> None:
    """Gives the finished `work` its name. A sound folder of that name is moved aside and lives until then."""
    replaced = target.with_name(target.name + ".replaced")
    if _fault(target) is None:
        _discard(replaced)
        os.rename(target, replaced)
    else:
        _discard(target)
    os.rename(work, target)
    fsync_folder(target.parent)
    with contextlib.suppress(OSError):  # the new one is committed; the old one goes at the next save
        _discard(replaced)


def _discard(folder: Path) -> None:
    """Removes a folder, first from sight: a half-removed one must not look like a checkpoint."""
    if folder.exists():
        trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _remove_leftovers(root: Path) -> None:
    """Removes what processes that no longer live left unfinished."""
    for path in root.glob(".*-step-*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)
    for replaced in root.glob("step-*.replaced"):
        if _fault(replaced.with_suffix("")) is None:
            _discard(replaced)


def _check_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed + _SPARE:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:.1f} MiB needed and {free / 2**20:.1f} MiB free on the disk")


# Content


def _serialize(checkpoint: Checkpoint) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for name, adapter in checkpoint.adapters.items():
        files[f"{name}/{ADAPTER_TENSORS}"] = _pack(adapter.tensors)
        files[f"{name}/{ADAPTER_CONFIG}"] = _json(adapter.config)
        if not _ADAPTER_FILE.fullmatch(f"{name}/{ADAPTER_CONFIG}"):
            raise ValueError(f"{name!r} cannot be an adapter's folder")
    files[OPTIMIZER] = _pack(checkpoint.optimizer)
    files[STATE] = _json(checkpoint.state)
    return files


def _pack(tensors: Mapping[str, "Tensor"]) -> bytes:
    import safetensors.torch

    # A copy each: safetensors refuses tensors that share memory, as the slices of a fused adapter do.
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(own, metadata={"format": "pt"})


def _unpack(path: Path) -> dict[str, "Tensor"]:
    import safetensors.torch

    return safetensors.torch.load(path.read_bytes())


def _json(value: Any) -> bytes:
    def plain(item: Any) -> Any:
        if isinstance(item, set | frozenset):  # peft keeps target_modules as a set
            return sorted(item)
        raise TypeError(f"{type(item).__name__} {item!r} does not go into JSON")

    return (json.dumps(value, indent=2, default=plain) + "\n").encode()


def _manifest(step: int, files: Mapping[str, bytes]) -> bytes:
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return _json({"format": FORMAT, "version": VERSION, "step": step, "files": entries})


def _fault(folder: Path, hashes: bool = True) -> str | None:
    """What is wrong with a step's folder, in a sentence; None if nothing is."""
    try:
        verify(folder, hashes)
    except UserError as error:
        return str(error)
    return None


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        steps = _steps(path) or _steps(path / "checkpoints")
        hint = f"; name a step's folder, such as {steps[0]}" if steps else ""
        raise UserError(f"{path} is not a checkpoint of lorl: it has no {MANIFEST}{hint}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of lorl: its {MANIFEST} is of another kind")
    if manifest.get("version") != VERSION:
        raise UserError(f"checkpoint {path} is of format {manifest.get('version')!r}; this lorl reads {VERSION}")
    if not _is_complete(manifest) or (_STEP_FOLDER.fullmatch(path.name) and _step_of(path) != manifest["step"]):
        raise UserError(f"checkpoint {path} is damaged: {MANIFEST} is not as lorl writes it")
    return manifest


def _is_complete(manifest: dict[str, Any]) -> bool:
    """Whether a manifest lists what a checkpoint needs and nothing else, so that no other path is ever opened."""
    files = manifest.get("files")
    if type(manifest.get("step")) is not int or not isinstance(files, dict):
        return False
    needed = {OPTIMIZER, STATE}
    for name in files:
        if match := _ADAPTER_FILE.fullmatch(name):
            needed |= {f"{match[1]}/{ADAPTER_TENSORS}", f"{match[1]}/{ADAPTER_CONFIG}"}
    return needed == set(files) and all(isinstance(e, dict) and {"bytes", "sha256"} <= set(e) for e in files.values())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
