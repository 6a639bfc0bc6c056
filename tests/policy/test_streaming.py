"""Layers that are copied to the device as a pass comes to them: the same bits, and never more than two there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import save_tiny_model
from lorl.config import ModelConfig, RunConfig
from lorl.experience import Forest
from lorl.policy.load import TRAINED, load_policy, load_tokenizer
from lorl.policy.policy import Policy
from lorl.policy.streaming import streamed_policy

LAYERS = 4
TOKENS = torch.arange(2, 14)
FOREST = Forest(
    tokens=TOKENS,
    positions=torch.arange(12),
    segments=torch.tensor([0, 12], dtype=torch.int32),
    parent=torch.tensor([-1], dtype=torch.int32),
    previous=torch.arange(12) - 1,
    sampled=torch.arange(12)[3:],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)


def policies(folder: Path, *, recompute: bool) -> tuple[Policy, Policy]:
    """One whose base is on the device, and one whose base is not."""
    config = RunConfig(model=ModelConfig(path=str(folder), gradient_checkpointing=recompute))
    kept = load_policy(config.model, config.adapter, seed=config.seed)
    streamed = streamed_policy(config, load_tokenizer(config.model))
    for policy in (kept, streamed):
        generator = torch.Generator().manual_seed(1)
        for name, parameter in policy.parameters(TRAINED).items():
            if "lora_B" in name:  # peft starts it at zero
                parameter.data.normal_(generator=generator)
    return kept, streamed


def train(policy: Policy) -> list[Tensor]:
    """Log-probabilities, and the adapter's gradients."""
    for parameter in policy.parameters(TRAINED).values():
        parameter.grad = None
    logprobs = policy.logprobs(FOREST, adapter=TRAINED).logprobs
    (logprobs * torch.arange(9)).sum().backward()
    found = [parameter.grad for parameter in policy.parameters(TRAINED).values()]
    return [logprobs.detach(), *(gradient for gradient in found if gradient is not None)]


def held(policy: Policy) -> list[int]:
    """The layers whose weights are on the device."""
    base: Any = policy.peft.get_base_model()
    sizes = [
        {value.untyped_storage().size() for name, value in layer.named_parameters() if "lora_" not in name}
        for layer in base.base_model.layers
    ]
    assert all(len(size) == 1 for size in sizes)  # one storage a layer
    return [index for index, size in enumerate(sizes) if size != {0}]


@pytest.mark.parametrize("recompute", [False, True])
def test_streamed_layers_give_the_same_bits_pass_after_pass(folder: Path, recompute: bool) -> None:
    kept, streamed = policies(folder, recompute=recompute)
    assert streamed.base_fingerprint() == kept.base_fingerprint()
    assert list(streamed.base_tensors()) == list(kept.base_tensors())
    for _ in range(2):
        ours, theirs = train(streamed), train(kept)
        assert len(ours) == len(theirs) == 1 + len(kept.parameters(TRAINED))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        with torch.no_grad():
            both = [policy.logprobs(FOREST, adapter=None).logprobs for policy in (kept, streamed)]
        assert torch.equal(*both)


def test_two_layers_are_there_at_a_time_and_one_between_passes(folder: Path) -> None:
    _, streamed = policies(folder, recompute=False)
    seen: list[list[int]] = []
    base: Any = streamed.peft.get_base_model()

    def see(_module: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(held(streamed))
        if args[0].requires_grad:
            args[0].register_hook(lambda _: seen.append(held(streamed)))

    for layer in base.base_model.layers:
        layer.mlp.register_forward_pre_hook(see)
    with torch.no_grad():
        streamed.logprobs(FOREST, adapter=TRAINED)
    assert seen == [[0, 1], [1, 2], [2, 3], [3]]
    assert held(streamed) == []
    loss = streamed.logprobs(FOREST, adapter=TRAINED).logprobs.sum()
    assert held(streamed) == [3]  # with which the backward pass begins
    seen.clear()
    loss.backward()
    assert seen == [[2, 3], [1, 2], [0, 1], [0]]
    assert held(streamed) == [0]  # with which the next pass begins


def test_a_pass_that_breaks_off_leaves_nothing_wrong_behind(folder: Path) -> None:
    kept, streamed = policies(folder, recompute=False)
    base: Any = streamed.peft.get_base_model()
    hook = base.base_model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(streamed)
    hook.remove()
    streamed.logprobs(FOREST, adapter=TRAINED)  # and one without its backward pass
    assert all(torch.equal(a, b) for a, b in zip(train(streamed), train(kept), strict=True))
    assert held(streamed) == [0]
