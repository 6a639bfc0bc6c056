"""Half precision rounded where vLLM's kernels round.

transformers writes every operation's result in the base's dtype. vLLM's kernels keep float32 on the way: they rotate
queries and keys by cosines of the base's dtype and round once, where transformers rounds three times; and RMSNorm
multiplies by its weight before it rounds, not after. Each rounding that only one side makes is a difference between the
policy that is sampled and the one that is trained (docs/performance.md, "Log-probabilities, engine and trainer"). The
other roundings, of the activation in the MLP and of the residual sum, are the same on both sides already.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorl.policy import attention


def round_as_kernels(model: PreTrainedModel) -> None:
    """Makes the rotary embeddings and RMSNorms of a model in half precision round once. float32 is left alone."""
    if model.dtype not in (torch.bfloat16, torch.float16):
        return

    def widen(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """Cosines and sines as they are, in float32: what they are multiplied with is then computed in float32, and
        lorl's attention rounds it. transformers' own attentions want the base's dtype."""
        if model.config._attn_implementation != attention.NAME or not isinstance(out, tuple):
            return out
        return tuple(angle.float() for angle in out)

    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RotaryEmbedding"):
            module.register_forward_hook(widen)
        elif kind.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):  # Gemma's has `eps`, and rounds once
            module.forward = MethodType(_normalized, module)


def _normalized(self: nn.Module, hidden: Tensor) -> Tensor:
    norm: Any = self
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return (wide * norm.weight.float()).to(hidden.dtype)
