"""Rollouts that outlive their engine: one that fails on the way is rebuilt and asked for what is still missing."""

import logging
import traceback
from collections.abc import Generator, Sequence
from dataclasses import replace
from types import TracebackType

from lorl.errors import DivergedError, InfrastructureError, UserError
from lorl.experience import Completion
from lorl.rollout.engine import Engine, Request, Sampling

log = logging.getLogger("lorl")


class Rollouts:
    """Publishing to an engine and generating with it, over failures of the engine.

    An engine that raises is rebuilt, given what was published, and asked again: up to `retries` times in a rollout or a
    publish, then InfrastructureError. UserError and DivergedError pass: asking again would not change them.
    """

    def __init__(self, engine: Engine, retries: int) -> None:
        self._engine = engine
        self._retries = retries
        self._published: dict[str, tuple[int, str]] = {}  # name -> newest version, its checksum
        self._rebuilt = 0

    def publish(self, name: str, version: int, checksum: str) -> float:
        """`Engine.publish`; 0 seconds where a rebuilt engine got it with all others."""
        self._published[name] = (version, checksum)
        seconds = 0.0
        attempts = _Attempts(self._retries)
        while not attempts.succeeded:
            with attempts:
                if attempts.failures:
                    self._rebuild()  # publishes
                else:
                    seconds = self._engine.publish(name, version, checksum)
        return seconds

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None
    ) -> Generator[Completion]:
        """`Engine.generate`, every sample exactly once. The prompts' ids are distinct.

        What was yielded before a failure stays: the same version of the adapter makes the rest, and a sample's seed
        makes it the sample that it would have been (its log-probabilities up to how a smaller batch's sums round).
        """
        missing = {request.prompt.id: dict(enumerate(request.seeds)) for request in requests}
        attempts = _Attempts(self._retries)
        while not attempts.succeeded:
            with attempts:
                if attempts.failures:
                    self._rebuild()
                asked = {name: list(seeds) for name, seeds in missing.items() if seeds}
                again = [
                    Request(r.prompt, list(missing[r.prompt.id].values())) for r in requests if r.prompt.id in asked
                ]
                for completion in self._engine.generate(again, sampling, adapter=adapter):
                    name = completion.prompt.id
                    sample = asked[name][completion.sample]
                    if missing[name].pop(sample, None) is None:
                        raise InfrastructureError(f"sample {sample} of prompt {name!r} came twice")
                    yield replace(completion, sample=sample)
                if lost := sum(map(len, missing.values())):
                    raise InfrastructureError(f"{lost} samples never came")

    def take_rebuilt(self) -> int:
        """How often the engine was rebuilt since this was last asked."""
        rebuilt, self._rebuilt = self._rebuilt, 0
        return rebuilt

    def _rebuild(self) -> None:
        self._rebuilt += 1
        self._engine.rebuild()
        for name, (version, checksum) in self._published.items():
            self._engine.publish(name, version, checksum)


class _Attempts:
    """A context to enter until its body has come to its end. It swallows `retries` failures of the engine, and with
    each the frames that hold the failed engine's memory, so that there is room to rebuild it."""

    def __init__(self, retries: int) -> None:
        self.failures = 0
        self.succeeded = False
        self._retries = retries

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.succeeded = error is None
        if not isinstance(error, Exception) or isinstance(error, UserError | DivergedError):
            return False
        self.failures += 1
        cause = _cause(error)
        if self.failures > self._retries:
            raise InfrastructureError(
                f"the rollout engine failed {self.failures} times in one call (rollout.retries={self._retries}); the "
                f"last time: {cause}"
            ) from error
        log.warning("the rollout engine failed (%s); rebuilding it, retry %d", cause, self.failures)
        log.debug("the failure in full", exc_info=error)
        return True


def _cause(error: Exception) -> str:
    """The error in a line; one that says nothing, by where it was raised."""
    if text := str(error).strip():
        return f"{type(error).__name__}: {text}".splitlines()[0]
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {last.name} ({last.filename}:{last.lineno}: {last.line})"
