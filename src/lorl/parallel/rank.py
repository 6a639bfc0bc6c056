"""One rank of a run over Ray: what runs inside its actor."""

import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lorl.config import RunConfig
from lorl.experience import Completion, Experience
from lorl.parallel.auto import Device, this_device
from lorl.parallel.group import SPARE_S, Ranks, stores
from lorl.parallel.local import local_worker
from lorl.parallel.shared import ranks_per_engine
from lorl.policy.load import load_tokenizer
from lorl.rollout.engine import Request, Sampling

BATCH_S = 0.1  # completions travel together that finish within so many seconds


class Rank:
    """A worker and its place in the group. Made in two steps: rank 0 has to listen before the others can join."""

    def __init__(self, config: RunConfig, rank: int, folder: str) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)  # relative paths in the configuration mean the driver's
        self._config = config
        self._rank = rank
        self._size = config.parallel.gpus * config.parallel.nodes
        self._limit_s = config.parallel.collective_limit_s

    def device(self) -> Device:
        """What this rank's part of the run has to fit."""
        return this_device(self._config)

    def take(self, config: RunConfig) -> None:
        """The configuration with what was decided since this rank began."""
        self._config = config

    def listen(self) -> tuple[str, int]:
        """Opens the store that the ranks meet at, for this machine alone where they are all on it. Returns where."""
        host = "127.0.0.1"
        if self._config.parallel.nodes > 1:
            from ray.util import get_node_ip_address

            host = get_node_ip_address()
        server = socket.create_server((host, 0))
        port = server.getsockname()[1]
        self._store = stores.TCPStore(
            host,
            port,
            self._size,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._limit_s),
            master_listen_fd=server.detach(),
        )
        return host, port

    def join(self, host: str, port: int) -> list[str]:
        """Joins the group and loads the worker. Returns what a user should know."""
        if self._rank:
            self._store = stores.TCPStore(host, port, self._size, timeout=timedelta(seconds=self._limit_s))
        cuda = torch.cuda.is_available() and self._config.model.device != "cpu"
        if host == "127.0.0.1":  # one machine: nothing else need reach the ranks
            loopback = "lo" if sys.platform == "linux" else "lo0"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
        torch.set_num_threads(self._config.parallel.threads or _threads(self._config.parallel.gpus))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=stores.PrefixStore("torch", self._store),
            rank=self._rank,
            world_size=self._size,
            timeout=timedelta(seconds=self._limit_s + SPARE_S),
        )
        self._notes: list[str] = []
        group = Ranks(self._store, self._limit_s, sequence=self._config.parallel.sequence)
        self._worker = local_worker(self._config, load_tokenizer(self._config.model), self._notes.append, group)
        group.gather("loaded", "loading")
        return self._notes

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls the worker's method `name`; what it returns goes back from rank 0 alone, being the same on all."""
        found = getattr(self._worker, name)(*args, **kwargs)
        return found if self._rank == 0 else None

    def update(self, experience: Experience, computed: dict[str, Any], **kwargs: Any) -> Any:
        """`call("update")` with the arrays that were computed since the experience travelled."""
        for name, array in computed.items():
            setattr(experience, name, array)
        return self.call("update", experience, **kwargs)

    def ranks_per_engine(self) -> int:
        """How many ranks sample as one, from the same requests."""
        return ranks_per_engine(self._config)

    def reference(self) -> str | None:
        return self._worker.reference

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, adapter: str | None
    ) -> Iterator[list[Completion]]:
        """This rank's own requests answered, a few answers at a time; by the first of the ranks that sample as one."""
        answers = self._worker.generate(requests, sampling, adapter=adapter)
        if self._rank % self.ranks_per_engine():
            deque(answers, maxlen=0)
        else:
            yield from _batches(answers)

    def close(self) -> None:
        self._worker.close()
        dist.destroy_process_group()


def _batches(completions: Iterable[Completion]) -> Iterator[list[Completion]]:
    batch: list[Completion] = []
    sent = time.monotonic()
    for completion in completions:
        batch.append(completion)
        if time.monotonic() - sent > BATCH_S:
            yield batch
            batch, sent = [], time.monotonic()
    if batch:
        yield batch


def _threads(ranks: int) -> int:
    """A rank's part of the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)
