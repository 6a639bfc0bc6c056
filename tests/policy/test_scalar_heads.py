"""Second adapters on one base, their scalar heads, and the sums of squared probabilities."""

from pathlib import Path

import pytest
import torch

from lorl.algorithms.kl import full
from lorl.config import AdapterConfig, ModelConfig
from lorl.errors import UserError
from lorl.experience import Completion, Outcome, Prompt
from lorl.packing import pack
from lorl.policy import logprobs as module
from lorl.policy.adapters import like
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.logprobs import head_logprobs, linear_kl, linear_logprobs


@pytest.mark.parametrize("path", ["linear", "any head"])
@pytest.mark.parametrize("grad", [False, True])
def test_sums_of_squared_probabilities_come_with_the_same_pass(
    monkeypatch: pytest.MonkeyPatch, path: str, grad: bool
) -> None:
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 4 * 101 * 8)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, dtype=torch.float64, generator=generator, requires_grad=grad)
    weight = torch.randn(101, 16, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 101, (37,), generator=generator)
    squares = torch.zeros(37, dtype=torch.float64)
    if path == "linear":
        logprobs, _ = linear_logprobs(hidden, weight, targets, temperature=0.7, squares=squares)
    else:
        logprobs, _ = head_logprobs(
            hidden, lambda x: x @ weight.T, targets, vocabulary=101, temperature=0.7, squares=squares
        )
    p = (hidden @ weight.T / 0.7).softmax(-1)
    assert torch.allclose(squares, p.square().sum(-1), atol=1e-12)
    assert torch.allclose(logprobs, p.gather(1, targets[:, None]).squeeze(1).log(), atol=1e-12)
    assert not squares.requires_grad


def test_exact_kl_equals_its_definition_in_value_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 4 * 101 * 8)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(21, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    anchor = torch.randn(21, 16, dtype=torch.float64, generator=generator)
    weight = torch.randn(101, 16, dtype=torch.float64, generator=generator)
    factors = torch.randn(21, dtype=torch.float64, generator=generator)
    got = linear_kl(hidden, anchor, weight, temperature=0.7)
    want = full(hidden @ weight.T / 0.7, anchor @ weight.T / 0.7)
    assert torch.allclose(got, want, atol=1e-12)
    (mine,) = torch.autograd.grad((got * factors).sum(), hidden)
    (theirs,) = torch.autograd.grad((want * factors).sum(), hidden)
    assert torch.allclose(mine, theirs, atol=1e-12)


def test_adapters_on_one_base_do_not_touch_each_other(tiny_model: Path) -> None:
    policy = load_policy(ModelConfig(path=str(tiny_model)), AdapterConfig(rank=4), seed=0)
    forest = pack([Completion(Prompt("p", [5, 6, 7], ""), 0, [8, 9, 10], [0.0] * 3, "", "stop", 1)], [Outcome("ok", 1)])
    before = policy.logprobs(forest.forest, adapter=TRAINED).logprobs
    policy.add_adapter(
        "critic", like(policy.lora_config(TRAINED), rank=2, alpha=None, targets=None), seed=0, learns=True
    )
    policy.add_scalar_head("critic", "value_head")
    at = forest.forest.previous[forest.forest.sampled]
    values = policy.scalars(forest.forest, at, adapter="critic")
    assert values.tolist() == [0.0, 0.0, 0.0]
    for value in policy.parameters("critic").values():
        value.data.normal_(std=0.3)
    assert policy.scalars(forest.forest, at, adapter="critic").abs().min() > 0
    policy.scalars(forest.forest, at, adapter="critic").sum().backward()
    assert all(value.grad is not None for value in policy.parameters("critic").values())
    assert all(value.grad is None for value in policy.parameters(TRAINED).values())
    assert torch.equal(policy.logprobs(forest.forest, adapter=TRAINED).logprobs, before)


def test_a_head_survives_the_round_trip_and_its_absence_is_told(tiny_model: Path) -> None:
    policy = load_policy(ModelConfig(path=str(tiny_model)), AdapterConfig(rank=4), seed=0)
    policy.add_adapter("critic", policy.lora_config(TRAINED), seed=0, learns=True)
    policy.add_scalar_head("critic", "value_head")
    policy.parameters("critic")["value_head.bias"].data.fill_(2.5)
    saved = policy.adapter_tensors("critic")
    policy.parameters("critic")["value_head.bias"].data.zero_()
    policy.load_adapter("critic", saved, "there")
    assert policy.parameters("critic")["value_head.bias"].item() == 2.5
    del saved["value_head.bias"]
    with pytest.raises(UserError, match=r"there holds no 'value_head.bias'"):
        policy.load_adapter("critic", saved, "there")


def test_misspelt_targets_of_a_second_adapter_are_named(tiny_model: Path) -> None:
    policy = load_policy(ModelConfig(path=str(tiny_model)), AdapterConfig(rank=4), seed=0)
    lora = like(policy.lora_config(TRAINED), rank=None, alpha=None, targets=["q_prj"])
    with pytest.raises(UserError, match="'q_proj'"):
        policy.add_adapter("critic", lora, seed=0, learns=True)
