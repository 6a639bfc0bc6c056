"""Ranks as forked processes, without Ray: `Workers` for a real Trainer in the test's own process. A second each."""

import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from lorl.config import RunConfig
from lorl.experience import Completion
from lorl.parallel.rank import Rank
from lorl.parallel.split import share_requests
from lorl.rollout.engine import Request, Sampling


class ForkedRanks:
    """As `RayWorkers`, over pipes."""

    def __init__(self, config: RunConfig) -> None:
        context = get_context("fork")
        size = config.parallel.gpus * config.parallel.nodes
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(config, rank, theirs, [*self._pipes, ours]), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        host, port = self._each("listen", [((), {})])[0]
        self.notes = self._all("join", host, port)[0]
        self.reference = self._all("reference")[0]
        self._per_engine = self._all("ranks_per_engine")[0]

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None
    ) -> Generator[Completion]:
        asked = share_requests(requests, sampling.max_tokens, len(self._pipes) // self._per_engine)
        asked = [part for part in asked for _ in range(self._per_engine)]
        found = self._each("generate", [((part.requests, sampling, adapter), {}) for part in asked])
        for part, batches in zip(asked, found, strict=True):
            for completion in (completion for batch in batches for completion in batch):
                yield replace(completion, sample=part.samples[completion.prompt.id][completion.sample])

    def save(self) -> Any:
        return self._each("call", [(("save",), {})])[0]

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self._all("call", name, *args, **kwargs)[0]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()

    def _all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return self._each(method, [(args, kwargs)] * len(self._pipes))

    def _each(self, method: str, calls: Sequence[tuple[Any, Any]]) -> list[Any]:
        """Of the first ranks, as many as there are calls."""
        pipes = self._pipes[: len(calls)]
        for pipe, (args, kwargs) in zip(pipes, calls, strict=True):
            pipe.send((method, args, kwargs))
        answers = [pipe.recv() for pipe in pipes]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers


def _serve(config: RunConfig, rank: int, pipe: Any, others: Sequence[Any]) -> None:
    for other in others:
        other.close()
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    served = Rank(config, rank, os.getcwd())
    while True:
        try:
            method, args, kwargs = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            found = getattr(served, method)(*args, **kwargs)
            pipe.send(list(found) if method == "generate" else found)
        except Exception as error:
            pipe.send(error)
