"""What the report shows of a run's sampled completions: a few prompts over training, and how grading ended.

`rollouts/step-N.jsonl` holds one line a sample: {"step", "prompt_id", "prompt", "sample", "completion", "reward",
"status", "finish", "tokens", "extras", "ground_truth"}. The files can be gigabytes, so they are streamed, twice.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorl.tracking.jsonl import read_jsonl

PROMPTS_SHOWN = 6
STEPS_SHOWN = 5
SAMPLES_SHOWN = 4


@dataclass(slots=True)
class Moment:
    """One prompt's samples at one step."""

    step: int
    samples: list[dict[str, Any]] = field(default_factory=list)  # the first SAMPLES_SHOWN, by sample index
    count: int = 0
    rewards: list[float] = field(default_factory=list)  # of the graded samples

    @property
    def mean_reward(self) -> float | None:
        return sum(self.rewards) / len(self.rewards) if self.rewards else None


@dataclass(slots=True)
class Card:
    """One prompt and its completions as training went on."""

    prompt_id: str
    prompt: str
    ground_truth: Any
    moments: list[Moment]


@dataclass(slots=True)
class Rollouts:
    cards: list[Card]
    samples: int  # all samples in the files
    failures: dict[str, Counter[int]]  # status other than "ok" -> step -> how many


def read_rollouts(run_folder: Path) -> Rollouts:
    """Read what the report needs of a run's rollouts; a run without any has no cards."""
    files = _step_files(run_folder)
    steps_of: dict[str, set[int]] = defaultdict(set)
    failures: dict[str, Counter[int]] = defaultdict(Counter)
    samples = 0
    for step, row in _rows(files):
        samples += 1
        steps_of[str(row.get("prompt_id"))].add(step)
        if (status := row.get("status", "ok")) != "ok":
            failures[str(status)][step] += 1
    chosen = {prompt: spread(sorted(steps_of[prompt]), STEPS_SHOWN) for prompt in choose_prompts(steps_of)}
    wanted = {step for steps in chosen.values() for step in steps}
    return Rollouts(_cards([f for f in files if f[0] in wanted], chosen), samples, dict(failures))


def choose_prompts(steps_of: dict[str, set[int]], count: int = PROMPTS_SHOWN) -> list[str]:
    """The prompts that came up at the most steps, since they show change best; where data was seen only once, prompts
    spread evenly over training."""
    recurring = [prompt for prompt, steps in steps_of.items() if len(steps) > 1]
    recurring.sort(key=lambda prompt: (-len(steps_of[prompt]), min(steps_of[prompt])))
    once = [prompt for prompt, steps in steps_of.items() if len(steps) == 1]
    once.sort(key=lambda prompt: min(steps_of[prompt]))  # stable: file order within a step
    chosen = recurring[:count]
    return chosen + spread(once, count - len(chosen))


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced, first and last among them."""
    if len(items) <= count or count < 1:
        return items[: max(count, 0)]
    if count == 1:
        return items[:1]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _cards(files: list[tuple[int, Path]], chosen: dict[str, list[int]]) -> list[Card]:
    cards: dict[str, Card] = {}
    moments: dict[tuple[str, int], Moment] = {}
    for step, row in _rows(files):
        prompt_id = str(row.get("prompt_id"))
        if step not in chosen.get(prompt_id, ()):
            continue
        card = cards.setdefault(
            prompt_id, Card(prompt_id, str(row.get("prompt", "")), row.get("ground_truth"), moments=[])
        )
        if (prompt_id, step) not in moments:
            moments[prompt_id, step] = Moment(step)
            card.moments.append(moments[prompt_id, step])
        moment = moments[prompt_id, step]
        moment.count += 1
        if row.get("reward") is not None:
            moment.rewards.append(float(row["reward"]))
        moment.samples.append(row)
        moment.samples.sort(key=lambda sample: sample.get("sample", 0))
        del moment.samples[SAMPLES_SHOWN:]
    return [cards[prompt] for prompt in chosen if prompt in cards]


def _rows(files: list[tuple[int, Path]]) -> Iterator[tuple[int, dict[str, Any]]]:
    for step, path in files:
        for row in read_jsonl(path):
            yield step, row


def _step_files(run_folder: Path) -> list[tuple[int, Path]]:
    """(step, file) by step."""
    matches = (
        (re.fullmatch(r"step-(\d+)\.jsonl", path.name), path) for path in run_folder.glob("rollouts/step-*.jsonl")
    )
    return sorted((int(match[1]), path) for match, path in matches if match)
