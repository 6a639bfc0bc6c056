"""PPO's value function: a second adapter with a value head, on the policy's base."""

from pathlib import Path

import torch
from torch import Tensor

from lorl.algorithms.aggregation import Totals, aggregate, graded_tokens
from lorl.algorithms.value import explained_variance, value_loss
from lorl.config import OptimConfig, RunConfig
from lorl.errors import UserError
from lorl.experience import Experience, Forest, Sampled
from lorl.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors
from lorl.packing import select
from lorl.parallel.group import Group
from lorl.parallel.workers import UpdateReport, WorkerState
from lorl.passes import Means, guarded_step, micro_batches, minibatches, read_tokens
from lorl.policy import adapters
from lorl.policy.load import TRAINED
from lorl.policy.policy import Policy
from lorl.seeding import stable_seed

CRITIC = "critic"  # the adapter's name, its folder's in a checkpoint, and the prefix of its optimizer's tensors
VALUE_HEAD = "value_head"  # `value_head.weight` [1, hidden] and `value_head.bias` [1] lie in the adapter's own file


class Critic:
    """V of the state before each sampled token, and the optimizer that fits it to the returns."""

    def __init__(self, config: RunConfig, policy: Policy, group: Group) -> None:
        self._config = config
        self._group = group
        self._policy = policy
        own = config.critic
        if own.path is not None:
            lora = adapters.read_config(Path(own.path), "critic.path")
        else:
            lora = adapters.like(
                policy.lora_config(TRAINED), rank=own.rank, alpha=own.alpha, targets=own.target_modules
            )
        policy.add_adapter(CRITIC, lora, seed=config.seed, learns=True)
        policy.add_scalar_head(CRITIC, VALUE_HEAD)
        if own.path is not None:
            policy.load_adapter(CRITIC, adapters.read_tensors(Path(own.path), "critic.path"), own.path)
        self._parameters = policy.parameters(CRITIC)
        self._optimizer = make_optimizer(
            self._parameters,
            OptimConfig(lr=own.lr, weight_decay=own.weight_decay, betas=config.optim.betas, eps=config.optim.eps),
            hosted=config.parallel.optimizer_offload,
        )

    def values(self, experience: Experience) -> Tensor:
        """float32[M] on the CPU, without gradient."""
        return read_tokens(experience, self._config.parallel.microbatch_tokens, self._read, self._group, "values")

    def update(self, experience: Experience, step: int, report: UpdateReport) -> None:
        """Optimizer steps towards `experience.returns`; adds the critic's metrics to `report`."""
        assert experience.values is not None
        assert experience.returns is not None
        torch.manual_seed(stable_seed(self._config.seed, CRITIC, step, self._group.rank))  # dropout's draws repeat
        sums = Means()
        for _ in range(self._config.critic.epochs):
            for sequences in minibatches(experience, self._config.algorithm.minibatch_prompts):
                if problem := self._minibatch(select(experience, sequences), sums, report):
                    report.skipped = f"critic: {problem}"
        graded = graded_tokens(experience.rewards, experience.layout)
        values, returns = experience.values[graded], experience.returns[graded]
        report.metrics |= sums.over(self._group)
        if graded.any():
            report.metrics |= {
                "critic/explained_variance": float(explained_variance(values, returns)),
                "critic/values_mean": float(values.mean()),
                "critic/returns_mean": float(returns.mean()),
                "critic/returns_std": float(returns.std(correction=0)),
            }
        report.metrics["critic/lr"] = self._config.critic.lr

    def save_into(self, state: WorkerState) -> None:
        state.adapters[CRITIC] = (self._policy.adapter_tensors(CRITIC), self._policy.adapter_config(CRITIC))
        found = optimizer_tensors(self._optimizer, list(self._parameters))
        state.optimizer.update({f"{CRITIC}/{name}": value for name, value in found.items()})

    def load_from(self, state: WorkerState, origin: str) -> None:
        if CRITIC not in state.adapters:
            raise UserError(
                f"{origin} holds no critic, and algorithm.advantage={self._config.algorithm.advantage} needs one; "
                "start anew from its adapter with adapter.path."
            )
        self._policy.load_adapter(CRITIC, state.adapters[CRITIC][0], origin)
        prefix = f"{CRITIC}/"
        own = {name.removeprefix(prefix): v for name, v in state.optimizer.items() if name.startswith(prefix)}
        load_optimizer_tensors(self._optimizer, list(self._parameters), own)

    def _read(self, forest: Forest) -> Tensor:
        forest = forest.to(self._policy.device)
        return self._policy.scalars(forest, forest.previous[forest.sampled], adapter=CRITIC)

    def _minibatch(self, whole: Experience, sums: Means, report: UpdateReport) -> str | None:
        """One optimizer step on the graded samples. Returns why it was not taken, or None."""
        config, device = self._config, self._policy.device
        totals = Totals.of(whole.layout, graded_tokens(whole.rewards, whole.layout))
        graded = torch.nonzero(~torch.isnan(whole.rewards) & (whole.layout.lengths() > 0)).flatten()
        if not graded.numel():
            return None
        norm_length = config.algorithm.aggregation_norm or float(config.rollout.max_response_tokens)
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        self._policy.train_mode(config.adapter.dropout > 0)
        try:
            for sequences in micro_batches(whole, graded, config.parallel.microbatch_tokens, self._group):
                part = select(whole, sequences)
                assert part.values is not None
                assert part.returns is not None
                layout = Sampled(part.layout.sequence.to(device), part.layout.group.to(device))
                per_token, metrics = value_loss(
                    self._read(part.forest), part.values.to(device), part.returns.to(device), config.critic.value_clip
                )
                loss = aggregate(per_token, layout, config.algorithm.aggregation, totals, norm_length)
                loss.backward()
                total += float(loss.detach())
                report.trained_tokens += part.forest.tokens.numel()
                sums.add("critic/loss", per_token)
                for name, found in metrics.items():
                    sums.add(f"critic/{name}", found)
        finally:
            self._policy.train_mode(False)
        taken = guarded_step(
            self._optimizer,
            self._parameters.values(),
            total,
            config.critic.max_grad_norm,
            self._group,
            "critic gradients",
        )
        if taken.problem is None:
            sums.add("critic/grad_norm", taken.norm.reshape(1))
        return taken.problem
