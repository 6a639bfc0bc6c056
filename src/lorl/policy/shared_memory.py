"""A model's files in /dev/shm: copied there once a node, mapped by all ranks, gone when nobody uses them any more.

Each process that uses a copy holds a lock on it for as long as it lives, which the kernel releases however it ends. The
one that made the copy leaves a process behind, `python -m lorl.policy.shared_memory`, that removes the copy when the
last lock is gone. What even that one's death leaves, the next run sweeps out.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lorl.errors import UserError

ROOT = Path("/dev/shm")
WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
_MANIFEST = "lorl-copy.json"
_TICK_S = 0.5
_GIB = 2**30
_AGAIN_S = 0.05  # until a rank that found others at the lock comes to it again
_held: dict[Path, int] = {}  # locks of this process, by copy


def shared(folder: Path) -> Path:
    """The copy of the model in `folder`, made now if there is none. It stays at least as long as this process.

    Raises UserError where there is no room for it.
    """
    root = _own_folder()
    files = wanted_files(folder)
    state = [(path.name, (found := path.stat()).st_size, found.st_mtime_ns) for path in files]
    key = hashlib.blake2b(json.dumps([str(folder.resolve()), state]).encode(), digest_size=12).hexdigest()
    copy = root / key
    sweep(but=copy)  # one that a killed run left is as good as new
    while copy not in _held:
        with _opened(copy.with_suffix(".lock")) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)  # waits for whoever copies
            if not _is_whole(copy):
                try:  # not to wait for it: who got it first keeps a shared lock on the finished copy as long as it runs
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(_AGAIN_S)
                    continue
                if _is_current(copy.with_suffix(".lock"), lock) and not _is_whole(copy):
                    _make(copy, files)
                    _leave_remover(copy)
                fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_current(copy.with_suffix(".lock"), lock) and _is_whole(copy):  # removed between the locks?
                _held[copy] = os.dup(lock)
    return copy


def wanted_files(folder: Path) -> list[Path]:
    """What of `folder` a copy holds."""
    return sorted({path for pattern in WANTED for path in folder.glob(pattern) if path.is_file()})


def sweep(*, but: Path | None = None) -> None:
    """Removes the copies that no process uses."""
    for lock in _folder().glob("*.lock"):
        if (copy := lock.with_suffix("")) != but:
            _remove_unused(copy)


def _folder() -> Path:
    return ROOT / f"lorl-{os.getuid()}"


def _own_folder() -> Path:
    """`_folder`, made if need be, where nobody else can put anything."""
    folder = _folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UserError(f"model.use_shm=true needs {ROOT} ({error.strerror}); set it to false") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"model.use_shm=true: {folder} is not a folder of yours alone; remove it")
    return folder


@contextlib.contextmanager
def _opened(lock: Path) -> Iterator[int]:
    """The lock's file. Its descriptor's copies share what is locked by it, until the last is closed."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_current(lock: Path, descriptor: int) -> bool:
    """Whether `descriptor` is of the file that has the lock's name: the one that removes a copy removes its lock."""
    try:
        return lock.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _is_whole(copy: Path) -> bool:
    try:
        sizes = json.loads((copy / _MANIFEST).read_text())
        return all((copy / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _make(copy: Path, files: list[Path]) -> None:
    sizes = {path.name: path.stat().st_size for path in files}
    unfinished = copy.with_suffix(".part")
    for left in (copy, unfinished):
        shutil.rmtree(left, ignore_errors=True)
    needed, free = sum(sizes.values()), min(shutil.disk_usage(ROOT).free, _available())
    if needed > free:
        raise UserError(
            f"model.use_shm=true: the model takes {needed / _GIB:.2f} GiB and {ROOT} has room for {free / _GIB:.2f}; "
            "set it to false, or enlarge it"
        )
    unfinished.mkdir()
    for path in files:
        shutil.copyfile(path, unfinished / path.name)
        if (unfinished / path.name).stat().st_size != sizes[path.name]:
            raise UserError(f"model.use_shm=true: {path} changed while it was copied; start again when it does not")
    (unfinished / _MANIFEST).write_text(json.dumps(sizes))
    unfinished.rename(copy)


def _available() -> int:
    """Bytes of memory that can still be had: what lies in /dev/shm takes it up."""
    import psutil

    return psutil.virtual_memory().available


def _leave_remover(copy: Path) -> None:
    """A process of nobody's: Ray ends the children of its workers with them."""
    subprocess.run(
        [sys.executable, "-m", "lorl.policy.shared_memory", str(copy)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=False,  # one that cannot start leaves a copy for the next run to sweep out
    )


def _remove_unused(copy: Path) -> bool:
    """Removes `copy` unless it is in use. Returns whether it is gone."""
    lock = copy.with_suffix(".lock")
    if not lock.exists():
        return True
    with _opened(lock) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_current(lock, descriptor):
            for left in (copy, copy.with_suffix(".part")):
                shutil.rmtree(left, ignore_errors=True)
            lock.unlink()
    return True


def main() -> None:
    if os.fork():
        return
    copy = Path(sys.argv[1])
    time.sleep(_TICK_S)  # whoever made it has yet to take its own lock
    while not _remove_unused(copy):
        time.sleep(_TICK_S)


if __name__ == "__main__":
    main()
