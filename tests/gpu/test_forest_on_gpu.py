"""The packed path on a CUDA device: the same numbers as sequences run alone, shared prompts and not, in both dtypes,
compiled and not, kept and recomputed."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig
from lorl.experience import Completion, Forest, Outcome, Prompt
from lorl.packing import pack
from lorl.policy import layers, logprobs, varlen
from lorl.policy.attention import ForestAttention, Rule
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.policy import Policy
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.torch_engine import TorchEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BOUND = {"float32": 2e-4, "bfloat16": 6e-2}
SIZES = (5, 40, 91, 130)  # answers of each prompt


def build(folder: Path, dtype: str) -> Policy:
    save_tiny_model(folder, hidden_size=256, intermediate_size=512, num_attention_heads=4, initializer_range=0.05)
    config = ModelConfig(path=str(folder), dtype=dtype, device="cuda")  # type: ignore[arg-type]
    policy = load_policy(config, AdapterConfig(rank=8, alpha=16.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:
            parameter.data.copy_((torch.randn(parameter.shape, generator=generator) * 0.02).cuda())
    return policy


def batch(prefix: int, prompts: Sequence[int] = (30, 117, 64), alphabet: int = 256) -> list[Completion]:
    """Four answers to each of `prompts`; with a small alphabet they begin alike, so that the trees are deep."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda count: torch.randint(2, 2 + alphabet, (count,), generator=generator).tolist()  # noqa: E731
    common = draw(prefix)
    completions = []
    for group, length in enumerate(prompts):
        prompt = Prompt(f"p{group}", [*common, 2 + group, *draw(length)], "")
        for sample, size in enumerate(SIZES):
            completions.append(Completion(prompt, sample, draw(size), [0.0] * size, "", "stop", 1))
    return completions


def forest_of(completions: list[Completion]) -> Forest:
    return pack(completions, [Outcome("ok", 1.0)] * len(completions)).forest.to("cuda")


def train(policy: Policy, groups: list[list[Completion]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and the adapter's gradient, each group of completions in a pass of its own."""
    count = sum(len(c.tokens) for group in groups for c in group)
    weights = torch.randn(count, generator=torch.Generator().manual_seed(3)).cuda()
    found = torch.cat([policy.logprobs(forest_of(group), adapter=TRAINED).logprobs for group in groups])
    grads = torch.autograd.grad(found @ weights, list(policy.parameters(TRAINED).values()))
    return found.detach(), torch.cat([grad.flatten() for grad in grads])


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: str) -> None:
    assert (found[0] - expected[0]).abs().max() < BOUND[dtype]
    assert (found[1] - expected[1]).abs().max() < BOUND[dtype] * expected[1].abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_equals_separate_in_value_and_gradient(tmp_path: Path, dtype: str) -> None:
    """Together the sequences are many enough to be compiled (in bfloat16), alone they are not."""
    torch.set_float32_matmul_precision("highest")
    policy = build(tmp_path, dtype)
    for prefix, alphabet in ((0, 256), (50, 256), (0, 2)):
        completions = batch(prefix, alphabet=alphabet)
        assert forest_of(completions).tokens.numel() >= layers.MIN_TOKENS
        agree(train(policy, [completions]), train(policy, [[c] for c in completions]), dtype)


def test_own_prompts_equal_shared_prompts(tmp_path: Path) -> None:
    """The forest that shares nothing takes the way without gathering."""
    policy = build(tmp_path, "bfloat16")
    shared = batch(0)
    own = [
        Completion(Prompt(f"{c.prompt.id}-{c.sample}", c.prompt.tokens, ""), 0, c.tokens, c.logprobs, "", "stop", 1)
        for c in shared
    ]
    assert int(varlen.spans(forest_of(own)).bounds[2]) == 0
    agree(train(policy, [own]), train(policy, [shared]), "bfloat16")


def test_recomputed_layers_give_the_same_numbers_from_less_memory(tmp_path: Path) -> None:
    policy = build(tmp_path, "bfloat16")
    completions = batch(0, prompts=(900, 1100, 1000))
    found, peaks = [], []
    for recompute in (False, True):
        layers.install(policy._base, compiled=True, recompute=recompute)
        torch.cuda.reset_peak_memory_stats()
        found.append(train(policy, [completions]))
        peaks.append(torch.cuda.max_memory_allocated())
    agree(found[1], found[0], "bfloat16")
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("prefix", "alphabet"), [(0, 256), (50, 256), (0, 2)])
def test_the_kernel_attends_as_dense_masks_do(prefix: int, alphabet: int, window: int | None) -> None:
    forest = forest_of(batch(prefix, alphabet=alphabet))
    total = forest.tokens.numel()
    generator = torch.Generator("cuda").manual_seed(0)
    exact = [torch.randn(h, total, 64, generator=generator, device="cuda", requires_grad=True) for h in (8, 2, 2)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    toward = torch.randn(8, total, 64, generator=generator, device="cuda")
    layout = ForestAttention(forest)
    expected = layout.attend(0, *exact, Rule(0.125, window))  # type: ignore[misc]
    found = layout.attend(0, *half, Rule(0.125, window))  # type: ignore[misc]
    grads = torch.autograd.grad((expected * toward).sum(), exact)
    mine = torch.autograd.grad((found.float() * toward).sum(), half)
    for a, b in zip([found, *mine], [expected, *grads], strict=True):
        assert (a.float() - b).norm() < 1e-2 * b.norm()


def test_log_probabilities_are_the_same_compiled() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(700, 64, generator=generator, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(5000, 64, generator=generator, device="cuda").bfloat16() * 0.3
    targets = torch.randint(0, 5000, (700,), generator=generator, device="cuda")
    found = []
    for rows in (700, 350):  # all at once: compiled; in halves: not
        squares = torch.zeros(700, device="cuda")
        pieces = [
            logprobs.linear_logprobs(
                hidden[at : at + rows],
                weight,
                targets[at : at + rows],
                temperature=0.7,
                entropy=True,
                squares=squares[at : at + rows],
            )
            for at in range(0, 700, rows)
        ]
        values, entropies = (torch.cat(column) for column in zip(*pieces, strict=True))  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad((values + 0.1 * entropies).sum(), [hidden])
        found.append((values.detach(), entropies.detach(), squares, grad.float()))
    for compiled, plain in zip(*found, strict=True):
        assert (compiled - plain).norm() < 5e-3 * plain.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_and_trainer_agree_on_the_device(tmp_path: Path, dtype: str) -> None:
    torch.set_float32_matmul_precision("highest")
    policy = build(tmp_path, dtype)
    engine = TorchEngine(policy)
    engine.publish(TRAINED, 1, policy.checksum(TRAINED))
    requests = [Request(c.prompt, [i, i + 100, i + 200]) for i, c in enumerate(batch(50)[::4])]
    found = list(engine.generate(requests, Sampling(max_tokens=60), adapter=TRAINED))
    found.sort(key=lambda c: (c.prompt.id, c.sample))
    experience = pack(found, [Outcome("ok", 0.0)] * len(found))
    scores = policy.logprobs(experience.forest.to("cuda"), adapter=TRAINED).logprobs.cpu()
    assert (scores - experience.rollout_logprobs).abs().mean() < BOUND[dtype] / 3
