"""One rank: a policy, an engine on its weights, and the optimizers of what learns on its base."""

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from lorl.config import RunConfig
from lorl.critic import CRITIC, Critic
from lorl.errors import InfrastructureError, UserError
from lorl.experience import Completion, Experience, Forest
from lorl.objective import Objective
from lorl.optim import load_optimizer_tensors, optimizer_tensors
from lorl.parallel.group import Alone, Group
from lorl.parallel.shared import ranks_per_engine
from lorl.parallel.split import share_answers
from lorl.parallel.workers import UpdateReport, WorkerState
from lorl.passes import read_tokens
from lorl.policy.load import REFERENCE, TRAINED
from lorl.policy.policy import Policy
from lorl.policy.scorers import Scorer, load_scorer
from lorl.policy_update import PolicyUpdate
from lorl.rollout.engine import Engine, Request, Sampling
from lorl.rollout.retry import Rollouts


class Worker:
    """`Workers` in this process, on one device: the whole of a run, or a rank of its group.

    A rank is given whole batches, computes its share of each, and ends up with what all of them found. Only `generate`
    does just what it is asked.

    Attributes:
        scorer: the reward model, or None.
    """

    def __init__(self, config: RunConfig, policy: Policy, engine: Engine, group: Group | None = None) -> None:
        self._config = config
        self._group = group = group or Alone()
        self._policy = policy
        self._engine = engine
        # The others of an engine that several ranks run wait inside it for one that failed: it cannot be rebuilt alone.
        self._rollouts = Rollouts(engine, config.rollout.retries if ranks_per_engine(config) == 1 else 0)
        self._version = 0
        self._publish_s = 0.0
        self._peak = 0  # bytes that torch held on this rank's GPU at most
        objective = Objective.of(config)
        if config.algorithm.kl_coef > 0 and objective.kl.needs_logits and not policy.plain_head:
            raise UserError(
                f"algorithm.kl_estimator={objective.kl.name} needs a head that policy and reference share, and this "
                "one is adapted, biased or soft-capped; use k3."
            )
        self._reference: str | None = None  # the base
        if config.adapter.path and config.algorithm.reference == "start" and config.algorithm.kl_coef > 0:
            policy.freeze_copy(TRAINED, REFERENCE)
            self._reference = REFERENCE
        self._update = PolicyUpdate(config, objective, policy, self._reference, group)
        self._critic = Critic(config, policy, group) if objective.needs_critic else None
        self.scorer: Scorer | None = load_scorer(config, policy) if config.reward_model.path else None

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None
    ) -> Generator[Completion]:
        self._mark_peak()
        try:
            yield from self._rollouts.generate(requests, sampling, adapter=adapter)
            self._group.drain()
        finally:
            self._mark_peak()
            self._engine.rest()

    def publish(self) -> int:
        self._version += 1
        checksum = self._policy.checksum(TRAINED)
        held = self._group.gather(checksum, "adapter checksums")
        if held != [checksum] * len(held):
            raise InfrastructureError(
                f"the ranks' adapters differ after version {self._version - 1}: their checksums are {', '.join(held)}; "
                "ranks of one run need the same hardware and software"
            )
        self._mark_peak()
        self._publish_s = self._rollouts.publish(TRAINED, self._version, checksum)
        self._group.drain()  # a proof makes more passes where a distance is measured again
        return self._version

    @property
    def reference(self) -> str | None:
        """The adapter that KL is measured against; None is the base."""
        return self._reference

    def logprobs(self, experience: Experience, *, adapter: str | None) -> Tensor:
        return self._update.logprobs(experience, adapter)

    def logprobs_and_squares(self, experience: Experience) -> tuple[Tensor, Tensor]:
        def read(forest: Forest) -> Tensor:
            scores = self._policy.logprobs(
                forest.to(self._policy.device),
                adapter=TRAINED,
                temperature=self._config.rollout.temperature,
                sum_pi_squared=True,
            )
            assert scores.sum_pi_squared is not None
            return torch.stack([scores.logprobs, scores.sum_pi_squared])

        logprobs, squares = self._read(experience, read, "squared probabilities", rows=(2,))
        return logprobs, squares

    def full_kl(self, experience: Experience) -> Tensor:
        def read(forest: Forest) -> Tensor:
            forest = forest.to(self._policy.device)
            anchor = self._policy.states(forest, adapter=self._reference)
            temperature = self._config.rollout.temperature
            found = self._policy.logprobs(forest, adapter=TRAINED, temperature=temperature, anchor=anchor).kl
            assert found is not None
            return found

        return self._read(experience, read, "full KL")

    def values(self, experience: Experience) -> Tensor:
        if self._critic is None:
            raise ValueError(f"algorithm.advantage={self._config.algorithm.advantage} has no critic")
        return self._critic.values(experience)

    def score(self, completions: Sequence[Completion]) -> list[float]:
        if self.scorer is None:
            raise ValueError("reward_model.path is not set")
        group, together = self._group, self.scorer.on_policy
        dealt = (group.part, group.parts) if together else (group.rank, group.size)
        mine = share_answers(completions, *dealt)
        scores = torch.zeros(len(completions))
        if mine:
            found = torch.tensor(self.scorer.score([completions[index] for index in mine]))
            if group.leads or not together:
                scores[mine] = found
        group.drain()
        self._group.sum_(scores, "scores")
        return scores.tolist()

    def update(self, experience: Experience, *, step: int, total_steps: int, kl_coef: float) -> UpdateReport:
        report = UpdateReport(metrics={})
        if self._critic is None or step > self._config.critic.warmup_steps:
            report = self._update.run(experience, step=step, total_steps=total_steps, kl_coef=kl_coef)
        if self._critic is not None:
            self._critic.update(experience, step, report)
        counts = [report.trained_tokens * self._group.leads, self._rollouts.take_rebuilt()]
        self._mark_peak()
        found = self._group.gather([*counts, self._peak / 2**30], "counts")
        tokens, rebuilt, peaks = zip(*found, strict=True)
        report.trained_tokens = sum(tokens)
        if any(peaks):
            report.metrics["memory/peak_gib"] = max(peaks)
        report.metrics["time/publish_copy_s"] = self._publish_s  # of the version that the step's answers came from
        if rebuilt := sum(rebuilt):
            report.metrics["rollout/engine_restarts"] = float(rebuilt)
        return report

    def save(self) -> WorkerState:
        state = WorkerState(
            adapters={TRAINED: (self._policy.adapter_tensors(TRAINED), self._policy.adapter_config(TRAINED))},
            optimizer=optimizer_tensors(self._update.optimizer, list(self._update.parameters)),
            scalars={"version": self._version, "base": self._policy.base_fingerprint()},
        )
        if self._critic is not None:
            self._critic.save_into(state)
        return state

    def load(self, state: WorkerState, origin: str) -> None:
        if state.scalars.get("base") != self._policy.base_fingerprint():
            raise UserError(
                f"{origin} was trained on another base than model.path={self._config.model.path!r}; "
                "name the base that the run's config.yaml names."
            )
        tensors, _ = state.adapters[TRAINED]
        self._policy.load_adapter(TRAINED, tensors, origin)
        own = {name: value for name, value in state.optimizer.items() if not name.startswith(f"{CRITIC}/")}
        load_optimizer_tensors(self._update.optimizer, list(self._update.parameters), own)
        if self._critic is not None:
            self._critic.load_from(state, origin)
        self._version = state.scalars["version"]

    def close(self) -> None:
        self._engine.close()

    def _mark_peak(self) -> None:
        """Notes the most that torch held on this rank's GPU since the last call; called before the engine rests or
        wakes, since torch counts a cache that rests as allocated."""
        device = self._policy.device
        if device.type == "cuda":
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(device) - self._engine.resting_bytes)
            torch.cuda.reset_peak_memory_stats(device)

    def _read(
        self, experience: Experience, read: Callable[[Forest], Tensor], call: str, rows: tuple[int, ...] = ()
    ) -> Tensor:
        budget = self._config.parallel.microbatch_tokens
        return read_tokens(experience, budget, read, self._group, call, rows=rows)
