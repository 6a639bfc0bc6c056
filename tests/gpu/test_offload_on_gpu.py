"""Offloading on a CUDA device: the same numbers from less of its memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig, OptimConfig, RunConfig
from lorl.experience import Completion, Forest, Outcome, Prompt
from lorl.optim import make_optimizer, optimizer_tensors
from lorl.packing import pack
from lorl.policy.load import TRAINED, load_policy, load_tokenizer
from lorl.policy.policy import Policy
from lorl.policy.streaming import streamed_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS, HIDDEN, INNER = 8, 1024, 4096
LAYER_BYTES = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INNER)  # bfloat16
TOKENS = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        tmp_path_factory.mktemp("model"),
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        initializer_range=0.03,
    )


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def config_of(folder: Path, **model: object) -> RunConfig:
    fields: dict[str, object] = {"path": str(folder), "dtype": "bfloat16", "device": "cuda"}
    return RunConfig(model=ModelConfig(**(fields | model)), adapter=AdapterConfig(rank=8))  # type: ignore[arg-type]


def plain(config: RunConfig) -> Policy:
    return moved(load_policy(config.model, config.adapter, seed=config.seed))


def streamed(config: RunConfig) -> Policy:
    return moved(streamed_policy(config, load_tokenizer(config.model)))


def moved(policy: Policy) -> Policy:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:  # peft starts it at zero
            parameter.data.copy_((torch.randn(parameter.shape, generator=generator) * 0.02).cuda())
    return policy


def forest() -> Forest:
    generator = torch.Generator().manual_seed(2)
    completions = []
    for index in range(8):
        tokens = torch.randint(2, 258, (TOKENS // 8,), generator=generator).tolist()
        prompt, answer = tokens[:32], tokens[32:]
        completions.append(Completion(Prompt(f"p{index}", prompt, ""), 0, answer, [0.0] * len(answer), "", "stop", 1))
    return pack(completions, [Outcome("ok", 1.0)] * len(completions)).forest.to("cuda")


def train(policy: Policy, forest: Forest) -> list[Tensor]:
    """Log-probabilities and the adapter's gradients of the second pass: the first compiles."""
    for _ in range(2):
        for parameter in policy.parameters(TRAINED).values():
            parameter.grad = None
        logprobs = policy.logprobs(forest, adapter=TRAINED).logprobs
        (logprobs * torch.linspace(-1, 1, len(logprobs), device="cuda")).sum().backward()
    torch.cuda.synchronize()
    gradients = [parameter.grad for parameter in policy.parameters(TRAINED).values()]
    assert all(gradient is not None for gradient in gradients)
    return [logprobs.detach(), *(gradient for gradient in gradients if gradient is not None)]


def measured(make: Callable[[], Policy], forest: Forest) -> tuple[list[Tensor], int, int]:
    """What `train` finds, and the bytes allocated before it and at its peak."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    policy = make()
    resting = torch.cuda.memory_allocated() - before
    train(policy, forest)
    torch.cuda.reset_peak_memory_stats()
    found = train(policy, forest)
    return found, resting, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("recompute", [False, True])
def test_streamed_layers_give_the_same_bits_from_two_layers_of_memory(folder: Path, recompute: bool) -> None:
    config, batch = config_of(folder, gradient_checkpointing=recompute), forest()
    kept, kept_rest, kept_peak = measured(lambda: plain(config), batch)
    away, away_rest, away_peak = measured(lambda: streamed(config), batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(away, kept, strict=True))
    assert away_rest < kept_rest - (LAYERS - 2) * LAYER_BYTES
    assert away_peak < kept_peak - (LAYERS - 4) * LAYER_BYTES


def test_streamed_layers_are_right_however_far_the_host_runs_ahead(folder: Path) -> None:
    """Passes one after the other without waiting: a copy that came too early or too late would show."""
    config, batch = config_of(folder), forest()
    kept, policy = plain(config), streamed(config)
    with torch.no_grad():
        expected = kept.logprobs(batch, adapter=TRAINED).logprobs
        found = [policy.logprobs(batch, adapter=TRAINED).logprobs for _ in range(10)]
    assert all(torch.equal(logprobs, expected) for logprobs in found)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_in_host_memory_give_the_same_bits_from_less(folder: Path, recompute: bool) -> None:
    batch = forest()
    kept, _, kept_peak = measured(lambda: plain(config_of(folder, gradient_checkpointing=recompute)), batch)
    config = config_of(folder, gradient_checkpointing=recompute, activation_offload=True)
    away, _, away_peak = measured(lambda: plain(config), batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(away, kept, strict=True))
    inputs = batch.tokens.numel() * HIDDEN * 2
    # Copies run beside the computation, so some layers' activations wait on the device: as many as the machine makes.
    assert away_peak < kept_peak - LAYERS // 2 * inputs * (1 if recompute else 5)


def test_an_optimizer_in_host_memory_takes_the_same_steps() -> None:
    def steps(hosted: bool) -> tuple[list[Tensor], dict[str, Tensor], int]:
        before = torch.cuda.memory_allocated()
        generator = torch.Generator("cuda").manual_seed(0)
        parameters = {"a": torch.nn.Parameter(torch.randn(4096, 256, device="cuda", generator=generator))}
        optimizer = make_optimizer(parameters, OptimConfig(lr=0.1), hosted=hosted)
        for _ in range(4):
            parameters["a"].grad = torch.randn(4096, 256, device="cuda", generator=generator)
            optimizer.step()
        held = torch.cuda.memory_allocated() - before
        return [parameters["a"].detach().cpu()], optimizer_tensors(optimizer, ["a"]), held

    (kept, kept_state, kept_bytes), (away, away_state, away_bytes) = steps(False), steps(True)
    assert torch.equal(away[0], kept[0])
    assert all(torch.equal(away_state[name], value) for name, value in kept_state.items())
    assert away_bytes <= kept_bytes - 2 * 4096 * 256 * 4
