"""peft's LoRA linear layers with the same arithmetic in fewer passes over memory.

peft computes `base(x) + B(A(x)) * scaling` with a product, a scaling and a sum that each read and write a tensor as
wide as the layer. Here the second product accumulates onto the first (`addmm_`, with the scaling as its factor), in the
forward and in the backward pass. Layers that do anything else (DoRA and other variants, merged weights, mixed batches,
quantised bases) keep peft's own forward. In a compiled layer (see `lorl.policy.layers`) the sum is left to the
compiler, which makes it part of what reads it.

In half precision the base's product is rounded before the adapter's is added, and what is added is lost where it is
less than half a step of the format, 0.2 to 0.4% of the value in bfloat16: a young adapter acts less than its numbers
say. vLLM's kernels for adapters add so. The policy that is trained has to be the one that was sampled, so training
passes lose it too, compiled or not. (SmolLM2 on an H100 after one step at a rate of 5e-4: 0.023 nats between engine and
trainer so, 0.082 where compiled layers add exactly.)

An engine that folds adapters into the base samples from weights that are rounded with the adapter in them, which loses
other bits. Beside such an engine (`Sums.in_weights`) a pass makes the same weights, a layer at a time, and multiplies
by them. That is also less work over many tokens: the sum is as large as the weight, not as the layer's output.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd import Function


@dataclass(slots=True)
class Sums:
    """How the layers of one model add the adapter that is selected: to their outputs or to their weights."""

    in_weights: bool = False


def fuse(peft: PeftModel) -> Sums:
    """Gives every plain LoRA linear layer of `peft` the fused forward; adapters added later are covered too.

    Returns the switch that all of them read.
    """
    sums = Sums()
    for module in peft.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            layer: Any = module
            layer.sums = sums
            layer.forward = MethodType(_forward, module)
    return sums


def _forward(self: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base: Any = self.base_layer
    if self.disable_adapters and not self.merged:
        return base(x)
    names = self.active_adapters
    name = names[0]
    plain = len(names) == 1 and name in self.lora_A and name not in self.lora_variant and not self.lora_bias[name]
    if args or kwargs or self.merged or not plain:
        return Linear.forward(self, x, *args, **kwargs)
    dropout: Any = self.lora_dropout[name]
    sums: Any = self.sums
    if sums.in_weights and not (isinstance(dropout, nn.Dropout) and dropout.training):
        rows, kind = x.reshape(-1, x.shape[-1]), base.weight.dtype
        down, up = _weight(self.lora_A[name]), _weight(self.lora_B[name]) * self.scaling[name]
        found: Any = _InWeights.apply(rows.to(kind), base.weight, base.bias, down.to(kind), up.to(kind))  # type: ignore[no-untyped-call]
        return found.view(*x.shape[:-1], -1)
    if torch.compiler.is_compiling():
        down, up = _weight(self.lora_A[name]), _weight(self.lora_B[name]) * self.scaling[name]
        code = F.linear(self.lora_dropout[name](x), down)
        return F.linear(x, base.weight, base.bias) + F.linear(code, up)
    rows = x.reshape(-1, x.shape[-1])
    down = F.linear(self.lora_dropout[name](rows), _weight(self.lora_A[name]))
    up = _weight(self.lora_B[name])
    out = F.linear(rows, base.weight, base.bias)
    if torch.is_autocast_enabled(out.device.type):  # in-place products are not autocast: cast the masters by hand
        up = up.to(out.dtype)
    return out.addmm_(down.to(out.dtype), up.T, alpha=self.scaling[name]).view(*x.shape[:-1], -1)


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return weight


class _InWeights(Function):
    """x (W + up down)^T + bias, the sum of the weights rounded as W is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        """x [T, in], weight [out, in], bias [out], down [rank, in], up [out, rank] -> [T, out]."""
        ctx.save_for_backward(x, weight, down, up)
        return F.linear(x, torch.addmm(weight, up, down), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The sum is made again: kept, it would be a second copy of the base. And by other operations, for a compiler
        that finds the same ones in both halves keeps what they made."""
        x, weight, down, up = ctx.saved_tensors
        return grad @ (weight + up @ down), None, None, (grad @ up).T @ x, grad.T @ (x @ down.T)
