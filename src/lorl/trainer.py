"""The loop. It holds no tensors of the model, and knows neither FSDP nor Ray nor vLLM: it talks to `Workers`.

    prompts -> Workers.generate -> rewards -> Experience -> advantages -> Workers.update -> Workers.publish

What is drawn in step N depends on (seed, N) alone, and what carries from step to step is in the checkpoint: a run that
was killed and resumed computes the numbers of the run that was not.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorl import checkpoint as checkpoints
from lorl import metrics as measure
from lorl.algorithms.kl import AdaptiveKL, FixedKL
from lorl.checkpoint import Adapter, Checkpoint, SaveFailed
from lorl.config import RunConfig
from lorl.data.loader import PromptLoader
from lorl.errors import DivergedError, UserError
from lorl.estimation import estimate
from lorl.evaluation import Evaluation, evaluate
from lorl.experience import Prompt
from lorl.interrupt import StopRequest
from lorl.objective import Objective
from lorl.packing import pack
from lorl.parallel.workers import UpdateReport, Workers, WorkerState
from lorl.policy.load import TRAINED
from lorl.rewards.pool import RewardPool
from lorl.run_folder import RunFolder
from lorl.sampler import Sampler
from lorl.samples import Collector, Sample
from lorl.tracking.console import Console
from lorl.tracking.trackers import Trackers

ADAPTER_FOLDER = "adapter"  # the trained adapter's name in a checkpoint


@dataclass(slots=True)
class Progress:
    """What carries from step to step besides the workers' state: JSON, in every checkpoint."""

    step: int = 0
    cursor: int = 0  # prompts taken off the data
    kl: dict[str, float] = field(default_factory=dict)  # the KL coefficient's controller
    skipped_in_a_row: int = 0
    ungraded_in_a_row: int = 0
    seconds: float = 0.0
    rollout_tokens: int = 0
    trained_tokens: int = 0
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None  # the newest evaluation
    best: dict[str, Any] | None = None  # {"step", "accuracy"}


@dataclass(slots=True)
class Trainer:
    """A run whose parts are set up (see `lorl.setup`), from its first or its resumed step to its end."""

    config: RunConfig
    workers: Workers
    pool: RewardPool | None  # None: no rule is asked
    loader: PromptLoader
    val: Sequence[Prompt]
    folder: RunFolder
    trackers: Trackers
    console: Console
    total_steps: int
    progress: Progress = field(default_factory=Progress)
    unsaved: SaveFailed | None = None  # why the last checkpoint is missing
    told: set[str] = field(default_factory=set)  # kinds of failed rewards that the console has named
    objective: Objective = field(init=False)
    collector: Collector = field(init=False)
    sampler: Sampler = field(init=False)
    kl: FixedKL | AdaptiveKL = field(init=False)

    def __post_init__(self) -> None:
        config, algorithm = self.config, self.config.algorithm
        self.objective = Objective.of(config)
        self.collector = Collector(config, self.workers, self.pool)
        self.sampler = Sampler(config, self.collector, self.loader, self.console)
        self.kl = (
            AdaptiveKL(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon)
            if algorithm.kl_control == "adaptive"
            else FixedKL(algorithm.kl_coef)
        )

    def run(self) -> dict[str, Any] | None:
        """Trains to the end and returns the summary, or saves and returns None when asked to stop.

        Raises:
            DivergedError: non-finite steps in a row, or an engine that samples from something else than the policy.
            SaveFailed: the last checkpoint could not be written.
            UserError: no reward of several steps in a row came to anything; what was learned before is saved.
        """
        with StopRequest(self.console.warn) as stop:
            self.workers.publish()
            if self.progress.step == 0 and self.val and self.config.trainer.eval_before:
                found = self._evaluate("evaluating before training")
                self.progress.before = found.summary()
                self.trackers.log(0, found.metrics())
                self.console.info(f"before training: {found.sentence()}")
            with self.console.training(self.total_steps, self.progress.step):
                while self.progress.step < self.total_steps and not stop.requested:
                    self._step()
            self._save()
            if self.unsaved is not None:
                raise self.unsaved
            if self.progress.step < self.total_steps:
                self.console.info(
                    f"stopped by {stop.requested} after step {self.progress.step} of {self.total_steps}, saved; "
                    f"go on with the same command and run.name={self.folder.path.name}"
                )
                return None
            return self._finish()

    def resume(self, source: Path) -> None:
        """Takes up the checkpoint in `source`. Raises UserError when it doesn't fit this run's base or adapter."""
        saved = checkpoints.load(source)
        adapters = {
            TRAINED if name == ADAPTER_FOLDER else name: (dict(adapter.tensors), dict(adapter.config))
            for name, adapter in saved.adapters.items()
        }
        self.workers.load(WorkerState(adapters, dict(saved.optimizer), saved.state["workers"]), str(source))
        self.progress = Progress(**saved.state["progress"])
        self.kl.load(self.progress.kl)
        self.console.info(f"resuming {self.folder.path.name} after step {self.progress.step} (from {source})")

    def _step(self) -> None:
        step, started = self.progress.step + 1, time.perf_counter()
        batch = self.sampler.batch(step, self.progress.cursor)
        rolled_out = time.perf_counter()
        values = measure.of_samples(batch.drawn) | batch.metrics
        self._tell_failed(step, batch.drawn)
        experience = pack([s.completion for s in batch.samples], [s.outcome for s in batch.samples])
        values |= estimate(
            experience,
            batch.samples,
            workers=self.workers,
            objective=self.objective,
            kl_coef=self.kl.coef,
            greedy_rewards=lambda: self.sampler.greedy_rewards(batch.samples),
        )
        estimated = time.perf_counter()
        report = self.workers.update(experience, step=step, total_steps=self.total_steps, kl_coef=self.kl.coef)
        updated = time.perf_counter()
        self._check(report)
        self.workers.publish()
        published = time.perf_counter()
        values |= measure.of_update(report, experience)
        values |= self._control_kl(values, len(batch.samples))
        self.folder.write_rollouts(step, [sample.row(step) for sample in batch.drawn])
        rollout_tokens = sum(len(sample.completion.tokens) for sample in batch.drawn)
        self.progress.step, self.progress.cursor = step, batch.cursor
        self.progress.rollout_tokens += rollout_tokens
        self.progress.trained_tokens += report.trained_tokens
        values |= self._evaluate_if_due(step)
        values |= measure.of_machine(
            step_s=time.perf_counter() - started,
            rollout_s=rolled_out - started,
            estimate_s=estimated - rolled_out - values.get("time/greedy_s", 0.0),
            update_s=updated - estimated,
            publish_s=published - updated,
            rollout_tokens=rollout_tokens,
            trained_tokens=report.trained_tokens,
        )
        self.progress.seconds += values["time/step_s"]
        self.trackers.log(step, values)
        self.console.step(step, values, self.total_steps)
        self._save_if_due(step)
        self._check_graded(step, batch.drawn)

    def _control_kl(self, values: Mapping[str, float], samples: int) -> dict[str, float]:
        """Moves the KL coefficient after a step, where it is adaptive. Returns the one that the step used."""
        if not self.config.algorithm.kl_coef:
            return {}
        used = self.kl.coef
        if "policy/kl" in values:
            self.kl.update(values["policy/kl"], samples)
        self.progress.kl = self.kl.state()
        return {"policy/kl_coef": used}

    def _tell_failed(self, step: int, samples: Sequence[Sample]) -> None:
        """Names each kind of failed reward once. How many there are is in every step's line and metrics."""
        for outcome in (sample.outcome for sample in samples):
            if outcome.status != "ok" and outcome.status not in self.told:
                self.told.add(outcome.status)
                self.console.warn(
                    f"step {step}: a reward came to {outcome.status!r} ({outcome.detail}) and its sample does not "
                    f"count; rollouts/step-{step}.jsonl says which"
                )

    def _check(self, report: UpdateReport) -> None:
        if report.skipped is None:
            self.progress.skipped_in_a_row = 0
            return
        self.progress.skipped_in_a_row += 1
        self.console.warn(f"optimizer step skipped, adapter unchanged: {report.skipped}")
        if self.progress.skipped_in_a_row >= self.config.trainer.max_skipped_steps:
            raise DivergedError(
                f"{self.progress.skipped_in_a_row} steps in a row were not finite ({report.skipped}); the last "
                "checkpoint is from before. Lower optim.lr, or raise trainer.max_skipped_steps to wait longer."
            )

    def _check_graded(self, step: int, samples: Sequence[Sample]) -> None:
        """A reward that never comes to anything teaches nothing, however long the run: it ends, and can go on later."""
        failed = Counter(sample.outcome.status for sample in samples if sample.outcome.reward is None)
        if failed.total() < len(samples):
            self.progress.ungraded_in_a_row = 0
            return
        self.progress.ungraded_in_a_row += 1
        if self.progress.ungraded_in_a_row < self.config.trainer.max_skipped_steps:
            return
        self._save()
        status = failed.most_common(1)[0][0]
        detail = next(sample.outcome.detail for sample in samples if sample.outcome.status == status)
        raise UserError(
            f"no sample was graded in {self.progress.ungraded_in_a_row} steps in a row ({status!r}: {detail}); mend "
            f"the reward and give the same command with run.name={self.folder.path.name} to go on after step {step}, "
            "or raise trainer.max_skipped_steps to wait longer."
        )

    def _evaluate_if_due(self, step: int) -> Mapping[str, float]:
        every = self.config.trainer.eval_every
        if not self.val or not (step == self.total_steps or (every and step % every == 0)):
            return {}
        found = self._evaluate("evaluating")
        self.progress.after = found.summary()
        if found.n and (self.progress.best is None or found.accuracy > self.progress.best["accuracy"]):
            self.progress.best = {"step": step, "accuracy": found.accuracy}
        self.console.info(f"step {step}: {found.sentence()}")
        return found.metrics()

    def _evaluate(self, title: str) -> Evaluation:
        with self.console.phase(title, total=len(self.val) * self.config.eval.n) as advance:
            samples = self.collector.evaluation(self.val, advance)
        return evaluate(samples, success=self.config.eval.success)

    def _save_if_due(self, step: int) -> None:
        every, best = self.config.checkpoint.every_steps, self.progress.best
        is_best = self.config.checkpoint.keep_best and best is not None and best["step"] == step
        if step < self.total_steps and (self.unsaved or is_best or (every and step % every == 0)):
            self._save()

    def _save(self) -> None:
        """Commits this step. A full disk is a warning and another try after the next step."""
        state = self.workers.save()
        adapters = {
            ADAPTER_FOLDER if name == TRAINED else name: Adapter(*parts) for name, parts in state.adapters.items()
        }
        content = {"workers": state.scalars, "progress": asdict(self.progress)}
        root = self.folder.path / "checkpoints"
        try:
            checkpoints.save(root, Checkpoint(self.progress.step, adapters, state.optimizer, content))
        except SaveFailed as error:
            self.unsaved = error
            self.console.warn(str(error))
            return
        self.unsaved = None
        best = self.progress.best if self.config.checkpoint.keep_best else None
        checkpoints.prune(root, self.config.checkpoint.keep, protect=[best["step"]] if best else [])

    def _finish(self) -> dict[str, Any]:
        step = self.progress.step
        summary = {
            "run": self.folder.path.name,
            "model": self.config.model.path,
            "before": self.progress.before,
            "after": self.progress.after,
            "best": self.progress.best,
            "steps": step,
            "seconds": self.progress.seconds,
            "rollout_tokens": self.progress.rollout_tokens,
            "trained_tokens": self.progress.trained_tokens,
            "adapter": f"checkpoints/step-{step}/{ADAPTER_FOLDER}",
        }
        self.folder.write_summary(summary)
        return summary
