"""Trained tokens a second on a GPU: a forest of shared prompts beside the same sequences each with its own prompt.

    PYTHONPATH=src python benchmarks/forest_gpu.py [--cases 256+512x8 ...] [--tokens 8704 ...] [--recompute true]

The forward and backward passes that an update makes, log-probability head included: Qwen2.5's 1.5B shape with random
bf16 weights, an adapter of rank 32 on all linear layers. README.md says what is measured.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from lorl.config import AdapterConfig
from lorl.experience import Completion, Forest, Outcome, Prompt
from lorl.packing import cut, pack, select
from lorl.policy import adapters, attention, lora
from lorl.policy.load import TRAINED, kept_bytes
from lorl.policy.policy import Policy
from lorl.policy.rounding import round_as_kernels

VOCABULARY = 151_936
ROUNDS = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU tries the script out: --shape tiny
SHAPES = {  # Qwen2.5's: hidden size, inner size, layers, heads, key-value heads
    "tiny": (64, 128, 2, 4, 2),
    "0.5b": (896, 4864, 24, 14, 2),
    "1.5b": (1536, 8960, 28, 12, 2),
    "7b": (3584, 18944, 28, 28, 4),
    "32b": (5120, 27648, 64, 40, 8),
}


@dataclass(frozen=True)
class Case:
    """Groups of `samples` answers of `response` tokens to a prompt of `prompt` tokens."""

    prompt: int
    response: int
    samples: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        lengths, samples = text.split("x")
        prompt, response = lengths.split("+")
        return cls(int(prompt), int(response), int(samples))

    def __str__(self) -> str:
        return f"{self.prompt}+{self.response} x{self.samples}"


@dataclass
class Row:
    """What one case, packed one way in micro-batches of at most `budget` tokens, came to."""

    case: Case
    packing: str
    budget: int
    packed: list[int]  # tokens of each micro-batch
    counted: int  # tokens of all sequences, each with its prompt
    first_s: float = 0.0  # the first pass, compilation included
    seconds: list[float] = field(default_factory=list)  # of all micro-batches, one after another, in each round
    peak_gib: float = 0.0

    def line(self) -> str:
        seconds, count = statistics.median(self.seconds), len(self.packed)
        return (
            f"{self.case!s:>13} {self.packing:>8} {max(self.packed):>7} {count:>7} {self.counted / seconds:>10,.0f} "
            f"{sum(self.packed) / seconds:>10,.0f} {seconds / count * 1e3:>8.1f} {self.peak_gib:>6.1f} "
            f"{self.first_s:>7.1f}"
        )


HEADER = "         case  packing largest batches  counted/s   packed/s ms/batch    GiB first_s"


def build(shape: str, dtype: torch.dtype, *, recompute: Any, eager: bool, folds: bool = False) -> Policy:
    hidden, inner, layer_count, heads, kv_heads = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layer_count,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=hidden < 2048,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        base: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME)
    base = base.to(dtype).requires_grad_(False).eval()
    peft = adapters.attach(base, TRAINED, AdapterConfig(rank=32), seed=0)
    sums = lora.fuse(peft)
    round_as_kernels(base)
    if not eager:
        from lorl.policy import layers

        layers.install(base, compiled=True, recompute=recompute, kept=kept_bytes(peft))
    policy = Policy(peft, None, trained=TRAINED, sums=sums)  # type: ignore[arg-type]  # the tokenizer is not asked
    policy.folds = folds
    generator = torch.Generator(DEVICE).manual_seed(1)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:  # peft starts it at zero
            parameter.data.normal_(0, 0.02, generator=generator)
    return policy


def forests(case: Case, groups: int, budget: int, *, shared: bool) -> Iterator[tuple[Forest, int]]:
    """Micro-batches on the device, and how many tokens their sequences have."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda count: torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()  # noqa: E731
    completions = []
    for group in range(groups):
        prompt = draw(case.prompt)
        for sample in range(case.samples):
            name = f"p{group}" if shared else f"p{group}-{sample}"
            answer = draw(case.response)
            completions.append(Completion(Prompt(name, prompt, ""), sample, answer, [0.0] * len(answer), "", "stop", 1))
    experience = pack(completions, [Outcome("ok", 1.0)] * len(completions))
    for sequences in cut(experience, torch.arange(len(completions)), budget):
        part = select(experience, sequences)
        yield part.forest.to(DEVICE), len(sequences) * (case.prompt + case.response)


def train(policy: Policy, forest: Forest) -> None:
    logprobs = policy.logprobs(forest, adapter=TRAINED).logprobs
    (logprobs.sum() / 1000).backward()


def measure(policy: Policy, case: Case, *, shared: bool, budget: int, groups: int) -> Row:
    batches = list(forests(case, groups, budget, shared=shared))
    packed = [forest.tokens.numel() for forest, _ in batches]
    row = Row(case, "shared" if shared else "own", budget, packed, sum(counted for _, counted in batches))
    for forest, _ in batches[:2]:  # the first compiles
        row.first_s = max(row.first_s, timed(policy, [forest]))
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row.seconds = [timed(policy, [forest for forest, _ in batches]) for _ in range(ROUNDS)]
    if DEVICE == "cuda":
        row.peak_gib = torch.cuda.max_memory_allocated() / 2**30
    return row


def timed(policy: Policy, batches: list[Forest]) -> float:
    sync()
    start = time.perf_counter()
    for forest in batches:
        train(policy, forest)
    sync()
    return time.perf_counter() - start


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def exactness(exact: Policy, policy: Policy, case: Case) -> Iterator[str]:
    """One group in both packings beside float32: log-probabilities and adapter gradients."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, model, shared in (("float32", exact, True), ("shared", policy, True), ("own", policy, False)):
        parts = forests(case, 1, 10**9 if shared else case.prompt + case.response, shared=shared)
        logprobs = torch.cat([model.logprobs(forest, adapter=TRAINED).logprobs for forest, _ in parts])
        weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(3)).to(DEVICE)
        grads = torch.autograd.grad((logprobs * weights).sum(), list(model.parameters(TRAINED).values()))
        found[name] = logprobs.detach(), torch.cat([grad.flatten() for grad in grads])
    reference, direction = found.pop("float32")
    for name, (logprobs, grads) in found.items():
        off = (logprobs - reference).abs()
        turned = (grads - direction).norm() / direction.norm()
        yield (
            f"{case!s:>13} {name:>8}   log-probabilities: mean {off.mean():.4f}, largest {off.max():.4f}; "
            f"adapter gradient: {turned:.4f} of its norm"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument(
        "--cases",
        nargs="+",
        type=Case.parse,
        default=["256+512x8", "256+512x1", "32+512x8", "1024+128x8", "2048+512x8"],
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[8704], help="micro-batch, in packed tokens")
    parser.add_argument("--groups", type=int, default=32, help="prompts")
    parser.add_argument("--recompute", choices=["auto", "true", "false"], default="auto")
    parser.add_argument("--eager", action="store_true", help="nothing compiled, nothing recomputed")
    parser.add_argument("--folds", action="store_true", help="multiply by weights with the adapter in them")
    parser.add_argument("--exactness", action="store_true", help="also compare with float32")
    chosen = parser.parse_args()
    chosen.cases = [Case.parse(case) if isinstance(case, str) else case for case in chosen.cases]
    chosen.recompute = {"auto": "auto", "true": True, "false": False}[chosen.recompute]
    return chosen


def main() -> None:
    chosen = arguments()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(
        device,
        f"torch {torch.__version__}",
        chosen.shape,
        "eager" if chosen.eager else "",
        "folded" if chosen.folds else "",
        flush=True,
    )
    policy = build(chosen.shape, torch.bfloat16, recompute=chosen.recompute, eager=chosen.eager, folds=chosen.folds)
    print(HEADER)
    for case in chosen.cases:  # printed as they are found: a lease can end at any time
        for budget in chosen.tokens:
            for shared in (True, False) if case.samples > 1 else (True,):
                print(measure(policy, case, shared=shared, budget=budget, groups=chosen.groups).line(), flush=True)
    if chosen.exactness:
        exact = build(chosen.shape, torch.float32, recompute=False, eager=True)
        for case in chosen.cases:
            for line in exactness(exact, policy, case) if case.samples > 1 else ():
                print(line, flush=True)


if __name__ == "__main__":
    main()
