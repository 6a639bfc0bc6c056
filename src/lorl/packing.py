"""From graded completions to a packed Experience, and from one Experience to the micro-batches of a pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorl.experience import COMPUTED, Completion, Experience, Forest, Outcome, Prompt, Sampled

MIN_SHARED_PREFIX = 8  # tokens; below this a segment of its own isn't worth its attention call


@dataclass(slots=True)
class PromptForest:
    """Distinct prompts packed so that what they all begin with (a system prompt, worked examples) exists once."""

    tokens: list[int]
    positions: list[int]
    offsets: list[int]  # N + 1
    parent: list[int]  # N
    leaf: list[int]  # one a prompt: the segment that its completions continue
    path: list[Tensor]  # one a prompt: int64, where its tokens lie, in order


def pack_prompts(prompts: Sequence[Prompt]) -> PromptForest:
    """One tree for prompts with a common prefix (its root is the prefix), else a tree a prompt."""
    return _grow(prompts, [[] for _ in prompts])[0]


def pack(completions: Sequence[Completion], outcomes: Sequence[Outcome]) -> Experience:
    """Packs samples whose prompts' groups are adjacent, each prompt once, and once too what all prompts begin with.

    Sequence i of the result is `completions[i]`; a sample without a reward gets NaN.
    """
    prompts: list[Prompt] = []
    members: list[list[Completion]] = []
    for completion in completions:
        if not prompts or completion.prompt.id != prompts[-1].id:
            prompts.append(completion.prompt)
            members.append([])
        members[-1].append(completion)
    grown, owner, sampled = _grow(prompts, members)
    segments = torch.tensor(grown.offsets, dtype=torch.int32)
    parent = torch.tensor(grown.parent, dtype=torch.int32)
    lengths = torch.tensor([len(completion.tokens) for completion in completions])
    rewards = [float("nan") if outcome.reward is None else outcome.reward for outcome in outcomes]
    return Experience(
        forest=Forest(
            tokens=torch.tensor(grown.tokens),
            positions=torch.tensor(grown.positions),
            segments=segments,
            parent=parent,
            previous=_previous(segments, parent),
            sampled=torch.tensor(sampled, dtype=torch.int64),
        ),
        layout=Sampled(
            sequence=torch.repeat_interleave(torch.arange(len(completions)), lengths),
            group=torch.tensor([group for group, found in enumerate(members) for _ in found]),
        ),
        owner=torch.tensor(owner),
        rewards=torch.tensor(rewards, dtype=torch.float32),
        rollout_logprobs=torch.tensor([value for c in completions for value in c.logprobs], dtype=torch.float32),
        version=completions[0].version,
    )


def _grow(
    prompts: Sequence[Prompt], members: Sequence[Sequence[Completion]]
) -> tuple[PromptForest, list[int], list[int]]:
    """The forest of prompts with their completions behind them; the segments' owners, and the sampled tokens."""
    forest = PromptForest([], [], [0], [], [], [])
    owner: list[int] = []
    sampled: list[int] = []

    def add(tokens: Sequence[int], parent: int, position: int, sequence: int = -1) -> int:
        forest.tokens += tokens
        forest.positions += range(position, position + len(tokens))
        forest.offsets.append(len(forest.tokens))
        forest.parent.append(parent)
        owner.append(sequence)
        return len(owner) - 1

    shared = _shared_prefix(prompts)
    root = add(prompts[0].tokens[:shared], -1, 0) if shared else -1
    sequence = 0
    for prompt, completions in zip(prompts, members, strict=True):
        leaf = add(prompt.tokens[shared:], root, shared)
        forest.leaf.append(leaf)
        own = torch.arange(forest.offsets[leaf], forest.offsets[leaf + 1])
        forest.path.append(torch.cat([torch.arange(shared), own]))
        for completion in completions:
            sampled += range(len(forest.tokens), len(forest.tokens) + len(completion.tokens))
            add(completion.tokens, leaf, len(prompt.tokens), sequence)
            sequence += 1
    return forest, owner, sampled


def _shared_prefix(prompts: Sequence[Prompt]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own; 0 when too few to matter."""
    if len(prompts) < 2:
        return 0
    first, last = (pick(prompt.tokens for prompt in prompts) for pick in (min, max))  # what these share, all do
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = min(common, min(len(prompt.tokens) for prompt in prompts) - 1)
    return shared if shared >= MIN_SHARED_PREFIX else 0


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
    for name in COMPUTED:
        array = getattr(experience, name)
        if array is not None:
            setattr(part, name, array[keep_sampled])
    return part


def cut(experience: Experience, sequences: Tensor, budget: int) -> list[Tensor]:
    """Cuts `sequences` (int64, ascending) into micro-batches of at most `budget` packed tokens where they fit.

    A segment that several samples share counts once in each micro-batch; a group is only cut when it does not fit
    whole.
    """
    forest = experience.forest
    lengths = (forest.segments[1:] - forest.segments[:-1]).tolist()
    chain: list[list[int]] = [[] for _ in range(experience.layout.num_sequences)]  # segments, root to leaf
    ancestors: list[list[int]] = []
    for segment, (parent, owner) in enumerate(zip(forest.parent.tolist(), experience.owner.tolist(), strict=True)):
        ancestors.append([*(ancestors[parent] if parent >= 0 else []), segment])
        if owner >= 0:
            chain[owner] = ancestors[segment]
    groups: dict[int, list[int]] = {}
    for index in sequences.tolist():
        groups.setdefault(int(experience.layout.group[index]), []).append(index)

    cuts: list[list[int]] = []
    held: set[int] = set()  # segments in the last cut

    def fits(indices: Sequence[int]) -> bool:
        return bool(cuts) and sum(lengths[s] for s in held.union(*(chain[i] for i in indices))) <= budget

    for members in groups.values():
        whole = fits(members)
        for position, indices in enumerate([members] if whole else [[index] for index in members]):
            if not fits(indices) or (position == 0 and not whole):  # a group that doesn't fit whole starts a new cut
                cuts.append([])
                held = set()
            cuts[-1] += indices
            held.update(*(chain[index] for index in indices))
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
