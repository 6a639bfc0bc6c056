"""What layers keep for the backward pass, in host memory: the same gradients, and no weight among it."""

from pathlib import Path

import pytest
import torch
from test_layers import forest_of, train

from lorl.config import AdapterConfig, ModelConfig
from lorl.policy import activations
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.policy import Policy

HIDDEN = 48


def load(folder: Path, *, recompute: bool, offload: bool) -> Policy:
    config = ModelConfig(path=str(folder), gradient_checkpointing=recompute, activation_offload=offload)
    policy = load_policy(config, AdapterConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    return policy


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_the_same_bits_and_only_activations_travel(
    recompute: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forest = forest_of(2, 3)
    tokens = forest.tokens.numel()
    assert tokens not in (HIDDEN, 96, 24, 4)
    sent: list[torch.Tensor] = []
    send = activations._send
    monkeypatch.setattr(activations, "_send", lambda tensor: (sent.append(tensor), send(tensor))[1])
    plain = train(load(tiny_model, recompute=recompute, offload=False), forest)
    assert not sent
    policy = load(tiny_model, recompute=recompute, offload=True)
    away = train(policy, forest)
    for ours, theirs in zip(away[:2], plain[:2], strict=True):
        assert torch.equal(ours, theirs)
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.peft.parameters()}
    assert all(tokens in tensor.shape for tensor in sent)
    assert not weights & {tensor.untyped_storage().data_ptr() for tensor in sent}
    if recompute:  # each of the two layers keeps its input alone
        assert [tuple(tensor.shape) for tensor in sent] == [(1, tokens, HIDDEN)] * 2
    else:
        assert len(sent) > 10


def test_what_several_operations_save_travels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    send = activations._send
    monkeypatch.setattr(activations, "_send", lambda tensor: (sent.append(tensor), send(tensor))[1])
    x = torch.randn(5, 3, requires_grad=True)
    weight = torch.randn(3, 3, requires_grad=True)
    with activations.on_host(5, [weight]):
        z = x.exp()
        y = (z @ weight).sin() * z.square()  # exp, matmul and square all save z; sin and mul save one each of theirs
    assert len(sent) == 4  # z, what sin read, and both factors
    y.sum().backward()
    assert x.grad is not None
    z = x.detach().exp()
    inner = z @ weight.detach()
    assert torch.allclose(x.grad, z * ((inner.cos() * z.square()) @ weight.detach().T + inner.sin() * 2 * z))
