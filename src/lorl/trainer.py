"""The loop. It holds no tensors of the model, and knows neither FSDP nor Ray nor vLLM: it talks to `Workers`.

    prompts -> Workers.generate -> rewards -> Experience -> advantages -> Workers.update -> Workers.publish

What is drawn in step N depends on (seed, N) alone, and what carries from step to step is in the checkpoint: a run that
was killed and resumed computes the numbers of the run that was not.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorl import checkpoint as checkpoints
from lorl import metrics as measure
from lorl.algorithms.inputs import AdvantageInputs
from lorl.algorithms.registry import get_advantage, get_kl
from lorl.checkpoint import Adapter, Checkpoint, SaveFailed
from lorl.config import RunConfig
from lorl.data.loader import PromptLoader
from lorl.errors import DivergedError
from lorl.evaluation import Evaluation, evaluate
from lorl.experience import Experience, Prompt
from lorl.interrupt import StopRequest
from lorl.packing import pack
from lorl.parallel.workers import UpdateReport, Workers, WorkerState
from lorl.policy.load import TRAINED
from lorl.rewards.pool import RewardPool
from lorl.run_folder import RunFolder
from lorl.samples import Sample, collect, eval_sampling, training_sampling
from lorl.tracking.console import Console
from lorl.tracking.trackers import Trackers

ADAPTER_FOLDER = "adapter"  # the trained adapter's name in a checkpoint


@dataclass(slots=True)
class Progress:
    """What carries from step to step besides the workers' state: JSON, in every checkpoint."""

    step: int = 0
    skipped_in_a_row: int = 0
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
    pool: RewardPool
    loader: PromptLoader
    val: Sequence[Prompt]
    folder: RunFolder
    trackers: Trackers
    console: Console
    total_steps: int
    progress: Progress = field(default_factory=Progress)
    unsaved: SaveFailed | None = None  # why the last checkpoint is missing

    def run(self) -> dict[str, Any] | None:
        """Trains to the end and returns the summary, or saves and returns None when asked to stop.

        Raises:
            DivergedError: non-finite steps in a row, or an engine that samples from something else than the policy.
            SaveFailed: the last checkpoint could not be written.
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
        self.console.info(f"resuming {self.folder.path.name} after step {self.progress.step} (from {source})")

    def _step(self) -> None:
        step, started = self.progress.step + 1, time.perf_counter()
        samples = self._rollout(step)
        rolled_out = time.perf_counter()
        values = measure.of_samples(samples)
        experience = pack([s.completion for s in samples], [s.outcome for s in samples])
        values |= self._fill_in(experience)
        report = self.workers.update(experience, step=step, total_steps=self.total_steps)
        self._check(report)
        self.workers.publish()
        updated = time.perf_counter()
        values |= measure.of_update(report, experience)
        self.folder.write_rollouts(step, [sample.row(step) for sample in samples])
        self.progress.step = step
        self.progress.rollout_tokens += experience.layout.num_tokens
        self.progress.trained_tokens += report.trained_tokens
        values |= self._evaluate_if_due(step)
        values |= measure.of_machine(
            step_s=time.perf_counter() - started,
            rollout_s=rolled_out - started,
            update_s=updated - rolled_out,
            rollout_tokens=experience.layout.num_tokens,
            trained_tokens=report.trained_tokens,
        )
        self.progress.seconds += values["time/step_s"]
        self.trackers.log(step, values)
        self.console.step(step, values, self.total_steps)
        self._save_if_due(step)

    def _rollout(self, step: int) -> list[Sample]:
        config = self.config
        prompts = self.loader.batch(step - 1)
        with self.console.phase("rollout", total=len(prompts) * config.rollout.n) as advance:
            return collect(
                self.workers,
                self.pool,
                prompts,
                n=config.rollout.n,
                sampling=training_sampling(config.rollout),
                adapter=TRAINED,
                seed=(config.seed, step),
                batched_rewards=config.reward.batched,
                advance=advance,
            )

    def _fill_in(self, experience: Experience) -> dict[str, float]:
        """Computes what the configured algorithm reads, and nothing else, up to the advantages."""
        algorithm, batch = self.config.algorithm, self.config.data.prompts_per_step
        updates = algorithm.epochs * (batch // (algorithm.minibatch_prompts or batch))
        kl_in_reward = algorithm.kl_coef > 0 and algorithm.kl_in == "reward"
        if updates > 1 or kl_in_reward or self.config.adapter.dropout > 0:
            # Else a single update is exactly on-policy: its own pass gives them.
            experience.old_logprobs = self.workers.logprobs(experience, adapter=TRAINED)
        if algorithm.kl_coef > 0:
            experience.ref_logprobs = self.workers.logprobs(experience, adapter=self.workers.reference)
        token_rewards, values = None, {}
        if kl_in_reward:
            assert experience.old_logprobs is not None
            assert experience.ref_logprobs is not None
            kl = get_kl(algorithm.kl_estimator)(experience.old_logprobs, experience.ref_logprobs)
            token_rewards, values = -algorithm.kl_coef * kl, {"policy/kl": float(kl.mean())}
        inputs = AdvantageInputs(experience.layout, experience.rewards, token_rewards)
        estimate = get_advantage(algorithm.advantage)(inputs, algorithm.model_dump())
        experience.advantages, experience.returns = estimate.advantages, estimate.returns
        return values

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

    def _evaluate_if_due(self, step: int) -> Mapping[str, float]:
        every = self.config.trainer.eval_every
        if not self.val or not (step == self.total_steps or (every and step % every == 0)):
            return {}
        found = self._evaluate("evaluating")
        self.progress.after = found.summary()
        if self.progress.best is None or found.accuracy > self.progress.best["accuracy"]:
            self.progress.best = {"step": step, "accuracy": found.accuracy}
        self.console.info(f"step {step}: {found.sentence()}")
        return found.metrics()

    def _evaluate(self, title: str) -> Evaluation:
        config = self.config
        with self.console.phase(title, total=len(self.val) * config.eval.n) as advance:
            samples = collect(
                self.workers,
                self.pool,
                self.val,
                n=config.eval.n,
                sampling=eval_sampling(config.eval, config.rollout),
                adapter=TRAINED,
                seed=(config.seed, "eval"),
                batched_rewards=config.reward.batched,
                advance=advance,
            )
        return evaluate(samples, success=config.eval.success)

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
