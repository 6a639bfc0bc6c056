"""The advantage estimators once more, from their papers, as loops over ragged lists in float64."""

import math
import statistics

from algorithm_cases import Case

Ragged = list[list[float]]


def spread(case: Case, per_sequence: list[float]) -> Ragged:
    return [[value] * length for value, length in zip(per_sequence, case.lengths, strict=True)]


def members(case: Case, i: int, scores: list[float]) -> list[int]:
    """Graded sequences of i's group."""
    return [j for j in range(len(case.group)) if case.group[j] == case.group[i] and not math.isnan(scores[j])]


def scores_of(case: Case) -> list[float]:
    return [reward + sum(row) for reward, row in zip(case.rewards, case.token_rewards, strict=True)]


def centred(case: Case, scores: list[float], baseline, *, bare: bool) -> list[float]:
    """R_i - baseline(i, members). Groups of equal scores give zero, and a group of one R if `bare`."""
    out = []
    for i, score in enumerate(scores):
        group = members(case, i, scores)
        if math.isnan(score):
            out.append(0.0)
        elif len(group) == 1:
            out.append(score if bare else 0.0)
        elif len({scores[j] for j in group}) == 1:
            out.append(0.0)
        else:
            out.append(score - baseline(i, group))
    return out


def group_normalized(case: Case, scores: list[float], *, std: bool, bare: bool) -> list[float]:
    out = centred(case, scores, lambda i, group: statistics.mean(scores[j] for j in group), bare=bare)
    for i in range(len(out)):
        group = members(case, i, scores)
        if std and len(group) > 1:
            out[i] /= statistics.stdev(scores[j] for j in group) + 1e-6
    return out


def whitened(ragged: Ragged, counted: list[bool]) -> Ragged:
    values = [x for row, yes in zip(ragged, counted, strict=True) for x in row if yes]
    if not values:
        return [[0.0] * len(row) for row in ragged]
    mean = sum(values) / len(values)
    variance = statistics.variance(values) if len(values) > 1 else 0.0
    scale = math.sqrt(variance + 1e-8)
    return [[(x - mean) / scale if yes else 0.0 for x in row] for row, yes in zip(ragged, counted, strict=True)]


def grpo(case: Case, *, normalize_std: bool = True, group_of_one: str = "zero") -> Ragged:
    return spread(case, group_normalized(case, scores_of(case), std=normalize_std, bare=group_of_one == "reward"))


def rloo(case: Case, *, group_of_one: str = "zero") -> Ragged:
    scores = scores_of(case)

    def others(i: int, group: list[int]) -> float:
        return statistics.mean(scores[j] for j in group if j != i)

    return spread(case, centred(case, scores, others, bare=group_of_one == "reward"))


def opo(case: Case, *, group_of_one: str = "zero") -> Ragged:
    scores = scores_of(case)

    def by_length(i: int, group: list[int]) -> float:
        total = sum(case.lengths[j] for j in group)
        return sum(case.lengths[j] * scores[j] for j in group) / total if total else 0.0

    return spread(case, centred(case, scores, by_length, bare=group_of_one == "reward"))


def gpg(case: Case, *, verl: bool = False, group_of_one: str = "zero") -> Ragged:
    scores = scores_of(case)
    graded = [i for i, score in enumerate(scores) if not math.isnan(score)]
    if verl:
        used = sum(scores[i] != 0 for i in graded)
    else:
        used = sum(len({scores[j] for j in members(case, i, scores)}) > 1 for i in graded)
    alpha = len(graded) / max(used, 1)
    plain = group_normalized(case, scores, std=False, bare=group_of_one == "reward")
    return spread(case, [alpha * advantage for advantage in plain])


def grpo_passk(case: Case, *, normalize_std: bool = True) -> Ragged:
    scores = scores_of(case)
    out = []
    for i, score in enumerate(scores):
        group = members(case, i, scores)
        if math.isnan(score) or len(group) < 2:
            out.append(0.0)
            continue
        # Leave-one-out: what the group's maximum loses without this sample.
        gain = max(scores[j] for j in group) - max(scores[j] for j in group if j != i)
        out.append(gain / (statistics.stdev(scores[j] for j in group) + 1e-6) if normalize_std else gain)
    return spread(case, out)


def reinforce_plus_plus_baseline(case: Case, *, group_of_one: str = "zero") -> Ragged:
    plain = group_normalized(case, scores_of(case), std=False, bare=group_of_one == "reward")
    return whitened(spread(case, plain), case.graded)


def gdpo(case: Case, *, verl: bool = False, reward_weights: dict[str, float] | None = None) -> Ragged:
    total = [0.0] * len(case.group)
    for name, part in case.parts.items():
        weight = (reward_weights or {}).get(name, 1.0)
        for i, value in enumerate(group_normalized(case, part, std=True, bare=False)):
            total[i] += weight * value
    if verl:
        return whitened(spread(case, total), case.graded)
    return spread(case, [row[0] for row in whitened([[value] for value in total], case.graded)])


def token_rewards_of(case: Case) -> Ragged:
    """The answer's reward on the last token, the others where they are."""
    rows = [list(row) for row in case.token_rewards]
    for row, reward in zip(rows, case.rewards, strict=True):
        if row:
            row[-1] += reward
    return rows


def to_go(row: list[float], t: int, gamma: float) -> float:
    return sum(gamma**k * r for k, r in enumerate(row[t:]))


def gae(case: Case, *, gamma: float, lam: float, whiten_advantages: bool) -> tuple[Ragged, Ragged]:
    """Equation 16 as the sum that it is: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    advantages, returns = [], []
    for rewards, values, graded in zip(token_rewards_of(case), case.values, case.graded, strict=True):
        after = [*values[1:], 0.0][: len(values)]
        deltas = [r + gamma * nxt - v for r, nxt, v in zip(rewards, after, values, strict=True)]
        row = [to_go(deltas, t, gamma * lam) if graded else 0.0 for t in range(len(deltas))]
        advantages.append(row)
        returns.append([a + v for a, v in zip(row, values, strict=True)])
    return (whitened(advantages, case.graded) if whiten_advantages else advantages), returns


def reinforce_plus_plus(case: Case, *, gamma: float) -> Ragged:
    returns = [[to_go(row, t, gamma) for t in range(len(row))] for row in token_rewards_of(case)]
    return whitened(returns, case.graded)


def remax(case: Case) -> Ragged:
    out = []
    for i, row in enumerate(token_rewards_of(case)):
        baseline = case.greedy[case.group[i]]
        usable = case.graded[i] and not math.isnan(baseline)
        out.append([to_go(row, t, 1.0) - baseline if usable else 0.0 for t in range(len(row))])
    return out


def optimal_token_baseline(case: Case, *, weighted: bool, group_of_one: str) -> Ragged:
    rewards = token_rewards_of(case)

    def energy(i: int, t: int) -> float:
        return sum(
            (case.weights[i][j] ** 2 if weighted else 1.0)
            * (1 - 2 * math.exp(case.logprobs[i][j]) + case.sum_pi_squared[i][j])
            for j in range(t + 1)
        )

    out = []
    for i, row in enumerate(rewards):
        line = []
        for t in range(len(row)):
            reach = [j for j in members(case, i, case.rewards) if case.lengths[j] > t]
            if not case.graded[i]:
                line.append(0.0)
            elif len(reach) == 1:
                line.append(to_go(row, t, 1.0) if group_of_one == "reward" else 0.0)
            else:
                above = sum(to_go(rewards[j], t, 1.0) * energy(j, t) for j in reach)
                line.append(to_go(row, t, 1.0) - above / (sum(energy(j, t) for j in reach) + 1e-8))
        out.append(line)
    return out
