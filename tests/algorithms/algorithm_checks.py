"""One check for each algorithm: lorl's value and gradient against the paper's, on a random batch in float64.

`CHECKS` is what the tests go over, and what `benchmarks/algorithm_errors.py` prints as a table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import paper_advantages
import paper_correction
import paper_losses
import torch
from algorithm_cases import Case, pack, random_case
from dual_numbers import Dual, Number, sg, variables
from torch import Tensor

from lorl.algorithms.aggregation import MODES, Totals, aggregate
from lorl.algorithms.catalogue import get_advantage, get_kl, get_policy_loss
from lorl.algorithms.correction import PRESETS, correct
from lorl.algorithms.shaping import overlong_penalty
from lorl.algorithms.value import value_loss


@dataclass(frozen=True)
class Errors:
    """Largest differences from the reference, relative where the reference is above 1."""

    value: float
    gradient: float | None = None  # None: the function is not differentiated


@dataclass(frozen=True)
class Check:
    kind: str
    name: str
    variant: str  # the settings, for people
    reference: str  # what it is checked against: a function beside this file
    run: Callable[[Case], Errors]

    @property
    def label(self) -> str:
        return f"{self.kind}-{self.name}" + (f"[{self.variant}]" if self.variant else "")


def difference(ours: Tensor, reference: list[float] | np.ndarray) -> float:
    expected = np.asarray(reference, dtype=np.float64).ravel()
    got = ours.detach().numpy().ravel()
    assert got.shape == expected.shape
    if not got.size:
        return 0.0
    assert np.isfinite(got).all()
    return float((np.abs(got - expected) / np.maximum(1.0, np.abs(expected))).max())


def check_advantage(case: Case, name: str, reference: Callable[..., Any], settings: dict[str, Any]) -> Errors:
    weighted = settings.get("weighted", False)
    estimate = get_advantage(name)(case.inputs(weighted=weighted), settings)
    expected = reference(case)
    if estimate.returns is None:
        return Errors(difference(estimate.advantages, flat(expected)))
    advantages, returns = expected
    return Errors(max(difference(estimate.advantages, flat(advantages)), difference(estimate.returns, flat(returns))))


def check_loss(
    case: Case,
    name: str,
    reference: Callable[..., Number],
    settings: dict[str, Any],
    *,
    per_sequence: bool,
    constant: bool,
) -> Errors:
    """A whole minibatch's loss: the mean over tokens, or over sequences for a loss that says so."""
    entry = get_policy_loss(name)
    ragged = case.sequence_advantages if constant else case.token_advantages
    layout, old, advantages = case.layout(), pack(case.old_logprobs), pack(ragged)
    logprobs = pack(case.logprobs).requires_grad_()
    selected = entry.select(logprobs, old, advantages, layout, settings, torch.Generator().manual_seed(0))
    terms = entry(logprobs, old, advantages, layout, settings, selected)
    mode = entry.aggregation or "token-mean"
    loss = aggregate(terms.loss, layout, mode, Totals.of(layout))
    (gradient,) = torch.autograd.grad(loss, logprobs)

    xs = iter(variables(flat(case.logprobs)))
    chosen = iter([{}] * layout.num_tokens if selected is None else [{"selected": bool(s)} for s in selected])
    rows: list[list[Number]] = []
    for olds, row in zip(case.old_logprobs, ragged, strict=True):
        own = [next(xs) for _ in olds]
        if per_sequence:
            rows.append([reference(own, olds, row)] if own else [])
        else:
            rows.append([reference(x, o, a, **next(chosen)) for x, o, a in zip(own, olds, row, strict=True)])
    if mode == "token-mean" or per_sequence:
        terms_flat = [term for row in rows for term in row]
        expected = sum(terms_flat, start=0.0) / max(len(terms_flat), 1)
    else:
        means = [sum(row[1:], start=row[0]) / len(row) for row in rows if row]
        expected = sum(means, start=0.0) / max(len(means), 1)
    return errors(loss, gradient, expected)


def check_pointwise(
    case: Case, ours: Callable[..., Tensor], reference: Callable[..., Number], others: list[list[list[float]]]
) -> Errors:
    """A function of each token by itself, such as a KL estimator."""
    logprobs = pack(case.logprobs).requires_grad_()
    total = ours(logprobs, *(pack(other) for other in others)).sum()
    (gradient,) = torch.autograd.grad(total, logprobs)
    columns = [variables(flat(case.logprobs)), *(flat(other) for other in others)]
    expected = sum((reference(*row) for row in zip(*columns, strict=True)), start=0.0)
    return errors(total, gradient, expected)


def check_full_kl(case: Case) -> Errors:
    """Over a vocabulary of five, with the first token's logits the variables."""
    size = max(len(flat(case.logprobs)), 1)
    generator = torch.Generator().manual_seed(size)
    logits, ref = torch.randn(2, size, 5, generator=generator, dtype=torch.float64).unbind()
    logits.requires_grad_()
    total = get_kl("full")(logits, ref).sum()
    (gradient,) = torch.autograd.grad(total, logits)
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (logits.detach().numpy(), ref.numpy()))
    ratio = np.log(p / q)
    kl = (p * ratio).sum(-1, keepdims=True)
    return Errors(difference(total, [float(kl.sum())]), difference(gradient, p * (ratio - kl)))


def check_aggregation(case: Case, mode: str) -> Errors:
    """Of the squares of the log-probabilities, so that no two tokens have the same gradient."""
    logprobs, layout, norm = pack(case.logprobs).requires_grad_(), case.layout(), 5.0
    loss = aggregate(logprobs.square(), layout, mode, Totals.of(layout), norm)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    xs = iter(variables(flat(case.logprobs)))
    rows: list[list[Number]] = [[next(xs) ** 2 for _ in row] for row in case.logprobs]
    return errors(loss, gradient, paper_losses.aggregation(rows, mode=mode, norm=norm))


def check_correction(case: Case, preset: str) -> Errors:
    """Weights; a token kept or rejected wrongly is an error of 1."""
    correction = PRESETS[preset]
    found = correct(pack(case.logprobs), pack(case.old_logprobs), case.layout(), correction)
    wrong = float(found.kept.tolist() != paper_correction.kept(case, correction))
    if found.weights is None:
        return Errors(wrong)
    return Errors(max(wrong, difference(found.weights, flat(paper_correction.weights(case, correction)))))


def check_overlong(case: Case) -> Errors:
    lengths, settings = torch.tensor(case.lengths), {"limit": 6, "buffer": 4, "factor": 0.5}
    expected = [paper_losses.overlong(length, **settings) for length in case.lengths]
    ours = overlong_penalty(lengths, settings["limit"], settings["buffer"], settings["factor"])
    return Errors(difference(ours.double(), expected))


def errors(ours: Tensor, gradient: Tensor, expected: Number) -> Errors:
    reference = expected.grad if isinstance(expected, Dual) else np.zeros(gradient.numel())
    return Errors(difference(ours, [sg(expected)]), difference(gradient, reference))


def flat(ragged: list[list[float]]) -> list[float]:
    return [value for row in ragged for value in row]


def describe(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def advantage_check(name: str, reference: str, theirs: dict[str, Any] | None = None, **settings: Any) -> Check:
    function = partial(getattr(paper_advantages, reference), **(settings if theirs is None else theirs))
    return Check(
        "advantage",
        name,
        describe(settings),
        f"paper_advantages.{reference}",
        partial(check_advantage, name=name, reference=function, settings=settings),
    )


def loss_check(
    name: str,
    reference: str,
    theirs: dict[str, Any],
    *,
    per_sequence: bool = False,
    constant: bool = False,
    **settings: Any,
) -> Check:
    function = partial(getattr(paper_losses, reference), **theirs)
    run = partial(
        check_loss, name=name, reference=function, settings=settings, per_sequence=per_sequence, constant=constant
    )
    return Check("policy loss", name, describe(settings), f"paper_losses.{reference}", run)


def kl_check(name: str) -> Check:
    ours, reference = get_kl(name), partial(paper_losses.kl, name=name)
    return Check(
        "KL estimator",
        name,
        "",
        "paper_losses.kl",
        lambda case: check_pointwise(case, ours, reference, [case.ref_logprobs]),
    )


def straight_through_check(name: str) -> Check:
    ours, reference = get_kl(f"{name}+"), partial(paper_losses.straight_through, name=name)
    return Check(
        "KL estimator",
        f"{name}+",
        "",
        "paper_losses.straight_through",
        lambda case: check_pointwise(case, ours, reference, [case.ref_logprobs]),
    )


def value_check(clip: float | None) -> Check:
    def ours(values: Tensor, old: Tensor, returns: Tensor) -> Tensor:
        return value_loss(values, old, returns, clip)[0]

    reference = partial(paper_losses.value, clip_range=clip)
    return Check(
        "value loss",
        "value_loss",
        f"clip={clip}",
        "paper_losses.value",
        lambda case: check_pointwise(case, ours, reference, [case.old_logprobs, case.ref_logprobs]),
    )


BOUNDS = {"low": 0.2, "high": 0.28}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
WEIGHTS = {"accuracy": 2.0, "format": 0.5}

CHECKS = [
    advantage_check("grpo", "grpo"),
    advantage_check("grpo", "grpo", normalize_std=False),
    advantage_check("grpo", "grpo", group_of_one="reward"),
    advantage_check("rloo", "rloo"),
    advantage_check("rloo", "rloo", group_of_one="reward"),
    advantage_check("opo", "opo"),
    advantage_check("opo", "opo", group_of_one="reward"),
    advantage_check("gpg", "gpg"),
    advantage_check("gpg_verl", "gpg", {"verl": True, "group_of_one": "reward"}, group_of_one="reward"),
    advantage_check("grpo_passk", "grpo_passk"),
    advantage_check("grpo_passk", "grpo_passk", normalize_std=False),
    advantage_check("reinforce_plus_plus", "reinforce_plus_plus", gamma=1.0),
    advantage_check("reinforce_plus_plus", "reinforce_plus_plus", gamma=0.9),
    advantage_check("reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline"),
    advantage_check("remax", "remax"),
    advantage_check("gdpo", "gdpo"),
    advantage_check("gdpo", "gdpo", reward_weights=WEIGHTS),
    advantage_check("gdpo_verl", "gdpo", {"verl": True}),
    advantage_check("gae", "gae", gamma=1.0, lam=1.0, whiten_advantages=True),
    advantage_check("gae", "gae", gamma=0.97, lam=0.9, whiten_advantages=False),
    advantage_check("optimal_token_baseline", "optimal_token_baseline", weighted=False, group_of_one="zero"),
    advantage_check("optimal_token_baseline", "optimal_token_baseline", weighted=True, group_of_one="reward"),
    loss_check("ppo_clip", "ppo_clip", BOUNDS | {"dual": 3.0}, **CLIP),
    loss_check("ppo_clip", "ppo_clip", BOUNDS | {"dual": None}, **CLIP, clip_dual=None),
    loss_check("reinforce", "reinforce", {}),
    loss_check("gpg", "reinforce", {}),
    loss_check("cispo", "cispo", BOUNDS, **CLIP),
    loss_check("sapo", "sapo", {"positive": 1.0, "negative": 1.05}),
    loss_check("sapo", "sapo", {"positive": 0.5, "negative": 2.0}, sapo_tau_positive=0.5, sapo_tau_negative=2.0),
    loss_check("dppo_tv", "dppo", {"kind": "tv", "low": 0.1, "high": 0.15, "most": 20.0}, clip_low=0.1, clip_high=0.15),
    loss_check(
        "dppo_kl",
        "dppo",
        {"kind": "kl", "low": 0.05, "high": 0.03, "most": 2.0},
        clip_low=0.05,
        clip_high=0.03,
        dppo_max_ratio=2.0,
    ),
    loss_check("dro", "dro", {"beta": 0.1}),
    loss_check("dro", "dro", {"beta": 0.7}, dro_beta=0.7),
    loss_check("kl_cov", "kl_cov", {"coef": 0.5}, kl_cov_ratio=0.2, kl_cov_coef=0.5),
    loss_check("clip_cov", "clip_cov", BOUNDS, **CLIP, clip_cov_ratio=0.3, clip_cov_low=0.1, clip_cov_high=2.0),
    loss_check("gspo", "gspo", BOUNDS, per_sequence=True, constant=True, **CLIP),
    loss_check("gspo", "gspo_token", BOUNDS, per_sequence=True, **CLIP),
    loss_check(
        "gmpo", "gmpo", {"low": 0.4, "high": 0.3}, per_sequence=True, constant=True, clip_low=0.4, clip_high=0.3
    ),
    *(kl_check(name) for name in ("k1", "k2", "k3", "abs", "low_var_kl")),
    *(straight_through_check(name) for name in ("k1", "k3", "abs", "low_var_kl")),
    Check("KL estimator", "full", "", "algorithm_checks.check_full_kl", check_full_kl),
    *(
        Check("aggregation", mode, "", "paper_losses.aggregation", partial(check_aggregation, mode=mode))
        for mode in MODES
    ),
    *(
        Check("correction", preset, "", "paper_correction", partial(check_correction, preset=preset))
        for preset in PRESETS
    ),
    Check("preset", "dapo", "the price on length", "paper_losses.overlong", check_overlong),
    value_check(0.2),
    value_check(None),
]


def worst(check: Check, seeds: range) -> Errors:
    """The largest errors over the batches of `seeds`."""
    found = [check.run(random_case(seed)) for seed in seeds]
    gradients = [each.gradient for each in found if each.gradient is not None]
    return Errors(max(each.value for each in found), max(gradients) if gradients else None)
