"""One rank: a policy, an engine on its weights, and the optimizers of what learns on its base."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorl.config import RunConfig
from lorl.critic import CRITIC, Critic
from lorl.errors import UserError
from lorl.experience import Completion, Experience, Forest
from lorl.objective import Objective
from lorl.optim import load_optimizer_tensors, optimizer_tensors
from lorl.parallel.workers import UpdateReport, WorkerState
from lorl.passes import read_tokens
from lorl.policy.load import REFERENCE, TRAINED
from lorl.policy.policy import Policy
from lorl.policy.scorers import Scorer, load_scorer
from lorl.policy_update import PolicyUpdate
from lorl.rollout.engine import Engine, Request, Sampling


class Worker:
    """`Workers` in this process, on one device.

    Attributes:
        scorer: the reward model, or None.
    """

    def __init__(self, config: RunConfig, policy: Policy, engine: Engine) -> None:
        self._config = config
        self._policy = policy
        self._engine = engine
        self._version = 0
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
        self._update = PolicyUpdate(config, objective, policy, self._reference)
        self._critic = Critic(config, policy) if objective.needs_critic else None
        self.scorer: Scorer | None = load_scorer(config, policy) if config.reward_model.path else None

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None) -> Iterator[Completion]:
        return self._engine.generate(requests, sampling, adapter=adapter)

    def publish(self) -> int:
        self._version += 1
        self._engine.publish(TRAINED, self._version, self._policy.checksum(TRAINED))
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

        logprobs, squares = read_tokens(experience, self._config.parallel.microbatch_tokens, read)
        return logprobs, squares

    def full_kl(self, experience: Experience) -> Tensor:
        def read(forest: Forest) -> Tensor:
            forest = forest.to(self._policy.device)
            anchor = self._policy.states(forest, adapter=self._reference)
            temperature = self._config.rollout.temperature
            found = self._policy.logprobs(forest, adapter=TRAINED, temperature=temperature, anchor=anchor).kl
            assert found is not None
            return found

        return read_tokens(experience, self._config.parallel.microbatch_tokens, read)

    def values(self, experience: Experience) -> Tensor:
        if self._critic is None:
            raise ValueError(f"algorithm.advantage={self._config.algorithm.advantage} has no critic")
        return self._critic.values(experience)

    def score(self, completions: Sequence[Completion]) -> list[float]:
        if self.scorer is None:
            raise ValueError("reward_model.path is not set")
        return self.scorer.score(completions)

    def update(self, experience: Experience, *, step: int, total_steps: int, kl_coef: float) -> UpdateReport:
        report = UpdateReport(metrics={})
        if self._critic is None or step > self._config.critic.warmup_steps:
            report = self._update.run(experience, step=step, total_steps=total_steps, kl_coef=kl_coef)
        if self._critic is not None:
            self._critic.update(experience, step, report)
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
