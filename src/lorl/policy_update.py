"""The policy's optimizer steps over one step's batch: minibatches, micro-batches, the loss and its guards."""

import torch
from torch import Tensor

from lorl.algorithms.aggregation import Totals, aggregate, graded_tokens, keep_tokens
from lorl.algorithms.correction import correct
from lorl.config import RunConfig
from lorl.errors import DivergedError
from lorl.experience import Experience, Forest, Sampled
from lorl.objective import Objective
from lorl.optim import learning_rate, make_optimizer
from lorl.packing import select
from lorl.parallel.group import Group
from lorl.parallel.workers import UpdateReport
from lorl.passes import Means, guarded_step, micro_batches, minibatches, read_tokens
from lorl.policy.load import TRAINED
from lorl.policy.policy import Policy
from lorl.seeding import stable_seed


class PolicyUpdate:
    """The trained adapter's optimizer, and what it descends."""

    def __init__(
        self, config: RunConfig, objective: Objective, policy: Policy, reference: str | None, group: Group
    ) -> None:
        self._config = config
        self._objective = objective
        self._policy = policy
        self._reference = reference
        self._group = group
        self.parameters = policy.parameters(TRAINED)
        self.optimizer = make_optimizer(self.parameters, config.optim, hosted=config.parallel.optimizer_offload)

    def run(self, experience: Experience, *, step: int, total_steps: int, kl_coef: float) -> UpdateReport:
        """All minibatches of all epochs.

        Raises DivergedError when engine and trainer disagree past `rollout.max_mismatch`: nothing was trained.
        """
        rate = learning_rate(step, total_steps, self._config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(stable_seed(self._config.seed, "update", step, self._group.rank))  # dropout's draws repeat
        report = UpdateReport(metrics={})
        sums = Means()
        for epoch in range(self._config.algorithm.epochs):
            for index, sequences in enumerate(minibatches(experience, self._config.algorithm.minibatch_prompts)):
                whole = select(experience, sequences)
                self._prepare(whole, sums, step, epoch, index)
                if problem := self._minibatch(whole, sums, report, kl_coef):
                    report.skipped = problem
        report.metrics = sums.over(self._group) | {"policy/lr": rate}
        return report

    def logprobs(self, experience: Experience, adapter: str | None) -> Tensor:
        """float32[M] on the CPU, without gradient."""
        device, temperature = self._policy.device, self._config.rollout.temperature
        return read_tokens(
            experience,
            self._config.parallel.microbatch_tokens,
            lambda forest: self._policy.logprobs(forest.to(device), adapter=adapter, temperature=temperature).logprobs,
            self._group,
            "log-probabilities",
        )

    def _prepare(self, whole: Experience, sums: Means, step: int, epoch: int, index: int) -> None:
        """Settles, before the minibatch is cut, what depends on all of it: correction under bypass, and `selected`."""
        objective = self._objective
        if not (objective.loss.prepare or objective.corrects_each_minibatch):
            return
        if epoch == index == 0 and not objective.bypass and whole.old_logprobs is not None:
            start = whole.old_logprobs
        else:
            start = self.logprobs(whole, TRAINED)
        if objective.corrects_each_minibatch:
            assert objective.correction is not None
            found = correct(start, whole.rollout_logprobs, whole.layout, objective.correction)
            whole.kept = found.kept
            whole.weights = found.weights
            for name, value in found.metrics.items():
                sums.add(f"rollout_corr/{name}", value.reshape(1))
        if objective.loss.prepare is None:
            return
        included = _included(whole)
        assert whole.old_logprobs is not None
        assert whole.advantages is not None
        generator = torch.Generator().manual_seed(stable_seed(self._config.seed, "select", step, epoch, index))
        selected = objective.loss.select(
            start[included],
            whole.old_logprobs[included],
            whole.advantages[included],
            keep_tokens(whole.layout, included),
            objective.settings,
            generator,
        )
        assert selected is not None
        whole.selected = torch.zeros_like(included)
        whole.selected[included] = selected

    def _minibatch(self, whole: Experience, sums: Means, report: UpdateReport, kl_coef: float) -> str | None:
        """One optimizer step. Returns why it was not taken, or None."""
        moving = self._with_gradient(whole)
        if not moving.numel():
            return None  # every group's rewards are equal: no gradient, and no step on momentum alone
        totals = Totals.of(whole.layout, _included(whole))
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = 0.0
        differences: list[Tensor] = []
        self._policy.train_mode(self._config.adapter.dropout > 0)
        try:
            for sequences in micro_batches(whole, moving, self._config.parallel.microbatch_tokens, self._group):
                part = select(whole, sequences)
                loss, logprobs = self._micro_loss(part, totals, sums, kl_coef)
                loss.backward()
                loss_sum += float(loss.detach())
                report.trained_tokens += part.forest.tokens.numel()
                # Dropout is not a mismatch: what was computed at the step's start had none.
                own = logprobs if part.old_logprobs is None or self._objective.bypass else part.old_logprobs
                differences.append((own - part.rollout_logprobs).abs())
        finally:
            self._policy.train_mode(False)
        if report.mismatch is None:
            self._check_mismatch(torch.cat([torch.empty(0), *differences]), report)
        taken = guarded_step(
            self.optimizer,
            self.parameters.values(),
            loss_sum,
            self._config.optim.max_grad_norm,
            self._group,
            "policy gradients",
        )
        if taken.problem is None:
            sums.add("loss/total", torch.tensor([taken.loss]))
            sums.add("policy/grad_norm", taken.norm.reshape(1))
        return taken.problem

    def _with_gradient(self, whole: Experience) -> Tensor:
        """Sequences that can move the adapter: without KL or entropy terms, those with an advantage."""
        objective = self._objective
        moves = _included(whole)
        if not (self._config.algorithm.entropy_coef or objective.kl_in_loss or objective.loss.moves_without_advantage):
            assert whole.advantages is not None
            moves = moves & (whole.advantages != 0)
        counts = torch.bincount(whole.layout.sequence[moves], minlength=whole.layout.num_sequences)
        return torch.nonzero(counts > 0).flatten()

    def _micro_loss(self, part: Experience, totals: Totals, sums: Means, kl_coef: float) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the minibatch's loss, and its log-probabilities [M] on the CPU.

        Raises ValueError if an array that the configured loss reads was not computed.
        """
        algorithm, objective, device = self._config.algorithm, self._objective, self._policy.device
        forest = part.forest.to(device)
        scores = self._policy.logprobs(
            forest,
            adapter=TRAINED,
            temperature=self._config.rollout.temperature,
            entropy=algorithm.entropy_coef != 0,
            anchor=self._anchor(forest),
        )
        kept = None if part.kept is None else part.kept.to(device)

        def taking_part(values: Tensor) -> Tensor:
            values = values.to(device)
            return values if kept is None else values[kept]

        logprobs = taking_part(scores.logprobs)
        layout = Sampled(taking_part(part.layout.sequence), part.layout.group.to(device))
        old = logprobs.detach() if part.old_logprobs is None else taking_part(part.old_logprobs)
        selected = None if part.selected is None else taking_part(part.selected)
        assert part.advantages is not None
        terms = objective.loss(logprobs, old, taking_part(part.advantages), layout, objective.settings, selected)
        per_token = terms.loss if part.weights is None else terms.loss * taking_part(part.weights)
        mode = objective.loss.aggregation or algorithm.aggregation
        norm = algorithm.aggregation_norm or float(self._config.rollout.max_response_tokens)
        loss = aggregate(per_token, layout, mode, totals, norm)
        sums.add("loss/policy", per_token)
        for name, values in terms.metrics.items():
            sums.add(f"policy/{name}", values)
        if objective.kl_in_loss:
            if scores.kl is not None:
                kl = taking_part(scores.kl)
            else:
                assert part.ref_logprobs is not None
                kl = objective.kl(logprobs, taking_part(part.ref_logprobs))
            loss = loss + kl_coef * aggregate(kl, layout, mode, totals, norm)
            sums.add("policy/kl", kl)
        if scores.entropy is not None:
            entropy = taking_part(scores.entropy)
            loss = loss - algorithm.entropy_coef * aggregate(entropy, layout, mode, totals, norm)
            sums.add("policy/entropy", entropy)
        return loss, scores.logprobs.detach().float().cpu()

    @torch.no_grad()
    def _anchor(self, forest: Forest) -> Tensor | None:
        """The reference's states, where the KL in the loss is exact."""
        if not (self._objective.kl_in_loss and self._objective.kl.needs_logits):
            return None
        return self._policy.states(forest, adapter=self._reference)

    def _check_mismatch(self, differences: Tensor, report: UpdateReport) -> None:
        found = [float(differences.sum()), differences.numel(), float(differences.max()) if len(differences) else 0.0]
        sums, counts, largest = zip(*self._group.gather(found, "mismatch"), strict=True)
        report.mismatch, report.mismatch_max = sum(sums) / sum(counts), max(largest)
        bound = self._config.rollout.max_mismatch or (1e-3 if self._policy.dtype == torch.float32 else 0.05)
        if report.mismatch > bound:
            half = self._policy.dtype != torch.float32
            rounding = ", or this model's rounding alone is that large: then raise rollout.max_mismatch" if half else ""
            raise DivergedError(
                f"engine and trainer disagree: mean |log-probability difference| {report.mismatch:.2e} is above "
                f"rollout.max_mismatch={bound:.0e}; the engine sampled from another adapter, at another temperature, "
                f"or with another template than the trainer scored{rounding}."
            )


def _included(experience: Experience) -> Tensor:
    """bool[M]: tokens of graded samples that rollout correction lets through."""
    graded = graded_tokens(experience.rewards, experience.layout)
    return graded if experience.kept is None else graded & experience.kept
