"""What `lorl plan` says of a run that was made here, and what nvidia-smi saw of it."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import torch

from lorl import settings
from lorl.parallel.sharding import shard_size
from lorl.plan.choose import Plan, make_plan
from lorl.plan.demand import demand_of
from lorl.plan.hardware import Cluster, described_gpu
from lorl.plan.layout import STRATEGIES, Layout


def plan_of(config_yaml: Path) -> Plan:
    """In the layout that the run had, on the GPU that is here. Raises ValueError where there is none."""
    if not (found := nvidia_smi("name", "memory.total")):
        raise ValueError("nvidia-smi sees no GPU")
    config = settings.load(config_yaml)
    parallel, engine = config.parallel, 1 if config.rollout.engine == "torch" else shard_size(config)
    strategy = next((one for one in STRATEGIES[1:] if one == parallel.strategy), None)
    layout = Layout(strategy, shard_size(config), engine, parallel.param_offload) if strategy else Layout("ddp")
    name, total = found[0][0], int(found[0][1]) * 2**20
    if torch.cuda.is_available():  # a run plans with what torch can have, some hundred MiB less
        total = torch.cuda.get_device_properties(0).total_memory
    gpu = described_gpu(name, total)
    return make_plan(demand_of(config)[0], layout, Cluster(gpu, parallel.gpus, parallel.nodes))


def nvidia_smi(*what: str) -> list[list[str]]:
    """A row for each GPU that this process sees; memory is in MiB."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(what)}", "--format=csv,noheader,nounits"]
    if seen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={seen}")
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [[cell.strip() for cell in line.split(",")] for line in lines]


class InUse:
    """Looks twice a second at what is in use on the fullest GPU, while it is open."""

    gib = 0.0  # the most

    def __enter__(self) -> "InUse":
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self.gib = max([self.gib, *(int(used) / 1024 for (used,) in nvidia_smi("memory.used"))])
