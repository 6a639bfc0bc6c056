"""One rank: a policy, an engine on its weights, and an optimizer over its adapter."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lorl.algorithms.aggregation import Totals, aggregate, graded_tokens
from lorl.algorithms.registry import KLEntry, PolicyLossEntry, get_kl, get_policy_loss
from lorl.config import RunConfig
from lorl.errors import DivergedError, UserError
from lorl.experience import Completion, Experience
from lorl.optim import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors
from lorl.packing import cut, select
from lorl.parallel.workers import UpdateReport, WorkerState
from lorl.policy.load import REFERENCE, TRAINED
from lorl.policy.policy import Policy
from lorl.rollout.engine import Engine, Request, Sampling
from lorl.seeding import stable_seed


class Worker:
    """`Workers` in this process, on one device."""

    def __init__(self, config: RunConfig, policy: Policy, engine: Engine) -> None:
        self._config = config
        self._policy = policy
        self._engine = engine
        self._parameters = policy.parameters(TRAINED)
        self._optimizer = make_optimizer(self._parameters, config.optim)
        self._loss: PolicyLossEntry = get_policy_loss(config.algorithm.policy_loss)
        self._kl: KLEntry = get_kl(config.algorithm.kl_estimator)
        self._settings: dict[str, Any] = config.algorithm.model_dump()
        self._version = 0
        self._reference: str | None = None  # the base
        if config.adapter.path and config.algorithm.reference == "start" and config.algorithm.kl_coef > 0:
            policy.freeze_copy(TRAINED, REFERENCE)
            self._reference = REFERENCE

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

    @torch.no_grad()
    def logprobs(self, experience: Experience, *, adapter: str | None) -> Tensor:
        out = torch.empty(experience.layout.num_tokens)
        everything = torch.arange(experience.layout.num_sequences)
        for sequences in cut(experience, everything, self._config.parallel.microbatch_tokens):
            part = select(experience, sequences)
            scores = self._policy.logprobs(
                part.forest.to(self._policy.device), adapter=adapter, temperature=self._config.rollout.temperature
            )
            out[torch.isin(experience.layout.sequence, sequences)] = scores.logprobs.float().cpu()
        return out

    def update(self, experience: Experience, *, step: int, total_steps: int) -> UpdateReport:
        """Raises DivergedError when engine and trainer disagree past `rollout.max_mismatch`: nothing was trained."""
        rate = learning_rate(step, total_steps, self._config.optim)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(stable_seed(self._config.seed, "update", step))  # dropout's draws repeat on resumption
        self._policy.train_mode(self._config.adapter.dropout > 0)
        try:
            report = self._passes(experience)
        finally:
            self._policy.train_mode(False)
        report.metrics["policy/lr"] = rate
        return report

    def save(self) -> WorkerState:
        return WorkerState(
            adapters={TRAINED: (self._policy.adapter_tensors(TRAINED), self._policy.adapter_config(TRAINED))},
            optimizer=optimizer_tensors(self._optimizer, list(self._parameters)),
            scalars={"version": self._version, "base": self._policy.base_fingerprint()},
        )

    def load(self, state: WorkerState, origin: str) -> None:
        if state.scalars.get("base") != self._policy.base_fingerprint():
            raise UserError(
                f"{origin} was trained on another base than model.path={self._config.model.path!r}; "
                "name the base that the run's config.yaml names."
            )
        tensors, _ = state.adapters[TRAINED]
        self._policy.load_adapter(TRAINED, tensors, origin)
        load_optimizer_tensors(self._optimizer, list(self._parameters), state.optimizer)
        self._version = state.scalars["version"]

    def close(self) -> None:
        self._engine.close()

    def _passes(self, experience: Experience) -> UpdateReport:
        report = UpdateReport(metrics={})
        sums = _Means()
        for epoch in range(self._config.algorithm.epochs):
            for sequences in self._minibatches(experience):
                first = epoch == 0 and report.trained_tokens == 0
                if problem := self._minibatch(experience, sequences, sums, report, first=first):
                    report.skipped = problem
        report.metrics = sums.values()
        return report

    def _minibatches(self, experience: Experience) -> list[Tensor]:
        """Sequences of each optimizer step: whole groups, in the batch's order."""
        group = experience.layout.group
        size = self._config.algorithm.minibatch_prompts or int(group.max()) + 1
        return [torch.nonzero(group // size == part).flatten() for part in torch.unique(group // size)]

    def _minibatch(
        self, experience: Experience, sequences: Tensor, sums: "_Means", report: UpdateReport, *, first: bool
    ) -> str | None:
        """One optimizer step. Returns why it was not taken, or None."""
        whole = select(experience, sequences)
        included = graded_tokens(whole.rewards, whole.layout)
        totals = Totals.of(whole.layout, included)
        self._optimizer.zero_grad(set_to_none=True)
        losses = []
        differences: list[Tensor] = []
        for part_sequences in cut(whole, self._with_gradient(whole), self._config.parallel.microbatch_tokens):
            part = select(whole, part_sequences)
            loss, logprobs = self._micro_loss(part, totals, sums)
            loss.backward()
            losses.append(float(loss.detach()))
            report.trained_tokens += part.forest.tokens.numel()
            own = logprobs if part.old_logprobs is None else part.old_logprobs  # dropout is not a mismatch
            differences.append((own - part.rollout_logprobs).abs())
        if not losses:
            return None  # every group's rewards are equal: no gradient, and no step on momentum alone
        if first:
            self._check_mismatch(torch.cat(differences), report)
        norm = torch.nn.utils.clip_grad_norm_(
            self._parameters.values(), self._config.optim.max_grad_norm or float("inf")
        )
        total = sum(losses)
        if not (torch.isfinite(norm) and torch.isfinite(torch.tensor(total))):
            self._optimizer.zero_grad(set_to_none=True)
            return f"loss {total:.3g}, gradient norm {float(norm):.3g}"
        self._optimizer.step()
        sums.add("loss/total", torch.tensor([total]))
        sums.add("policy/grad_norm", norm.detach().cpu().reshape(1))
        return None

    def _with_gradient(self, experience: Experience) -> Tensor:
        """Graded sequences that can move the adapter: without KL or entropy terms, those with an advantage."""
        algorithm = self._config.algorithm
        graded = ~torch.isnan(experience.rewards)
        lengths = experience.layout.lengths()
        if not algorithm.entropy_coef and not (algorithm.kl_coef and algorithm.kl_in == "loss"):
            assert experience.advantages is not None
            moving = torch.bincount(
                experience.layout.sequence[experience.advantages != 0], minlength=experience.layout.num_sequences
            )
            graded = graded & (moving > 0)
        return torch.nonzero(graded & (lengths > 0)).flatten()

    def _micro_loss(self, part: Experience, totals: Totals, sums: "_Means") -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the minibatch's loss, and its log-probabilities [M] on the CPU.

        Raises ValueError if an array that the configured loss reads was not computed.
        """
        algorithm, device = self._config.algorithm, self._policy.device
        scores = self._policy.logprobs(
            part.forest.to(device),
            adapter=TRAINED,
            temperature=self._config.rollout.temperature,
            entropy=algorithm.entropy_coef != 0,
        )
        logprobs = scores.logprobs
        layout = type(part.layout)(part.layout.sequence.to(device), part.layout.group.to(device))
        old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs.to(device)
        assert part.advantages is not None
        terms = self._loss(logprobs, old, part.advantages.to(device), layout, self._settings)
        mode = self._loss.aggregation or algorithm.aggregation
        norm = algorithm.aggregation_norm or float(self._config.rollout.max_response_tokens)

        def reduce(per_token: Tensor) -> Tensor:
            return aggregate(per_token, layout, mode, totals, norm)

        loss = reduce(terms.loss)
        sums.add("loss/policy", terms.loss)
        for name, values in terms.metrics.items():
            sums.add(f"policy/{name}", values)
        if part.ref_logprobs is not None and algorithm.kl_in == "loss":
            kl = self._kl(logprobs, part.ref_logprobs.to(device))
            loss = loss + algorithm.kl_coef * reduce(kl)
            sums.add("policy/kl", kl)
        if scores.entropy is not None:
            loss = loss - algorithm.entropy_coef * reduce(scores.entropy)
            sums.add("policy/entropy", scores.entropy)
        return loss, logprobs.detach().float().cpu()

    def _check_mismatch(self, differences: Tensor, report: UpdateReport) -> None:
        report.mismatch, report.mismatch_max = float(differences.mean()), float(differences.max())
        bound = self._config.rollout.max_mismatch or (1e-3 if self._policy.dtype == torch.float32 else 0.05)
        if report.mismatch > bound:
            raise DivergedError(
                f"engine and trainer disagree: mean |log-probability difference| {report.mismatch:.2e} is above "
                f"rollout.max_mismatch={bound:.0e}; the engine sampled from another adapter, at another temperature, "
                "or with another template than the trainer scored."
            )


class _Means:
    """Running means of per-token metrics over micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, values: Tensor) -> None:
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + float(values.detach().double().sum()), count + values.numel()

    def values(self) -> dict[str, float]:
        return {name: total / max(count, 1) for name, (total, count) in self._sums.items()}
