"""The policy losses, KL estimators and the value loss once more, from their papers, as loops over one sequence's lists.

A token loss is `fn(x, old, A, **settings)` with x a Dual; a sequence loss takes lists and gives the sequence's loss.
"""

import math

from dual_numbers import Dual, Number, absolute, clip, exp, mean, sg


def ppo_clip(x: Dual, old: float, advantage: float, *, low: float, high: float, dual: float | None) -> Number:
    """Ye et al. 2020, eq. 5: max(min(r A, clip(r) A), c A) where A < 0, as an objective."""
    ratio = exp(x - old)
    objective = min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage, key=sg)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage, key=sg)
    return -objective


def reinforce(x: Dual, old: float, advantage: float) -> Number:
    return -(x * advantage)


def cispo(x: Dual, old: float, advantage: float, *, low: float, high: float) -> Number:
    return -(x * (sg(clip(exp(x - old), 1 - low, 1 + high)) * advantage))


def sapo(x: Dual, old: float, advantage: float, *, positive: float, negative: float) -> Number:
    tau = positive if advantage > 0 else negative
    gate = 1 / (1 + exp(-tau * (exp(x - old) - 1.0)))
    return -(4 / tau * gate * advantage)


def dppo(x: Dual, old: float, advantage: float, *, kind: str, low: float, high: float, most: float) -> Number:
    """The gradient of M r A with r truncated: M is 0 where the update leads further out of the trust region."""
    new, before = math.exp(sg(x)), math.exp(old)
    if kind == "tv":
        divergence = abs(new - before)
    else:
        divergence = before * math.log(before / new) + (1 - before) * math.log((1 - before + 1e-8) / (1 - new + 1e-8))
    outward_up = advantage > 0 and new > before and divergence > high
    outward_down = advantage <= 0 and new < before and divergence > low
    if outward_up or outward_down:
        return x * 0.0
    return -(x * (min(new / before, most) * advantage))


def dro(x: Dual, old: float, advantage: float, *, beta: float) -> Number:
    return -(x * advantage - beta / 2 * (x - old) ** 2)


def kl_cov(x: Dual, old: float, advantage: float, *, selected: bool, coef: float) -> Number:
    loss = -(exp(x - old) * advantage)
    return loss + coef * absolute(x - old) if selected else loss


def clip_cov(x: Dual, old: float, advantage: float, *, selected: bool, low: float, high: float) -> Number:
    return x * 0.0 if selected else ppo_clip(x, old, advantage, low=low, high=high, dual=None)


def gspo(xs: list[Dual], olds: list[float], advantages: list[float], *, low: float, high: float) -> Number:
    """Eq. 5 and 7, differentiated through s itself."""
    advantage = advantages[0]
    s = exp(mean([x - old for x, old in zip(xs, olds, strict=True)]))
    return -min(s * advantage, clip(s, 1 - low, 1 + high) * advantage, key=sg)


def gspo_token(xs: list[Dual], olds: list[float], advantages: list[float], *, low: float, high: float) -> Number:
    """Eq. 13 and 14, with an advantage for each token."""
    s = math.exp(sum(sg(x) - old for x, old in zip(xs, olds, strict=True)) / len(xs))
    terms = []
    for x, advantage in zip(xs, advantages, strict=True):
        ratio = s * (exp(x) / math.exp(sg(x)))
        terms.append(-min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage, key=sg))
    return mean(terms)


def gmpo(xs: list[Dual], olds: list[float], advantages: list[float], *, low: float, high: float) -> Number:
    """The geometric mean of min(r |A|, clip(r, e^-low, e^high) |A|)^sgn, with its sign."""
    advantage = advantages[0]
    sign = (advantage > 0) - (advantage < 0)
    product: Number = 1.0
    for x, old in zip(xs, olds, strict=True):
        ratio = exp(x - old)
        bounded = clip(ratio, math.exp(-low), math.exp(high))
        chosen = min(ratio, bounded, key=sg) if sign > 0 else max(ratio, bounded, key=sg)
        product = product * (chosen if sign else 1.0)
    return -(product ** (1 / len(xs)) * advantage)


def kl(x: Dual, ref: float, *, name: str) -> Number:
    """Schulman's estimators, with r = ref / policy."""
    log_r = ref - x
    return {
        "k1": lambda: -log_r,
        "abs": lambda: absolute(log_r),
        "k2": lambda: log_r**2 / 2,
        "k3": lambda: (exp(log_r) - 1.0) - log_r,
        "low_var_kl": lambda: min((exp(log_r) - 1.0) - log_r, 10.0, key=sg),
    }[name]()


def straight_through(x: Dual, ref: float, *, name: str) -> Number:
    """The estimator's value with k2's gradient."""
    carrier = kl(x, ref, name="k2")
    assert isinstance(carrier, Dual)
    return Dual(sg(kl(x, ref, name=name)), carrier.grad)


def aggregation(rows: list[list[Number]], *, mode: str, norm: float) -> Number:
    """The loss of a minibatch from its sequences' token losses; sequences without a token do not count."""
    rows = [row for row in rows if row]
    if not rows:
        return 0.0
    sums = [sum(row[1:], start=row[0]) for row in rows]
    total = sum(sums[1:], start=sums[0])
    match mode:
        case "token-mean":
            return total / sum(len(row) for row in rows)
        case "token-sum":
            return total
        case "seq-mean-token-sum":
            return total / len(rows)
        case "seq-mean-token-mean":
            return mean([each / len(row) for each, row in zip(sums, rows, strict=True)])
        case "seq-mean-token-sum-norm":
            return total / len(rows) / norm
    raise ValueError(mode)


def overlong(length: int, *, limit: int, buffer: int, factor: float) -> float:
    """DAPO, eq. 13, times a factor."""
    if length <= limit - buffer:
        return 0.0
    if length <= limit:
        return factor * ((limit - buffer) - length) / buffer
    return -factor


def value(x: Dual, old: float, target: float, *, clip_range: float | None) -> Number:
    plain = (x - target) ** 2
    if clip_range is None:
        return 0.5 * plain
    bounded = clip(x, old - clip_range, old + clip_range)
    return 0.5 * max(plain, (bounded - target) ** 2, key=sg)
