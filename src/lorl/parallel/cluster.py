"""The Ray cluster of a run: its own, which lives as long as the run does, or the one that RAY_ADDRESS names."""

import contextlib
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lorl.errors import InfrastructureError, UserError
from lorl.rewards.processes import descendants

RESERVATION_LIMIT_S = 120.0  # for a cluster that grows on demand
END_LIMIT_S = 40.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for the ranks, which holds until the cluster is left."""

    group: Any  # Ray's placement group: a bundle a node
    cuda: bool  # a GPU for each rank; else a CPU process


class Cluster:
    """A context in which Ray is connected: as it is already, to RAY_ADDRESS, or to a cluster made for `ranks`. What it
    started ends with it."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._watcher: subprocess.Popen[bytes] | None = None  # of a cluster of the run's own
        self._strangers: list[int] = []  # children that this process had before
        self._stack = ExitStack()

    def __enter__(self) -> "Cluster":
        import ray

        if ray.is_initialized():
            return self
        try:
            if os.environ.get("RAY_ADDRESS"):
                _init(address="auto")
            else:
                self._start()
            self._stack.callback(ray.shutdown)
            self.watch()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        """A cluster on this machine alone."""
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "lorl.parallel.watcher"], stdin=subprocess.PIPE, start_new_session=True
        )
        self._stack.callback(_end, self._watcher)
        self._strangers = descendants(os.getpid())
        _init(num_cpus=self._ranks, _node_ip_address="127.0.0.1", include_dashboard=False)

    def watch(self) -> None:
        """Has all processes that the cluster consists of by now end with this one, however it ends."""
        if self._watcher is not None and self._watcher.stdin is not None:
            found = descendants(os.getpid(), skip=self._strangers)
            with contextlib.suppress(BrokenPipeError):
                self._watcher.stdin.write(f"{' '.join(map(str, found))}\n".encode())
                self._watcher.stdin.flush()

    def reserve(self, ranks_per_node: int, nodes: int, device: str) -> Reservation:
        """Room for `ranks_per_node` on each of `nodes`: GPUs where the cluster has any and `device` (model.device)
        allows them, else CPU processes. Raises UserError when there is less."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        ranks = ranks_per_node * nodes
        if gpus and gpus < ranks:
            raise UserError(
                f"parallel.gpus={ranks_per_node} on parallel.nodes={nodes} needs {ranks} GPUs and Ray sees {gpus}; "
                "lower parallel.gpus, or set RAY_ADDRESS to a larger cluster"
            )
        if device == "cuda" and not gpus:
            raise UserError("model.device=cuda: Ray sees no GPU in its cluster; use model.device=cpu or auto")
        bundle = {"CPU": float(ranks_per_node)} | ({"GPU": float(ranks_per_node)} if gpus else {})
        group = placement_group([bundle] * nodes, strategy="STRICT_PACK" if nodes == 1 else "SPREAD")
        self._stack.callback(remove_placement_group, group)
        if not group.wait(RESERVATION_LIMIT_S):
            raise UserError(
                f"Ray found no room for {nodes} x {ranks_per_node} ranks within {RESERVATION_LIMIT_S:g} s; it has "
                f"{_described(ray.cluster_resources())}: lower parallel.gpus or parallel.nodes"
            )
        return Reservation(group, bool(gpus))


def set_environment() -> None:
    """What Ray reads when it is imported, unless the user has set it. Nobody else can talk to a cluster of the run's
    own: its token is in no file. (Ray would make one that all on the machine can read.)"""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")  # the autoscaler's advice between our lines
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU ranks see no GPUs, and Ray does not warn
    if not os.environ.get("RAY_ADDRESS") and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _init(**arguments: Any) -> None:
    import ray

    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=True, namespace=f"lorl-{secrets.token_hex(8)}", **arguments)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}" if "address" in arguments else "on this machine"
        raise InfrastructureError(f"Ray did not start ({where}): {str(error).strip().splitlines()[0]}") from error


def _end(watcher: subprocess.Popen[bytes]) -> None:
    """What Ray left running is gone when this returns."""
    assert watcher.stdin is not None
    watcher.stdin.close()
    try:
        watcher.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        watcher.kill()


def _described(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}s" for kind in ("GPU", "CPU"))
