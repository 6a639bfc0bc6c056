"""peft's LoRA linear layers with the same arithmetic in fewer passes over memory.

peft computes `base(x) + B(A(x)) * scaling` with a product, a scaling and a sum that each read and write a tensor as
wide as the layer. Here one product accumulates onto the other (`addmm_`), in the forward and in the backward pass.
Layers that do anything else (DoRA and other variants, merged weights, mixed batches, quantised bases) keep peft's own
forward. In a compiled layer (see `lorl.policy.layers`) the sum is left to the compiler, which makes it part of what
reads it.

Which product comes first matters in half precision. A base product that is rounded before the adapter's is added lies
on the grid of bfloat16, and what is added to it is lost where it is less than half a step, 0.2 to 0.4% of the value: a
young adapter acts less than its numbers say. vLLM's adapter kernels add so, and the trainer does as they do while they
sample (`round_base_first`), since a policy that is trained has to be the one that was sampled. Otherwise the adapter's
product is rounded, at its own size, and the base's is added to it.
"""

from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def fuse(peft: PeftModel) -> None:
    """Gives every plain LoRA linear layer of `peft` the fused forward; adapters added later are covered too."""
    for module in peft.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.forward = MethodType(_forward, module)


def round_base_first(model: nn.Module, on: bool) -> None:
    """Whether the LoRA layers of `model` round the base's product before they add the adapter's."""
    for module in model.modules():
        if isinstance(module, Linear):
            cast(Any, module).rounds_base_first = on


def rounds_base_first(model: nn.Module) -> bool:
    """What `round_base_first` last said of `model`'s LoRA layers; False before."""
    return any(getattr(module, "rounds_base_first", False) for module in model.modules() if isinstance(module, Linear))


def _forward(self: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base: Any = self.base_layer
    if self.disable_adapters and not self.merged:
        return base(x)
    names = self.active_adapters
    name = names[0]
    plain = len(names) == 1 and name in self.lora_A and name not in self.lora_variant and not self.lora_bias[name]
    if args or kwargs or self.merged or not plain:
        return Linear.forward(self, x, *args, **kwargs)
    if torch.compiler.is_compiling():
        down, up = _weight(self.lora_A[name]), _weight(self.lora_B[name]) * self.scaling[name]
        code = F.linear(self.lora_dropout[name](x), down)
        return F.linear(x, base.weight, base.bias) + F.linear(code, up)
    rows = x.reshape(-1, x.shape[-1])
    code = F.linear(self.lora_dropout[name](rows), _weight(self.lora_A[name]))
    up = _weight(self.lora_B[name])
    if base.weight.dtype == torch.float32 or rounds_base_first(self):
        out = F.linear(rows, base.weight, base.bias)
        if torch.is_autocast_enabled(out.device.type):  # in-place products are not autocast: cast the masters by hand
            up = up.to(out.dtype)
        out = out.addmm_(code.to(out.dtype), up.T, alpha=self.scaling[name])
    else:
        out = F.linear(code, up * self.scaling[name]).to(base.weight.dtype)
        out = out.addmm_(rows.to(out.dtype), base.weight.T)
        if base.bias is not None:
            out = out.add_(base.bias)
    return out.view(*x.shape[:-1], -1)


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return weight
