"""The workers of a run in many processes: one Ray actor a rank, each with a GPU (or a CPU process where there is none).

The driver holds no model. What it asks goes to all ranks at once; what they read travels through Ray's object store
once a node, and what they agree on comes back from rank 0. Gradients and the like do not pass here: the ranks sum them
among themselves (`lorl.parallel.group`).
"""

import os
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from lorl.config import RunConfig
from lorl.errors import DivergedError, InfrastructureError, LorlError, UserError
from lorl.experience import COMPUTED, Completion, Experience
from lorl.parallel import auto
from lorl.parallel.cluster import Cluster
from lorl.parallel.rank import Rank
from lorl.parallel.sharding import STRATEGIES
from lorl.parallel.split import share_requests
from lorl.parallel.workers import UpdateReport, WorkerState
from lorl.rollout.engine import Request, Sampling

GRACE_S = 3.0  # after one rank failed, for the others to say why: the first to fail is seldom the one to blame
CLOSE_LIMIT_S = 20.0


class RayWorkers:
    """`Workers` over Ray. `tell` gets what a user should know.

    Raises:
        UserError: the cluster has too few GPUs, or a rank found a mistake of the user's.
        InfrastructureError: a rank died, or did not come to a collective call in time (here and in every call).
    """

    def __init__(self, config: RunConfig, tell: Callable[[str], None]) -> None:
        self._stack = ExitStack()
        self._ranks: list[Any] = []
        self._failed = False
        self._travelled: tuple[Any, Any] = (None, None)  # the last forest, and its experience in the object store
        try:
            self._start(config, tell)
        except BaseException:
            self._failed = True
            self.close()
            raise

    def _start(self, config: RunConfig, tell: Callable[[str], None]) -> None:
        parallel = config.parallel
        cluster = self._stack.enter_context(Cluster(parallel.gpus * parallel.nodes))
        room = cluster.reserve(parallel.gpus, parallel.nodes, config.model.device)
        self._stack.callback(self._end_ranks)
        actor: Any = ray.remote(Rank)
        for rank in range(parallel.gpus * parallel.nodes):
            place = PlacementGroupSchedulingStrategy(room.group, rank // parallel.gpus)
            self._ranks.append(
                actor.options(
                    num_cpus=1, num_gpus=int(room.cuda), max_restarts=0, max_task_retries=0, scheduling_strategy=place
                ).remote(config, rank, os.getcwd())
            )
        if parallel.strategy == "auto":
            config = self._settle(config, tell)
            parallel = config.parallel
        kind = "GPUs" if room.cuda else "CPU processes"
        in_parts = parallel.strategy in STRATEGIES
        holding = "a share of each layer" if in_parts or parallel.strategy == "shared" else "the whole base"
        together = f"; {parallel.sequence} split each pass" if parallel.sequence > 1 else ""
        tell(f"{len(self._ranks)} ranks on {kind}, each with {holding}{together}")
        ((host, port),) = self._get([self._ranks[0].listen.remote()], "starting")
        for note in self._all("join", host, port, doing="loading")[0]:
            tell(note)
        cluster.watch()
        (self._reference,) = self._get([self._ranks[0].reference.remote()], "starting")
        (self._per_engine,) = self._get([self._ranks[0].ranks_per_engine.remote()], "starting")

    def _settle(self, config: RunConfig, tell: Callable[[str], None]) -> RunConfig:
        """A strategy in place of auto, here and in the ranks."""
        settled, why = auto.settle(config, self._all("device", doing="starting"))
        tell(why)
        self._all("take", settled, doing="starting")
        return settled

    @property
    def reference(self) -> str | None:
        return self._reference

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None
    ) -> Generator[Completion]:
        streams: dict[Any, int] = {}  # Ray's generators of references, and the rank that each comes from
        asked = share_requests(requests, sampling.max_tokens, len(self._ranks) // self._per_engine)
        asked = [part for part in asked for _ in range(self._per_engine)]
        for rank, part in enumerate(asked):
            stream = self._ranks[rank].generate.options(num_returns="streaming")
            streams[stream.remote(part.requests, sampling, adapter)] = rank
        failures: dict[int, RayError] = {}
        while streams:
            ready: Any = ray.wait(list(streams), num_returns=1, timeout=GRACE_S if failures else None)[0]
            if not ready:
                break
            rank = streams[ready[0]]
            try:
                batch: Any = ray.get(next(ready[0]))
            except StopIteration:
                del streams[ready[0]]
                continue
            except RayError as error:
                failures[rank] = error
                del streams[ready[0]]
                continue
            for completion in batch:
                yield replace(completion, sample=asked[rank].samples[completion.prompt.id][completion.sample])
        if failures:
            raise self._blamed(failures, "generating") from next(iter(failures.values()))

    def logprobs(self, experience: Experience, *, adapter: str | None) -> Tensor:
        return self._call("logprobs", self._send(experience), adapter=adapter)

    def logprobs_and_squares(self, experience: Experience) -> tuple[Tensor, Tensor]:
        return self._call("logprobs_and_squares", self._send(experience))

    def full_kl(self, experience: Experience) -> Tensor:
        return self._call("full_kl", self._send(experience))

    def values(self, experience: Experience) -> Tensor:
        return self._call("values", self._send(experience))

    def score(self, completions: Sequence[Completion]) -> list[float]:
        return self._call("score", ray.put(list(completions)))

    def update(self, experience: Experience, *, step: int, total_steps: int, kl_coef: float) -> UpdateReport:
        computed = {name: array for name in COMPUTED if (array := getattr(experience, name)) is not None}
        how = {"step": step, "total_steps": total_steps, "kl_coef": kl_coef}
        return self._all("update", self._send(experience), ray.put(computed), doing="updating", **how)[0]

    def publish(self) -> int:
        return self._call("publish")

    def save(self) -> WorkerState:
        return self._get([self._ranks[0].call.remote("save")], "saving")[0]

    def load(self, state: WorkerState, origin: str) -> None:
        self._call("load", ray.put(state), origin)

    def close(self) -> None:
        self._stack.close()

    def _send(self, experience: Experience) -> Any:
        """The experience in the object store, as it was packed. It goes there once, whatever reads it."""
        if self._travelled[0] is not experience.forest:
            packed = replace(experience, **dict.fromkeys(COMPUTED))
            self._travelled = (experience.forest, ray.put(packed))
        return self._travelled[1]

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._all("call", name, *args, doing=name, **kwargs)[0]

    def _all(self, method: str, *args: Any, doing: str, **kwargs: Any) -> list[Any]:
        return self._get([getattr(rank, method).remote(*args, **kwargs) for rank in self._ranks], doing)

    def _get(self, refs: list[Any], doing: str) -> list[Any]:
        """What the ranks answer. After a failure the others have a moment to fail as well."""
        found: dict[Any, Any] = {}
        failures: dict[int, RayError] = {}
        waiting = list(refs)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=GRACE_S if failures else None)
            if not ready:
                break
            try:
                found[ready[0]] = ray.get(ready[0])
            except RayError as error:
                failures[refs.index(ready[0])] = error
        if failures:
            raise self._blamed(failures, doing) from next(iter(failures.values()))
        return [found[ref] for ref in refs]

    def _blamed(self, failures: dict[int, RayError], doing: str) -> BaseException:
        """The failure to act on: the user's mistake, divergence, a rank that died, an error that nobody foresaw, and
        only then what the other ranks say of it."""
        self._failed = True
        causes = {rank: getattr(error, "cause", None) for rank, error in failures.items()}
        for kind in (UserError, DivergedError):
            for cause in causes.values():
                if isinstance(cause, kind):
                    return cause
        for rank, error in failures.items():
            if isinstance(error, RayActorError):
                return InfrastructureError(f"the process of rank {rank} died while {doing}{_manner(error)}")
        for error in failures.values():
            if isinstance(error, RayTaskError) and not isinstance(error.cause, LorlError):
                return error
        for cause in causes.values():
            if isinstance(cause, InfrastructureError):
                return cause
        return next(iter(failures.values()))

    def _end_ranks(self) -> None:
        if not self._failed:
            try:
                ray.get([rank.close.remote() for rank in self._ranks], timeout=CLOSE_LIMIT_S)
            except RayError:  # the run is over, and what does not end by itself is killed
                self._failed = True
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []


def _manner(error: RayError) -> str:
    """How, as far as Ray knows: NODE_OUT_OF_MEMORY, SYSTEM_ERROR (a signal, a lost connection) ..."""
    found = re.search(r"Worker exit type: (\w+)", str(error))
    return f" ({found[1]})" if found else ""
