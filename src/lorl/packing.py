"""From graded completions to a packed Experience, and from one Experience to the micro-batches of a pass."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorl.experience import COMPUTED, Completion, Experience, Forest, Outcome, Prompt, Sampled

MIN_SHARED_PREFIX = 8  # tokens; below this a segment of its own isn't worth its attention call
MAX_REPEATED = 0.25  # of what fills a micro-batch: tokens that the next one computes again


@dataclass(slots=True)
class PromptForest:
    """Distinct prompts packed so that what they all begin with (a system prompt, worked examples) exists once."""

    tokens: list[int]
    positions: list[int]
    offsets: list[int]  # N + 1
    parent: list[int]  # N
    leaf: list[int]  # one a prompt: the segment that its completions continue
    path: list[Tensor]  # one a prompt: int64, where its tokens lie, in order

    def add(self, tokens: Sequence[int], parent: int, position: int) -> int:
        """Appends a segment, and returns its index."""
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        self.offsets.append(len(self.tokens))
        self.parent.append(parent)
        return len(self.parent) - 1


def pack_prompts(prompts: Sequence[Prompt]) -> PromptForest:
    """One tree for prompts with a common prefix (its root is the prefix), else a tree a prompt."""
    return _grow(prompts, [[] for _ in prompts])[0]


def pack(completions: Sequence[Completion], outcomes: Sequence[Outcome]) -> Experience:
    """Packs samples whose prompts' groups are adjacent. Whatever several begin with exists once: what all prompts
    share, each prompt, and the tokens in which samples of a prompt agree before they part.

    Sequence i of the result is `completions[i]`; a sample without a reward gets NaN.
    """
    prompts: list[Prompt] = []
    members: list[list[Completion]] = []
    for completion in completions:
        if not prompts or completion.prompt.id != prompts[-1].id:
            prompts.append(completion.prompt)
            members.append([])
        members[-1].append(completion)
    grown, leaf, where = _grow(prompts, members)
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
            sampled=torch.tensor([index for path in where for index in path], dtype=torch.int64),
        ),
        layout=Sampled(
            sequence=torch.repeat_interleave(torch.arange(len(completions)), lengths),
            group=torch.tensor([group for group, found in enumerate(members) for _ in found]),
        ),
        leaf=torch.tensor(leaf),
        rewards=torch.tensor(rewards, dtype=torch.float32),
        rollout_logprobs=torch.tensor([value for c in completions for value in c.logprobs], dtype=torch.float32),
        version=completions[0].version,
    )


def _grow(
    prompts: Sequence[Prompt], members: Sequence[Sequence[Completion]]
) -> tuple[PromptForest, list[int], list[list[int]]]:
    """The forest of prompts with their completions behind them; each completion's last segment, and where its tokens
    lie."""
    forest = PromptForest([], [], [0], [], [], [])
    leaf: list[int] = []
    where: list[list[int]] = []
    shared = _shared_prefix(prompts)
    root = forest.add(prompts[0].tokens[:shared], -1, 0) if shared else -1
    for prompt, completions in zip(prompts, members, strict=True):
        own = forest.add(prompt.tokens[shared:], root, shared)
        forest.leaf.append(own)
        lies = torch.arange(forest.offsets[own], forest.offsets[own + 1])
        forest.path.append(torch.cat([torch.arange(shared), lies]))
        answers = [completion.tokens for completion in completions]
        ends, paths = [own] * len(answers), [[] for _ in answers]
        _branch(forest, answers, range(len(answers)), 0, own, len(prompt.tokens), ends, paths)
        leaf += ends
        where += paths
    return forest, leaf, where


def _branch(
    forest: PromptForest,
    answers: Sequence[list[int]],
    members: Iterable[int],
    depth: int,
    parent: int,
    position: int,
    ends: list[int],
    paths: list[list[int]],
) -> None:
    """Adds what `members` of `answers` hold from `depth` on below segment `parent`: a radix tree, depth first."""
    by_token: dict[int, list[int]] = {}
    for member in members:
        if depth < len(answers[member]):
            by_token.setdefault(answers[member][depth], []).append(member)
    for alike in by_token.values():
        agree = _agreement([answers[member] for member in alike])
        segment = forest.add(answers[alike[0]][depth:agree], parent, position)
        for member in alike:
            ends[member] = segment
            paths[member] += range(forest.offsets[segment], forest.offsets[segment + 1])
        _branch(forest, answers, alike, agree, segment, position + agree - depth, ends, paths)


def _agreement(texts: Sequence[list[int]]) -> int:
    """How many tokens all of `texts` begin with."""
    first, last = min(texts), max(texts)  # in lexicographic order; what these two share, all share
    shorter = min(len(first), len(last))
    return next((i for i in range(shorter) if first[i] != last[i]), shorter)


def _shared_prefix(prompts: Sequence[Prompt]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own; 0 when too few to matter."""
    if len(prompts) < 2:
        return 0
    shared = min(_agreement([prompt.tokens for prompt in prompts]), min(len(prompt.tokens) for prompt in prompts) - 1)
    return shared if shared >= MIN_SHARED_PREFIX else 0


def select(experience: Experience, sequences: Tensor) -> Experience:
    """The experience of `sequences` (int64, ascending) alone, with the prompts that they hang off."""
    forest, layout = experience.forest, experience.layout
    chosen = torch.zeros(layout.num_sequences, dtype=torch.bool)
    chosen[sequences] = True
    lengths = (forest.segments[1:] - forest.segments[:-1]).to(torch.int64)
    keep_segment = _with_ancestors(forest, experience.leaf[sequences])
    keep_token = torch.repeat_interleave(keep_segment, lengths)
    keep_sampled = chosen[layout.sequence]
    new_token = torch.cumsum(keep_token, 0) - 1
    new_segment = torch.cumsum(keep_segment, 0) - 1
    new_sequence = torch.cumsum(chosen, 0) - 1
    parent = forest.parent[keep_segment].to(torch.int64)
    parent = torch.where(parent >= 0, new_segment[parent.clamp(min=0)], -1).to(torch.int32)
    segments = torch.cat([lengths.new_zeros(1), lengths[keep_segment].cumsum(0)]).to(torch.int32)
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
        leaf=new_segment[experience.leaf[sequences]],
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

    A segment that several samples share counts once in each micro-batch. The room that a group leaves is filled with
    samples of the next one, unless what both of its parts would then hold is too much beside what is filled.
    """
    forest = experience.forest
    lengths = (forest.segments[1:] - forest.segments[:-1]).tolist()
    ancestors: list[set[int]] = []  # of each segment, and itself
    for segment, parent in enumerate(forest.parent.tolist()):
        ancestors.append({*(ancestors[parent] if parent >= 0 else ()), segment})
    chain = [ancestors[segment] for segment in experience.leaf.tolist()]
    groups: dict[int, list[int]] = {}
    for index in sequences.tolist():
        groups.setdefault(int(experience.layout.group[index]), []).append(index)

    def size(segments: set[int]) -> int:
        return sum(lengths[segment] for segment in segments)

    def union(indices: Sequence[int]) -> set[int]:
        return set().union(*(chain[index] for index in indices))

    def filling(members: Sequence[int]) -> Sequence[int]:
        """As many of a group's first members as fit beside what is held, or none."""
        count = next(i for i in range(len(members)) if size(held | union(members[: i + 1])) > budget)
        first, rest = union(members[:count]) - held, union(members[count:])
        return members[:count] if size(first & rest) <= MAX_REPEATED * size(first) else ()

    cuts: list[list[int]] = [[]]
    held: set[int] = set()  # segments in the last cut
    for members in groups.values():
        if held and size(held | union(members)) > budget:
            first = filling(members)
            cuts[-1] += first
            members = members[len(first) :]
            cuts.append([])
            held = set()
        for index in members:
            if held and size(held | chain[index]) > budget:
                cuts.append([])
                held = set()
            cuts[-1].append(index)
            held = held | chain[index]
    return [torch.tensor(indices) for indices in cuts if indices]


def _with_ancestors(forest: Forest, leaves: Tensor) -> Tensor:
    """bool[N]: the segments `leaves` and all that they continue."""
    keep = [False] * forest.parent.numel()
    parents = forest.parent.tolist()
    for segment in leaves.tolist():
        while segment >= 0 and not keep[segment]:
            keep[segment] = True
            segment = parents[segment]
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
