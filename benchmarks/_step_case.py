"""What both sides of `step_cpu.py` train on. It imports neither lorl nor TRL: each side has its own interpreter."""

import argparse
import json
import random
import resource
from dataclasses import dataclass

RANK = 32
ALPHA = 32
LEARNING_RATE = 3e-5
MAX_GRAD_NORM = 1.0
PROMPTS_PER_STEP = 2
SAMPLES = 8  # completions of a prompt
RESPONSE_TOKENS = 11  # of every completion: the end token is barred, so no side gets shorter work
PROMPT_TOKENS = {"long": 200, "short": 40}


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]


def make_prompts(tokenizer, length: int, count: int) -> list[Prompt]:
    """`count` different prompts of exactly `length` tokens each, whose text encodes back to the same ids."""
    prompts = []
    for seed in range(count):
        numbers = random.Random(seed).choices(range(10, 100), k=length)
        ids = tokenizer("Sort: " + " ".join(map(str, numbers)))["input_ids"][:length]
        prompt = Prompt(tokenizer.decode(ids), ids)
        if len(ids) != length or tokenizer(prompt.text)["input_ids"] != ids:
            raise ValueError(f"prompt {seed} does not survive decoding and encoding at {length} tokens")
        prompts.append(prompt)
    return prompts


def reward(sample: int) -> float:
    """Reward of the `sample`-th completion of a prompt: no group is ever uniform, so every group has a gradient."""
    return float(sample % 2)


def side_arguments() -> argparse.Namespace:
    """What `step_cpu.py` hands to a side: `model` (folder), `case`, `steps` (with the warm-up step), `micro_batch`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("case", choices=PROMPT_TOKENS)
    parser.add_argument("steps", type=int)
    parser.add_argument("micro_batch", type=int, help="completions in one of TRL's passes; lorl packs by tokens")
    return parser.parse_args()


def report(seconds: list[float], prompt_tokens: list[int], response_tokens: list[int]) -> None:
    """Prints the side's one JSON line.

    `seconds`: wall time of every optimizer step, sampling included, the warm-up step first. `prompt_tokens` and
    `response_tokens`: the distinct lengths that the side itself saw, so that a difference in work shows.
    """
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    line = {
        "seconds": seconds,
        "peak_gib": peak_gib,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens,
    }
    print(json.dumps(line), flush=True)
