"""Which rank does what: work is balanced by tokens, longest first, each piece to the rank with the least so far."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lorl.experience import Completion, Experience
from lorl.rollout.engine import Request


def balance(costs: Sequence[int], size: int) -> list[list[int]]:
    """Indices of `costs`, ascending, for each of `size` ranks. Deterministic: ties go to the first.

    Longest processing time first (Graham 1969): the largest sum is at most 4/3 of the best possible.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    sums = [0] * size
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = sums.index(min(sums))
        shares[rank].append(index)
        sums[rank] += costs[index]
    return [sorted(share) for share in shares]


def share(experience: Experience, sequences: Tensor, rank: int, size: int) -> Tensor:
    """Those of `sequences` (int64, ascending) that `rank` of `size` computes.

    Groups stay whole, since their samples share tokens; one that is more than a rank's part is dealt out by samples.
    """
    if size == 1:
        return sequences
    groups = _by_group(experience, sequences.tolist())
    costs = _group_tokens(experience, groups)
    fair = sum(costs) / size
    lengths = experience.layout.lengths().tolist()
    pieces: list[tuple[list[int], int]] = []
    for members, cost in zip(groups, costs, strict=True):
        pieces += [(members, cost)] if cost <= fair else [([index], lengths[index]) for index in members]
    mine = balance([cost for _, cost in pieces], size)[rank]
    return torch.tensor(sorted(index for piece in mine for index in pieces[piece][0]), dtype=torch.int64)


def share_answers(completions: Sequence[Completion], rank: int, size: int) -> list[int]:
    """Indices of the answers that `rank` scores; those to one prompt, which are adjacent, stay together."""
    indices = range(len(completions))
    groups = [list(members) for _, members in groupby(indices, key=lambda index: completions[index].prompt.id)]
    costs = [sum(len(completions[i].prompt.tokens) + len(completions[i].tokens) for i in members) for members in groups]
    return [index for group in balance(costs, size)[rank] for index in groups[group]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A rank's part of a rollout."""

    requests: list[Request]
    samples: dict[str, list[int]]  # prompt id -> which samples of the whole request these are


def share_requests(requests: Sequence[Request], max_tokens: int, size: int) -> list[Asked]:
    """Each rank's part of a rollout. A prompt's samples stay together, unless they are more than a rank's part."""
    costs = [len(request.prompt.tokens) + len(request.seeds) * max_tokens for request in requests]
    fair = sum(costs) / size
    pieces: list[tuple[Request, list[int], int]] = []
    for request, cost in zip(requests, costs, strict=True):
        samples = list(range(len(request.seeds)))
        pieces += [(request, samples, cost)] if cost <= fair else [(request, [j], max_tokens) for j in samples]
    asked = []
    for mine in balance([cost for *_, cost in pieces], size):
        chosen: dict[str, tuple[Request, list[int]]] = {}
        for request, samples, _ in (pieces[piece] for piece in mine):
            chosen.setdefault(request.prompt.id, (request, []))[1].extend(samples)
        asked.append(
            Asked(
                [Request(request.prompt, [request.seeds[j] for j in samples]) for request, samples in chosen.values()],
                {name: samples for name, (_, samples) in chosen.items()},
            )
        )
    return asked


def _by_group(experience: Experience, sequences: Sequence[int]) -> list[list[int]]:
    group = experience.layout.group.tolist()
    found: dict[int, list[int]] = {}
    for index in sequences:
        found.setdefault(group[index], []).append(index)
    return list(found.values())


def _group_tokens(experience: Experience, groups: Sequence[Sequence[int]]) -> list[int]:
    """Distinct tokens of each group's chosen samples and prompt, without what all prompts share."""
    forest = experience.forest
    lengths = (forest.segments[1:] - forest.segments[:-1]).tolist()
    parents, leaves = forest.parent.tolist(), experience.leaf.tolist()
    held: list[set[int]] = []
    for members in groups:
        segments: set[int] = set()
        for segment in (leaves[index] for index in members):
            while segment >= 0 and segment not in segments:
                segments.add(segment)
                segment = parents[segment]
        held.append(segments)
    common = set.intersection(*held) if len(held) > 1 else set()
    return [sum(lengths[segment] for segment in segments - common) for segments in held]
