"""How a decoder's layers run: compiled on a GPU, and recomputed in the backward pass where memory asks for it.

All layers share the compiled code. What differs between them (weights, adapters) and between batches (tokens, the
forest's shape) is input to it; the attention is a call that the compiler does not look into. Decoding, prefill and
short passes run as they are: compiling would cost more than it saves. What is made one operation is rounded between
its parts as it was before, or young adapters would act otherwise than in the engine (`lorl.policy.lora`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

from lorl.plan.footprint import SPARE
from lorl.policy import activations
from lorl.policy.attention import ForestAttention

MIN_TOKENS = 512  # shorter passes are not compiled
_ROUNDED: dict[str, Any] = {"emulate_precision_casts": True}  # of torch.compile
_HALF = (torch.bfloat16, torch.float16)
_VERSIONS = 64  # torch's limit of 8 versions of a layer: fewer than adapters x (training, scoring) can need

logger = logging.get_logger(__name__)


def install(
    model: PreTrainedModel,
    *,
    compiled: bool,
    recompute: bool | Literal["auto"],
    offload: bool = False,
    kept: Callable[[int], int] | None = None,
) -> None:
    """Makes every layer of `model`'s decoder run as this module says.

    Args:
        compiled: Compile training and scoring passes over forests; for GPUs.
        recompute: Whether training keeps only each layer's input and computes the layer again in the backward pass
            (gradient checkpointing); "auto": in passes on a GPU whose activations would not fit its free memory.
        offload: Whether what training keeps of a layer goes to host memory.
        kept: Bytes that a pass over so many tokens keeps where it does not recompute. None: nobody knows, and "auto"
            recomputes.
    """
    compiled = compiled and getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is None  # no kernel
    if recompute == "auto" and model.device.type != "cuda":
        recompute = False
    if not (compiled or recompute or offload):
        return
    if recompute == "auto" and kept is None:
        name = type(model).__name__
        logger.warning(
            f"{name}: nobody knows what its layers keep; model.gradient_checkpointing=auto computes them again"
        )
    if compiled:
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, _VERSIONS)
    decoder: Any = model.base_model
    stack = _Stack(compiled, recompute, offload, kept)
    for index, layer in enumerate(decoder.layers):
        layer.forward = _runner(layer, stack, first=index == 0)


class _Stack:
    """What the layers of one decoder have in common."""

    def __init__(
        self,
        compiled: bool,
        recompute: bool | Literal["auto"],
        offload: bool,
        kept: Callable[[int], int] | None,
    ) -> None:
        self.compiled = compiled
        self.offload = offload
        self._recompute = recompute
        self._kept = kept
        self._crowded = False

    def recomputes(self, hidden: Tensor, *, first: bool) -> bool:
        """Whether this pass keeps only the layers' inputs; settled at its first layer."""
        if isinstance(self._recompute, bool):
            return self._recompute
        if first:
            self._crowded = self._kept is None or self._kept(hidden.shape[1]) > SPARE * _free(hidden.device)
        return self._crowded


def _runner(layer: nn.Module, stack: _Stack, *, first: bool) -> Callable[..., Any]:
    """What takes the place of `layer.forward`."""
    plain = layer.forward
    compiled = torch.compile(plain, fullgraph=True, options=_ROUNDED) if stack.compiled else plain
    dynamo: Any = torch._dynamo if stack.compiled else None

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (stack.compiled and _worth_compiling(hidden, kwargs.get("layout"))):
            return plain(hidden, *args, **kwargs)
        torch._dynamo.mark_dynamic(hidden, 1)
        if first:
            _mark_lengths(hidden, kwargs)
        try:
            return compiled(hidden, *args, **kwargs)
        except dynamo.exc.TorchDynamoException as error:
            stack.compiled = False
            reason = str(error).strip().split("\n", 1)[0][:200]
            logger.warning(f"{type(layer).__name__} can't be compiled, so training runs slower: {reason}")
            return plain(hidden, *args, **kwargs)

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(hidden, *args, **kwargs)
        if stack.compiled and not hidden.requires_grad:  # embeddings: else the first layer would be compiled apart
            hidden = hidden.detach().requires_grad_()
        with _keeping(hidden, args, kwargs) if stack.offload else nullcontext():
            if stack.recomputes(hidden, first=first):
                return checkpoint(run, hidden, *args, use_reentrant=False, **kwargs)
            return run(hidden, *args, **kwargs)

    def _keeping(hidden: Tensor, *shared: Any) -> Any:
        given = (leaf for leaf in tree_leaves(shared) if isinstance(leaf, Tensor))
        return activations.on_host(hidden.shape[1], (*layer.parameters(), *given))

    return forward


def _worth_compiling(hidden: Tensor, layout: object) -> bool:
    return (
        hidden.shape[1] >= MIN_TOKENS
        and hidden.dtype in _HALF
        and isinstance(layout, ForestAttention)
        and layout.spans is not None
        and layout.recorded is None
    )


def _mark_lengths(hidden: Tensor, kwargs: dict[str, Any]) -> None:
    """Tells the compiler which sizes of what all layers are given differ from pass to pass.

    It would find out by compiling twice; and told `dynamic=True` it takes for one what happens to be equal at first.
    """
    for tensor in tree_leaves(kwargs):
        if isinstance(tensor, Tensor) and tensor.ndim > 1 and tensor.shape[1] == hidden.shape[1]:
            torch._dynamo.mark_dynamic(tensor, 1)
    spans = kwargs["layout"].spans
    for tensor in (spans.queries, spans.keys, spans.gathered):
        torch._dynamo.mark_dynamic(tensor, 0)


def _free(device: torch.device) -> int:
    """Bytes that this process can still allocate."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
