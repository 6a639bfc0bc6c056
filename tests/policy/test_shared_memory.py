"""A model in shared memory: copied once, used by all, gone when its last user is, however that one ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lorl.config import ModelConfig
from lorl.errors import UserError
from lorl.policy import shared_memory
from lorl.policy.load import load_base

USER = """
import sys
from pathlib import Path
from lorl.policy import shared_memory
shared_memory.ROOT = Path(sys.argv[1])
print(shared_memory.shared(Path(sys.argv[2])), flush=True)
sys.stdin.readline()
"""


class User:
    """A process that uses a copy until it is told to end."""

    def __init__(self, root: Path, model: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(root), str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def copy(self) -> Path:
        assert self.process.stdout is not None
        return Path(self.process.stdout.readline().strip())

    def end(self, number: int | None = None) -> None:
        if number is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
        else:
            self.process.send_signal(number)
        self.process.wait(10)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(shared_memory, "ROOT", folder)
    yield folder
    for copy in list(shared_memory._held):
        os.close(shared_memory._held.pop(copy))


def gone(root: Path, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while list(root.glob("lorl-*/*")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_many_ranks_have_one_copy_that_goes_with_the_last_of_them(root: Path, tiny_model: Path) -> None:
    users = [User(root, tiny_model) for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        (copy,) = set(pool.map(User.copy, users))
    assert (copy / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert copy.parent.stat().st_mode & 0o777 == 0o700
    users[0].end(signal.SIGKILL)
    users[1].end()
    users[2].end(signal.SIGKILL)
    time.sleep(1.5)
    assert shared_memory._is_whole(copy)
    users[3].end(signal.SIGKILL)
    assert gone(root)


SLOW_LOOK = """
import time
from lorl.policy import shared_memory
look = shared_memory._is_whole
def looks(copy):
    whole = look(copy)
    time.sleep(0.3)  # all are at the lock by now, and each has seen that there is no copy yet
    return whole
shared_memory._is_whole = looks
"""


def test_ranks_that_look_at_the_same_moment_do_not_wait_for_each_other_for_ever(
    root: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "USER", SLOW_LOOK + USER)
    users = [User(root, tiny_model) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        copies = list(pool.map(lambda user: user.copy(), users, timeout=60))
    assert len(set(copies)) == 1
    for user in users:
        user.end()


def test_the_next_run_sweeps_what_nobody_was_left_to_remove_and_takes_up_what_it_can_use(
    root: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "_leave_remover", lambda copy: None)  # killed too
    first = shared_memory.shared(tiny_model)
    written = (first / "model.safetensors").stat().st_ino
    os.close(shared_memory._held.pop(first))
    assert shared_memory.shared(tiny_model) == first
    assert (first / "model.safetensors").stat().st_ino == written
    os.close(shared_memory._held.pop(first))
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"another")
    second = shared_memory.shared(other)
    assert not first.exists()
    (other / "model.safetensors").write_bytes(b"changed")
    assert shared_memory.shared(other) != second
    shared_memory.sweep()
    assert second.exists()  # in use


def test_a_broken_copy_is_made_again(root: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_leave_remover", lambda copy: None)
    copy = shared_memory.shared(tiny_model)
    os.close(shared_memory._held.pop(copy))
    (copy / "model.safetensors").write_bytes(b"short")
    assert shared_memory.shared(tiny_model) == copy
    assert (copy / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()


def test_too_large_a_model_is_one_sentence(root: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_available", lambda: 1000)
    with pytest.raises(UserError, match=r"model.use_shm=true: the model takes .* has room for"):
        shared_memory.shared(tiny_model)
    assert not list(root.glob("lorl-*/*/"))


def test_a_folder_that_others_could_write_to_is_refused(root: Path, tiny_model: Path) -> None:
    (root / f"lorl-{os.getuid()}").mkdir(mode=0o777)
    (root / f"lorl-{os.getuid()}").chmod(0o777)
    with pytest.raises(UserError, match="is not a folder of yours alone"):
        shared_memory.shared(tiny_model)


def test_the_base_is_loaded_from_the_copy_and_keeps_its_name(
    root: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "_leave_remover", lambda copy: None)
    plain = load_base(ModelConfig(path=str(tiny_model)))
    model = load_base(ModelConfig(path=str(tiny_model), use_shm=True))
    assert len(shared_memory._held) == 1
    assert model.name_or_path == plain.name_or_path == str(tiny_model)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
