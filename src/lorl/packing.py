"""From graded completions to a packed Experience, and from one Experience to the micro-batches of a pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorl.experience import Completion, Experience, Forest, Outcome, Sampled


def pack(completions: Sequence[Completion], outcomes: Sequence[Outcome]) -> Experience:
    """Packs samples whose prompts' groups are adjacent, each prompt once.

    Sequence i of the result is `completions[i]`; a sample without a reward gets NaN.
    """
    tokens: list[int] = []
    positions: list[Tensor] = []
    offsets, parent, owner, group, lengths = [0], [], [], [], []
    sampled: list[Tensor] = []
    root = -1
    for index, completion in enumerate(completions):
        prompt = completion.prompt
        if index == 0 or prompt.id != completions[index - 1].prompt.id:
            root = len(parent)
            tokens += prompt.tokens
            positions.append(torch.arange(len(prompt.tokens)))
            offsets.append(len(tokens))
            parent.append(-1)
            owner.append(-1)
            group.append(group[-1] + 1 if group else 0)
        else:
            group.append(group[-1])
        start = len(tokens)
        tokens += completion.tokens
        sampled.append(torch.arange(start, len(tokens)))
        positions.append(torch.arange(len(completion.tokens)) + len(prompt.tokens))
        offsets.append(len(tokens))
        parent.append(root)
        owner.append(index)
        lengths.append(len(completion.tokens))
    segments, parents = torch.tensor(offsets, dtype=torch.int32), torch.tensor(parent, dtype=torch.int32)
    forest = Forest(
        tokens=torch.tensor(tokens),
        positions=torch.cat(positions),
        segments=segments,
        parent=parents,
        previous=_previous(segments, parents),
        sampled=torch.cat(sampled),
    )
    sequence = torch.repeat_interleave(torch.arange(len(completions)), torch.tensor(lengths))
    rewards = [float("nan") if outcome.reward is None else outcome.reward for outcome in outcomes]
    return Experience(
        forest=forest,
        layout=Sampled(sequence=sequence, group=torch.tensor(group)),
        owner=torch.tensor(owner),
        rewards=torch.tensor(rewards, dtype=torch.float32),
        rollout_logprobs=torch.tensor([value for c in completions for value in c.logprobs], dtype=torch.float32),
        version=completions[0].version,
    )


def select(experience: Experience, sequences: Tensor) -> Experience:
    """The experience of `sequences` (int64, ascending) alone, with the prompts that they hang off."""
    forest, layout = experience.forest, experience.layout
    chosen = torch.zeros(layout.num_sequences, dtype=torch.bool)
    chosen[sequences] = True
    keep_segment = _with_ancestors(forest, (experience.owner >= 0) & chosen[experience.owner.clamp(min=0)])
    lengths = (forest.segments[1:] - forest.segments[:-1]).to(torch.int64)
    keep_token = torch.repeat_interleave(keep_segment, lengths)
    keep_sampled = chosen[layout.sequence]
    new_token = torch.cumsum(keep_token, 0) - 1
    new_segment = torch.cumsum(keep_segment, 0) - 1
    new_sequence = torch.cumsum(chosen, 0) - 1
    parent = forest.parent[keep_segment].to(torch.int64)
    parent = torch.where(parent >= 0, new_segment[parent.clamp(min=0)], -1).to(torch.int32)
    segments = torch.cat([lengths.new_zeros(1), lengths[keep_segment].cumsum(0)]).to(torch.int32)
    owner = experience.owner[keep_segment]
    part = Experience(
        forest=Forest(
            tokens=forest.tokens[keep_token],
            positions=forest.positions[keep_token],
            segments=segments,
            parent=parent,
            previous=_previous(segments, parent),
            sampled=new_token[forest.sampled[keep_sampled]],
        ),
        layout=Sampled(
            sequence=new_sequence[layout.sequence[keep_sampled]],
            group=torch.unique(layout.group[sequences], return_inverse=True)[1],
        ),
        owner=torch.where(owner >= 0, new_sequence[owner.clamp(min=0)], -1),
        rewards=experience.rewards[sequences],
        rollout_logprobs=experience.rollout_logprobs[keep_sampled],
        version=experience.version,
    )
    for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
        array = getattr(experience, name)
        if array is not None:
            setattr(part, name, array[keep_sampled])
    return part


def cut(experience: Experience, sequences: Tensor, budget: int) -> list[Tensor]:
    """Cuts `sequences` (int64, ascending) into micro-batches of at most `budget` packed tokens where they fit.

    A prompt counts once in each micro-batch that holds a sample of it; a group is only cut when it does not fit whole.
    """
    forest = experience.forest
    lengths = (forest.segments[1:] - forest.segments[:-1]).tolist()
    own, prompt = [0] * experience.layout.num_sequences, [0] * experience.layout.num_sequences
    parents = forest.parent.tolist()
    for segment, owner in enumerate(experience.owner.tolist()):
        if owner >= 0:
            own[owner] += lengths[segment]
            if parents[segment] >= 0 and experience.owner[parents[segment]] < 0:
                prompt[owner] = lengths[parents[segment]]
    cuts: list[list[int]] = []
    used, open_group = budget + 1, -1
    groups: dict[int, list[int]] = {}
    for index in sequences.tolist():
        groups.setdefault(int(experience.layout.group[index]), []).append(index)
    for group, members in groups.items():
        whole = prompt[members[0]] + sum(own[index] for index in members)
        if cuts and used + whole <= budget:
            cuts[-1] += members
            used, open_group = used + whole, group
            continue
        used, open_group = budget + 1, -1
        for index in members:
            cost = own[index] + (0 if open_group == group else prompt[index])
            if used + cost > budget:
                cuts.append([])
                used, cost = 0, own[index] + prompt[index]
            cuts[-1].append(index)
            used, open_group = used + cost, group
    return [torch.tensor(indices) for indices in cuts]


def _with_ancestors(forest: Forest, wanted: Tensor) -> Tensor:
    keep = wanted.tolist()
    parents = forest.parent.tolist()
    for segment in range(len(parents) - 1, -1, -1):  # children come after their parents
        if keep[segment] and parents[segment] >= 0:
            keep[parents[segment]] = True
    return torch.tensor(keep, dtype=torch.bool)


def _previous(segments: Tensor, parent: Tensor) -> Tensor:
    """int64[T]: see `Forest.previous`."""
    offsets = segments.to(torch.int64)
    previous = torch.arange(int(offsets[-1])) - 1
    starts, ends = offsets[:-1], offsets[1:]
    joined = torch.where(parent >= 0, ends[parent.to(torch.int64).clamp(min=0)] - 1, -1)
    occupied = starts < ends
    previous[starts[occupied]] = joined[occupied]
    return previous
