"""What a run ran on, for `environment.json`; and what must never be written down: secrets."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("lorl", "torch", "transformers", "peft", "safetensors", "datasets", "numpy")

_SECRET_NAME = re.compile(r"(?:^|[_-])(?:token|key|apikey|secret|password|passwd|credentials?)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|AKIA)[A-Za-z0-9_-]{16,}")
_FLAG = re.compile(r"(?P<head>[-+~]*(?P<name>[\w.-]+)[=:])(?P<value>.+)", re.DOTALL)
_SHORTEST = 8  # characters; shorter values of variables named *_KEY are switches, and would match all over a text


def describe(argv: Sequence[str], folder: Path) -> dict[str, Any]:
    """Versions, machine, git state of `folder` and the command line without its secrets. Imports nothing heavy; the
    GPU is named only where torch is loaded already."""
    memory = psutil.virtual_memory().total
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    cores = os.cpu_count() or 1
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [redact(word) for word in _hide_named(argv)],
        "machine": f"{gpu or platform.machine()}, {cores} CPUs, {memory / 2**30:.1f} GiB of memory",
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": cores,
        "memory_bytes": memory,
        "gpu": gpu,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "git": git_state(folder),
    }


def free_memory() -> int:
    """Bytes of the host's memory that can still be had; at most this container's limit, where it has one."""
    free, limit = psutil.virtual_memory().available, cgroup_number("memory.max")
    return free if limit is None else min(free, limit)


def cgroup_number(name: str) -> int | None:
    """A figure of this process's cgroup (v2); None where there is none, or no limit."""
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the repository around `folder`; None where there is none, or no git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def redact(text: str) -> str:
    """`text` with every known secret replaced: values of environment variables named like one, and well-known forms."""
    for _, value in _secrets():
        text = text.replace(value, "***")
    return _SECRET_VALUE.sub("***", text)


def secret_in(text: str) -> str | None:
    """What secret `text` holds, by name, or None."""
    for name, value in _secrets():
        if value in text:
            return f"the value of ${name}"
    return "an access token" if _SECRET_VALUE.search(text) else None


def _secrets() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST:
            yield name, value


def _hide_named(argv: Sequence[str]) -> Iterator[str]:
    """The words of a command line, without values given to names such as `--api-key` or `reward.kwargs.token=`."""
    hide_next = False
    for word in argv:
        match = _FLAG.fullmatch(word)
        if match and _SECRET_NAME.search(match["name"].replace(".", "_")) and not word.startswith("data."):
            yield match["head"] + "***"
        else:
            yield "***" if hide_next else word
        hide_next = word.startswith("--") and "=" not in word and bool(_SECRET_NAME.search(word))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
