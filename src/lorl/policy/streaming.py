"""The frozen base's layers in host memory, each on the device while a pass needs it.

A layer's weights are views of one flat tensor on the device whose memory is given back after the layer and filled again
before it, so that the views, autograd's among them, are valid whenever the layer runs. While one layer computes, the
next of the pass is copied on a stream of its own. Frozen weights are never copied back.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorl.config import RunConfig
from lorl.policy.checksums import fingerprint
from lorl.policy.load import load_base, load_policy, pick_device, pick_dtype
from lorl.policy.policy import Policy

_ALIGNMENT = 256  # bytes; what the allocator gives every tensor of its own


def streamed_policy(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """`load_policy` over a base whose layers stay in host memory."""
    device = pick_device(config.model)
    dtype = str(pick_dtype(config.model, device)).removeprefix("torch.")
    base = load_base(config.model.model_copy(update={"device": "cpu", "dtype": dtype}))
    digest = fingerprint({name: value.detach() for name, value in base.named_parameters()})
    stream_layers(base, device)
    policy = load_policy(config.model, config.adapter, seed=config.seed, tokenizer=tokenizer, base=base)
    policy.fingerprint = digest
    return policy


def stream_layers(base: PreTrainedModel, device: torch.device) -> None:
    """Moves `base`, which is frozen and in host memory, to `device`, but for its layers: these come and go.

    Up to two layers are on the device at a time. After a forward pass that keeps gradients the last one stays, with
    which the backward pass begins; after that the first one, for the next pass.
    """
    decoder: Any = base.base_model
    ahead = torch.cuda.Stream(device) if device.type == "cuda" else None
    weights = [_Weights(layer, device, ahead) for layer in decoder.layers]
    for index, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(_before(weights, index))
        layer.register_forward_hook(_after(weights, index))
    base.to(device)  # type: ignore[arg-type]  # the rest


class _Weights:
    """One layer's, in host memory and now and then on the device."""

    def __init__(self, layer: nn.Module, device: torch.device, ahead: Any) -> None:
        self._ahead = ahead  # the stream to copy on; None: at once
        self._copied: Any = None  # an event: until then the weights are on their way
        starts, size = [], 0
        for parameter in layer.parameters():
            starts.append(size)
            size += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
        host = torch.empty(size, dtype=torch.uint8, pin_memory=ahead is not None)
        flat = torch.empty(size, dtype=torch.uint8, device=device)
        for parameter, start in zip(layer.parameters(), starts, strict=True):
            place = slice(start, start + parameter.nbytes)
            host[place] = parameter.detach().contiguous().view(-1).view(torch.uint8)
            parameter.data = flat[place].view(parameter.dtype).view(parameter.shape)
        self._host = host.untyped_storage()
        self._there = flat.untyped_storage()
        self.free()

    def fetch(self) -> None:
        """Starts the copy to the device, unless it was."""
        if self._there.size():
            return
        self._there.resize_(self._host.size())
        if self._ahead is None:
            self._there.copy_(self._host)  # of storages: autograd need not know
            return
        self._ahead.wait_stream(torch.cuda.current_stream())  # which may still use what the memory was before
        with torch.cuda.stream(self._ahead):
            self._there.copy_(self._host, non_blocking=True)
            self._copied = self._ahead.record_event()

    def use(self) -> None:
        """The weights are on the device for whatever is launched from now on."""
        self.fetch()
        self._wait()

    def free(self) -> None:
        self._wait()  # the memory goes to whoever asks next
        self._there.resize_(0)

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None


def _before(weights: Sequence[_Weights], index: int) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        weights[index].use()
        if index + 1 < len(weights):
            weights[index + 1].fetch()

    return hook


def _after(weights: Sequence[_Weights], index: int) -> Callable[..., None]:
    last = index + 1 == len(weights)

    def before_backward(_: Tensor) -> None:
        if not last:
            weights[index + 1].free()  # whose backward pass made this gradient
        weights[index].use()
        if index:
            weights[index - 1].fetch()

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        returns = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        for tensor in returns:
            tensor.register_hook(before_backward)
        if not (returns and last):
            weights[index].free()

    return hook
