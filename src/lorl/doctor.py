"""What this machine has, what lorl will use of it, what is missing and the command that brings it."""

import importlib.metadata
import os
import platform
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lorl.config import RunConfig
from lorl.environment import cgroup_number
from lorl.policy.fetch import cache_dir
from lorl.rollout.vllm import versions
from lorl.tracking.console import Console

GIB = 2**30
NEEDED_MEMORY_GIB = 3.0  # what a 135M model in float32 takes to train, with its Python process
NEEDED_DISK_GIB = 1.0  # such a model's folder, and checkpoints

Status = Literal["ok", "note", "missing", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the diagnosis. `missing` is optional, `fail` keeps the main job from running."""

    name: str
    status: Status
    detail: str
    fix: str = ""  # the command or step that helps


def main(ask_hub: bool = False) -> int:
    """`lorl doctor`: print the diagnosis, return the exit code."""
    checks = doctor(ask_hub=ask_hub)
    print_checks(checks, Console())
    return exit_code(checks)


def doctor(models: Path | None = None, runs: Path | None = None, ask_hub: bool = False) -> list[Check]:
    """Look at this machine. Nothing is changed, and the network is used only with `ask_hub`.

    Args:
        models: where fetched models lie, one folder a model; None is lorl's cache.
        runs: where run folders go, which need not exist yet; None is `run.dir`'s default.
        ask_hub: ask the model hub for a reply, for five seconds at most.
    """
    models = cache_dir() / "models" if models is None else models
    runs = Path(RunConfig.model_validate({}).run.dir) if runs is None else runs
    checks = [_python(), *_requirements(), *_torch(), _threads(), _memory()]
    checks += [_disk("disk for models", models), _disk("disk for runs", runs), _models(models)]
    checks += [*_extras(), _vllm(), _hub(ask_hub)]
    return checks


def exit_code(checks: list[Check]) -> int:
    """0 if the main job can run here, 2 if not."""
    return 2 if any(check.status == "fail" for check in checks) else 0


def print_checks(checks: list[Check], console: Console) -> None:
    """One line a check, the fix below it, and a verdict."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        console.info(f"{check.status:>7}  {check.name:<{width}}  {check.detail}")
        if check.fix:
            console.info(f"{'':>7}  {'':<{width}}  -> {check.fix}")
    failed = [check.name for check in checks if check.status == "fail"]
    console.info(f"lorl cannot train here: see {', '.join(failed)}" if failed else "lorl can train here")


def _python() -> Check:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if tuple(map(int, platform.python_version_tuple()[:2])) >= (3, 11):
        return Check("python", "ok", detail)
    return Check("python", "fail", detail, "install Python 3.11 or later")


def _requirements() -> list[Check]:
    """The packages that lorl always needs, against the ranges that its own metadata states."""
    try:
        stated = importlib.metadata.requires("lorl") or []
    except importlib.metadata.PackageNotFoundError:
        return [Check("lorl", "fail", "not installed, so its requirements are unknown", "pip install -e .")]
    always = [requirement for requirement in map(Requirement, stated) if _applies(requirement, extra="")]
    return [check_requirement(requirement, _installed_version(requirement.name)) for requirement in always]


def check_requirement(requirement: Requirement, installed: str | None) -> Check:
    """Whether the installed version (None: absent) of a required package lies in its range."""
    wanted = f"{requirement.name}{requirement.specifier}"
    if installed is None:
        return Check(requirement.name, "fail", f"not installed, needs {wanted}", f"pip install '{wanted}'")
    if not requirement.specifier.contains(installed, prereleases=True):
        return Check(requirement.name, "fail", f"{installed} is outside {wanted}", f"pip install '{wanted}'")
    return Check(requirement.name, "ok", installed)


def _torch() -> list[Check]:
    """The devices, and what lorl will run on: device, dtype and engine."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return [Check("torch build", "fail", f"does not import: {error}", "pip install --force-reinstall torch")]
    if not torch.cuda.is_available():
        build = "CPU build" if torch.version.cuda is None else f"CUDA {torch.version.cuda} build, but no GPU is usable"
        used = Check("lorl will use", "ok", "device cpu, dtype float32, engine torch")
        return [Check("torch build", "ok" if torch.version.cuda is None else "note", build), used]
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(Check(f"GPU {index}", "ok", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"))
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    support = (
        Check("bf16", "ok", "supported") if bf16 else Check("bf16", "note", "not native", "set model.dtype=float32")
    )
    engine = "vllm" if versions.known() else "torch"
    used = Check("lorl will use", "ok", f"device cuda, dtype bfloat16, engine {engine}")
    return [Check("torch build", "ok", f"CUDA {torch.version.cuda} build"), *devices, support, used]


def _threads() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = _cgroup_cpus()
    if quota is not None and quota < usable:
        fix = f"set parallel.threads={max(1, int(quota))}: more threads than that wait for each other"
        return Check("CPU", "note", f"{usable} cores, of which the container may use {quota:g}", fix)
    limit = os.environ.get("OMP_NUM_THREADS")
    return Check("CPU", "ok", f"{usable} cores" + (f", OMP_NUM_THREADS={limit}" if limit else ""))


def _memory() -> Check:
    machine = psutil.virtual_memory()
    limit = cgroup_number("memory.max")
    total, free = machine.total / GIB, machine.available / GIB
    detail = f"{free:.1f} of {total:.1f} GiB available"
    if limit is not None and limit < machine.total:
        detail += f", {limit / GIB:.1f} GiB allowed to this container"
        free = min(free, limit / GIB)
    if free < NEEDED_MEMORY_GIB:
        fix = f"close other programs: the demo model takes about {NEEDED_MEMORY_GIB:g} GiB to train"
        return Check("memory", "fail", detail, fix)
    return Check("memory", "ok", detail)


def _disk(name: str, folder: Path) -> Check:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    detail = f"{free:.1f} GiB free at {folder}"
    if not os.access(existing, os.W_OK):
        return Check(name, "fail", f"{existing} is not writable", "choose another folder, or change its permissions")
    if free < NEEDED_DISK_GIB:
        return Check(name, "fail", detail, f"free at least {NEEDED_DISK_GIB:g} GiB")
    return Check(name, "ok", detail)


def _models(folder: Path) -> Check:
    names = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if names:
        return Check("fetched models", "ok", f"{', '.join(names)} in {folder}")
    return Check("fetched models", "missing", f"none in {folder}", "lorl model fetch smollm2-135m")


def _extras() -> list[Check]:
    """Each optional extra of lorl: installed, or the command that brings it."""
    try:
        metadata = importlib.metadata.metadata("lorl")
        stated = [Requirement(text) for text in importlib.metadata.requires("lorl") or []]
    except importlib.metadata.PackageNotFoundError:
        return []
    checks = []
    for extra in metadata.get_all("Provides-Extra") or []:
        if extra == "dev":
            continue
        needed = [r for r in stated if _applies(r, extra) and not _applies(r, "")]
        packages = [r for r in needed if canonicalize_name(r.name) != "lorl"]  # "demo" is made of other extras
        if packages:
            checks.append(_extra(extra, packages))
    return checks


def _extra(name: str, packages: list[Requirement]) -> Check:
    fix = f"pip install 'lorl[{name}]'"
    found = {requirement.name: _installed_version(requirement.name) for requirement in packages}
    if absent := [package for package, version in found.items() if version is None]:
        return Check(f"extra {name}", "missing", f"{', '.join(absent)} not installed", fix)
    old = [str(r) for r in packages if not r.specifier.contains(found[r.name] or "", prereleases=True)]
    detail = ", ".join(f"{package} {version}" for package, version in found.items())
    if old:
        return Check(f"extra {name}", "missing", f"{detail}, needs {', '.join(old)}", fix)
    return Check(f"extra {name}", "ok", detail)


def _vllm() -> Check:
    version = versions.installed()
    if versions.known():
        return Check("vllm", "ok", str(version))
    if version is not None:
        detail = f"{version} is none that lorl knows, which are {versions.SUPPORTED}; it takes the embedded engine"
    else:
        detail = "not installed; the embedded engine needs none of it"
    return Check("vllm", "missing", detail, f"{versions.INSTALL} on a GPU machine, else {versions.INSTALL_CPU}")


def _hub(ask: bool) -> Check:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Check("model hub", "note", "switched off by HF_HUB_OFFLINE")
    if not ask:
        return Check("model hub", "note", f"{endpoint}, not asked")
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5):
            return Check("model hub", "ok", f"{endpoint} answers")
    except (OSError, ValueError) as error:
        return Check(
            "model hub", "missing", f"{endpoint}: {error}", "use model folders, or set HF_ENDPOINT to a mirror"
        )


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cgroup_cpus() -> float | None:
    """CPUs that the container's quota allows, if it has one (cgroup v2: "QUOTA PERIOD" in microseconds)."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return None
