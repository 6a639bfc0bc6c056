"""RewardPool: the trainer's side of grading.

One dispatcher thread for each worker takes a call off a queue, sends it, and waits for the answer until the deadline. A
worker that is late, died or grew is killed with all that it started, and forked anew.
"""

import contextlib
import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import asdict, dataclass, field
from typing import Any, Self, get_args

from lorl.config import RewardConfig
from lorl.errors import InfrastructureError, UserError
from lorl.experience import Outcome, OutcomeStatus
from lorl.rewards import wire
from lorl.rewards.forkserver import FORK, KILL, MAX_DESCENDANTS, REPLY, REQUEST
from lorl.rewards.resolve import function_name, resolve

LOAD_DEADLINE_S = 120.0  # importing graders or the user's file, on a busy machine
CLOSE_DEADLINE_S = 10.0
MAX_SERVER_RESTARTS = 10

# Workers compute nothing worth a thread, and must not take a GPU's memory.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True, slots=True)
class RewardRequest:
    """One completion to grade; verl's four arguments, all of them JSON-able (numpy values are converted)."""

    data_source: str
    solution: str
    ground_truth: Any = None
    extra_info: dict[str, Any] = field(default_factory=dict)

    def encoded(self) -> bytes:
        return json.dumps(asdict(self), default=_plain).encode()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return value.tolist()
    raise UserError(
        f"a {type(value).__name__} in ground_truth or extra_info can't be passed to a reward; use JSON types"
    )


@dataclass(frozen=True, slots=True)
class Call:
    """What one call of the reward function grades."""

    requests: list[bytes]
    futures: "list[Future[Outcome]]"

    def begin(self) -> bool:
        """Mark the futures as running; False when all of them were cancelled."""
        wanted = [future.set_running_or_notify_cancel() for future in self.futures]
        return any(wanted)

    def settle(self, outcomes: list[Outcome]) -> None:
        for future, outcome in zip(self.futures, outcomes, strict=True):
            if not future.cancelled():
                future.set_result(outcome)

    def fail(self, error: BaseException) -> None:
        for future in self.futures:
            if not future.done():
                future.set_exception(error)


class RewardPool:
    """Grades completions in `config.workers` processes that can be killed.

    The constructor checks the configuration against the data sources of the run and waits until a worker has loaded its
    grader: UserError for everything that the user has to fix. Use as a context manager, or call `close`.
    """

    def __init__(self, config: RewardConfig, data_sources: Iterable[str] = ()) -> None:
        self._graders = resolve(config, data_sources)
        self._config = config
        self._name = function_name(config) if config.path else config.name
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._server = Server({} if config.path else self._graders)
        self._loaded: Future[None] = Future()
        self._threads = [
            threading.Thread(target=self._dispatch, name=f"reward-{slot}", daemon=True)
            for slot in range(config.workers)
        ]
        for thread in self._threads:
            thread.start()
        try:
            self._loaded.result()
        except BaseException:
            self.close()
            raise

    def submit(self, requests: list[RewardRequest]) -> "list[Future[Outcome]]":
        """Queue requests for grading and return at once, one future for each, in order.

        With `reward.batched` they go to the function in one call, under one deadline. A future's result raises
        InfrastructureError only when workers can't be started at all.
        """
        if self._closed.is_set():
            raise ValueError("the reward pool is closed")
        encoded = [request.encoded() for request in requests]
        futures: list[Future[Outcome]] = [Future() for _ in requests]
        if not self._config.batched:
            for request, future in zip(encoded, futures, strict=True):
                self._calls.put(Call([request], [future]))
        elif requests:
            self._calls.put(Call(encoded, futures))
        return futures

    def close(self) -> None:
        """End all workers and what they started; futures that are not done are cancelled."""
        self._closed.set()
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            for future in call.futures if call else []:
                future.cancel()
        for _ in self._threads:
            self._calls.put(None)
        self._server.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _dispatch(self) -> None:
        """One thread's life: a worker, and the calls that it grades."""
        worker = None
        try:
            worker = self._start_worker()
            self._report_loaded(None)
        except BaseException as error:
            self._report_loaded(error)
        while (call := self._calls.get()) is not None:
            if not call.begin():
                continue
            try:
                worker = self._grade(call, worker)
            except BaseException as error:  # nobody may wait for a future that no thread will set
                worker = None
                call.fail(CancelledError() if self._closed.is_set() else error)

    def _report_loaded(self, error: BaseException | None) -> None:
        with contextlib.suppress(InvalidStateError):  # another worker was first
            self._loaded.set_exception(error) if error else self._loaded.set_result(None)

    def _start_worker(self) -> "Worker":
        """A worker that has loaded its grader; UserError when the grader can't be loaded."""
        worker = self._server.fork()
        config = self._config
        spec = {
            "name": self._name,
            "path": config.path and os.path.abspath(config.path),
            "kwargs": config.kwargs,
            "batched": config.batched,
            "graders": self._graders,
            "memory_mib": config.memory_mib,
        }
        try:
            worker.channel.settimeout(LOAD_DEADLINE_S)
            wire.send(worker.channel, spec)
            reply = wire.receive(worker.channel, time.monotonic() + LOAD_DEADLINE_S)
            problem = reply["error"]
        except TimeoutError:
            problem = f"loading took more than {LOAD_DEADLINE_S:.0f} s"
        except (OSError, EOFError, ValueError, TypeError, KeyError):
            problem = None
        else:
            if problem is None:
                return worker
        ended = self._server.kill(worker)
        where = f"reward.path={config.path}" if config.path else f"reward.name={config.name}"
        raise UserError(f"{where}: {problem or f'the worker {ended} while loading'}")

    def _grade(self, call: Call, worker: "Worker | None") -> "Worker | None":
        """Settle the call's futures; returns the worker for the next call, None when that needs a new one."""
        if worker is not None and not worker.idle():  # died since its last call, through a thread that this one left
            self._server.kill(worker)
            worker = None
        try:
            worker = worker or self._start_worker()
        except UserError as error:
            call.settle([Outcome("crashed", detail=f"no worker: {error}")] * len(call.futures))
            return None
        outcomes, reusable = self._outcomes(call, worker)
        if self._closed.is_set() and not reusable:
            raise CancelledError
        call.settle(outcomes)
        return worker if reusable else None

    def _outcomes(self, call: Call, worker: "Worker") -> tuple[list[Outcome], bool]:
        """The outcomes of one call, and whether the worker can take another; it is dead if not."""
        count = len(call.requests)
        start = time.monotonic()
        try:
            worker.channel.settimeout(self._config.deadline_s)
            wire.send_encoded(worker.channel, b"[" + b",".join(call.requests) + b"]")
            reply = wire.receive(worker.channel, start + self._config.deadline_s)
            seconds = (time.monotonic() - start) / count
            outcomes = [_outcome(result, seconds) for result in reply["results"]]
            if len(outcomes) != count:
                raise ValueError(f"{len(outcomes)} results for {count} requests")
            if reply["reusable"]:
                return outcomes, True
            self._server.kill(worker)
            return outcomes, False
        except TimeoutError:
            self._server.kill(worker)
            status, detail = "timeout", f"took longer than reward.deadline_s={self._config.deadline_s:g}"
        except (OSError, EOFError):
            status, detail = "crashed", f"the worker {self._server.kill(worker)}"
        except (ValueError, TypeError, KeyError) as error:
            self._server.kill(worker)
            status, detail = "crashed", f"the worker sent garbage: {error}"
        seconds = (time.monotonic() - start) / count
        return [Outcome(status, detail=detail, seconds=seconds)] * count, False


def _outcome(result: dict[str, Any], seconds: float) -> Outcome:
    """A worker's result, checked: user code could have written to the socket. ValueError, TypeError or KeyError."""
    status, reward, extras = result["status"], result["reward"], dict(result["extras"])
    if status not in get_args(OutcomeStatus) or (status == "ok") != (reward is not None):
        raise ValueError(f"status {status!r} with reward {reward!r}")
    if reward is not None and not math.isfinite(reward):
        raise ValueError(f"reward {reward!r}")
    if not all(isinstance(value, float | str) for value in extras.values()):
        raise ValueError("extras that are neither numbers nor strings")
    return Outcome(status, None if reward is None else float(reward), str(result["detail"]), extras, seconds)


@dataclass(frozen=True, slots=True, eq=False)
class Worker:
    """A forked worker: its number at the fork server that is its parent, and its socket."""

    number: int
    channel: socket.socket
    server: "subprocess.Popen[bytes]"

    def idle(self) -> bool:
        """Whether it is alive and silent, as a worker without a call has to be."""
        self.channel.setblocking(False)
        try:
            self.channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False


class Server:
    """The fork server process, restarted when something kills it. Thread-safe; one request at a time."""

    def __init__(self, graders: dict[str, str]) -> None:
        self._graders = graders
        self._lock = threading.Lock()
        self._restarts_left = MAX_SERVER_RESTARTS
        self._closed = False
        self._process, self._control = self._launch()

    def _launch(self) -> "tuple[subprocess.Popen[bytes], socket.socket]":
        ours, theirs = socket.socketpair()
        ours.settimeout(LOAD_DEADLINE_S)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "lorl.rewards.forkserver", str(theirs.fileno()), json.dumps(self._graders)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **WORKER_ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer
            )
        return process, ours

    def fork(self) -> Worker:
        """A new worker, not yet told what to load. InfrastructureError when the server keeps dying."""
        with self._lock:
            while True:
                if self._closed:
                    raise CancelledError
                ours, theirs = socket.socketpair()
                try:
                    with theirs:
                        number, _, _ = self._ask(FORK, 0, theirs)
                    return Worker(number, ours, self._process)
                except OSError:
                    ours.close()
                    self._restart()

    def kill(self, worker: Worker) -> str:
        """End a worker and all that it started. Returns how it ended, for people: '… exited with code 3'."""
        worker.channel.close()
        with self._lock:
            if self._closed or worker.server is not self._process:
                return "ended with its fork server"  # by PR_SET_PDEATHSIG
            try:
                _, status, bomb = self._ask(KILL, worker.number)
            except OSError:
                return "ended with its fork server"
        if bomb:
            return f"was killed: it had started more than {MAX_DESCENDANTS} processes"
        code = os.waitstatus_to_exitcode(status)
        return f"exited with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._control.shutdown(socket.SHUT_RDWR)  # a plain fork of the trainer may hold a copy of it open
            self._control.close()
            try:
                self._process.wait(CLOSE_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _ask(self, operation: bytes, number: int, attached: socket.socket | None = None) -> tuple[int, int, bool]:
        """One request; OSError when the server is gone or does not answer."""
        fds = [attached.fileno()] if attached else []
        socket.send_fds(self._control, [REQUEST.pack(operation, number)], fds)
        reply = self._control.recv(REPLY.size, socket.MSG_WAITALL)
        if len(reply) < REPLY.size:
            raise ConnectionResetError("the fork server is gone")
        return REPLY.unpack(reply)

    def _restart(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()
        if not self._restarts_left:
            raise InfrastructureError(f"the reward workers' fork server died {MAX_SERVER_RESTARTS + 1} times")
        self._restarts_left -= 1
        self._process, self._control = self._launch()
