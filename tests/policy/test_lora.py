"""The fused LoRA forward is peft's, in value and gradient, and leaves to peft what it does not do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorl.policy.layers import _ROUNDED
from lorl.policy.lora import fuse


def model(folder: Path, **fields: object) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **fields)  # type: ignore[arg-type]
    peft = get_peft_model(base, config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert isinstance(peft, PeftModel)
    return peft


@pytest.mark.parametrize("in_weights", [False, True])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_value_and_gradient_are_pefts(tiny_model: Path, fields: dict[str, bool], in_weights: bool) -> None:
    tokens = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for fused in (False, True):
        peft = model(tiny_model, **fields).double()
        if fused:
            fuse(peft).in_weights = in_weights
        logits = peft(input_ids=tokens).logits
        trained = [p for _, p in sorted(peft.named_parameters()) if p.requires_grad]
        found.append((logits.detach(), torch.autograd.grad(logits.square().mean(), trained)))
        with peft.disable_adapter():
            found[-1] += (peft(input_ids=tokens).logits.detach(),)
    (theirs, their_grads, their_base), (mine, my_grads, my_base) = found
    assert torch.allclose(mine, theirs, atol=1e-5)
    assert torch.equal(my_base, their_base)
    for mine_g, theirs_g in zip(my_grads, their_grads, strict=True):
        assert torch.allclose(mine_g, theirs_g, atol=1e-6)


def test_merged_and_switched_adapters_still_work(tiny_model: Path) -> None:
    tokens = torch.randint(2, 258, (1, 9), generator=torch.Generator().manual_seed(0))
    peft = model(tiny_model)
    fuse(peft)
    with torch.no_grad():
        apart = peft(input_ids=tokens).logits
        peft.merge_adapter()
        assert torch.allclose(peft(input_ids=tokens).logits, apart, atol=1e-4)
        peft.unmerge_adapter()
        peft.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
        peft.set_adapter("other")
        with peft.disable_adapter():
            base = peft(input_ids=tokens).logits
        assert torch.allclose(peft(input_ids=tokens).logits, base, atol=1e-6)  # its B is zero
        peft.set_adapter("default")
        assert torch.allclose(peft(input_ids=tokens).logits, apart, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_less_than_half_a_step_of_bfloat16_is_lost_as_in_the_engine(tiny_model: Path, compiled: bool) -> None:
    """An adapter that moves its layer by a tenth of a percent, and a layer that moves its residual stream as little."""
    peft = model(tiny_model).to(torch.bfloat16)
    fuse(peft)
    layer: Any = next(module for name, module in peft.named_modules() if name.endswith("layers.0.mlp.up_proj"))

    def read(x: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        return (stream + layer(x)).float().square()

    run = torch.compile(read, fullgraph=True, options=_ROUNDED) if compiled else read
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.4 / layer.in_features)
        layer.lora_A["default"].weight.fill_(1.0 / layer.in_features)
        layer.lora_B["default"].weight.fill_(1e-3 / 8)  # rank 4, scaling 2
    x = (1 + torch.rand(500, layer.in_features, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    with peft.disable_adapter():
        base = layer(x)
    assert torch.equal(run(x, torch.zeros_like(base)), base.float().square())
    assert torch.equal(run(x, torch.full_like(base, 4096.0)), torch.full(base.shape, 4096.0**2))


def test_dropout_keeps_the_adapter_beside_the_weights(tiny_model: Path) -> None:
    peft = model(tiny_model, lora_dropout=0.5)
    sums = fuse(peft)
    layer: Any = next(module for name, module in peft.named_modules() if name.endswith("layers.0.mlp.up_proj"))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    found = []
    for sums.in_weights in (False, True):
        torch.manual_seed(0)
        found.append((layer.train()(x), layer.eval()(x)))
    (dropped, whole), (dropped_again, summed) = found
    assert torch.equal(dropped, dropped_again)
    assert not torch.equal(whole, summed)  # another order of operations
    assert torch.allclose(whole, summed, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_round_as_a_fold_rounds_them(tiny_model: Path, compiled: bool) -> None:
    """Beside an engine that folds, a bfloat16 layer says what the folded weight says: what is less than half a step of
    the weight is lost, what is less than half a step of the output alone is not."""
    peft = model(tiny_model).to(torch.bfloat16)
    fuse(peft).in_weights = True
    layer: Any = next(module for name, module in peft.named_modules() if name.endswith("layers.0.mlp.up_proj"))
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    run = torch.compile(layer, fullgraph=True, options=_ROUNDED) if compiled else layer
    x = torch.randn(500, layer.in_features, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        down.mul_(0.02)
        weight = layer.base_layer.weight
        folded = (weight.double() + layer.scaling["default"] * up.double() @ down.double()).to(torch.bfloat16)
        assert 0.1 < (folded == weight).float().mean() < 0.9
        assert torch.equal(run(x), x @ folded.T)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_through_the_weights_are_those_of_the_exact_sum(tiny_model: Path, compiled: bool) -> None:
    """bfloat16 beside float64, where the sum is not rounded."""
    peft = model(tiny_model).to(torch.bfloat16)
    fuse(peft).in_weights = True
    layer: Any = next(module for name, module in peft.named_modules() if name.endswith("layers.0.mlp.up_proj"))
    up, down, weight = layer.lora_B["default"].weight, layer.lora_A["default"].weight, layer.base_layer.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, layer.in_features, generator=generator).to(torch.bfloat16).requires_grad_()
    pull = torch.randn(500, layer.out_features, generator=generator).to(torch.bfloat16)
    run = torch.compile(layer, fullgraph=True, options=_ROUNDED) if compiled else layer
    mine = torch.autograd.grad(run(x), [x, up, down], pull)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, up, down)]
    exact = wide[0] @ (weight.double() + layer.scaling["default"] * wide[1] @ wide[2]).T
    for found, expected in zip(mine, torch.autograd.grad(exact, wide, pull.double()), strict=True):
        assert (found - expected).abs().max() < 0.01 * expected.abs().max()


def test_a_compiled_layer_keeps_no_second_copy_of_its_weight(tiny_model: Path) -> None:
    peft = model(tiny_model).to(torch.bfloat16)
    fuse(peft).in_weights = True
    layer: Any = next(module for name, module in peft.named_modules() if name.endswith("layers.0.mlp.up_proj"))
    run, weight = torch.compile(layer, fullgraph=True, options=_ROUNDED), layer.base_layer.weight.requires_grad_(False)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(torch.randn(500, layer.in_features, dtype=torch.bfloat16))
    assert any(tensor.shape == (500, layer.in_features) for tensor in kept)  # what the adapter's gradient is made of
    assert all(tensor.numel() < weight.numel() or tensor.shape[0] == 500 for tensor in kept if tensor is not weight)
