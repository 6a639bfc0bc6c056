"""What autograd keeps of a layer for the backward pass, in host memory until then."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Away:
    host: Tensor
    device: torch.device
    copied: Any  # an event; None: the copy is there


def on_host(tokens: int, stay: Iterable[Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """A context: what is computed in it for `tokens` tokens and saved for the backward pass goes to the host.

    Only activations do: floating-point tensors with a dimension of that size. Those in the memory of `stay` (weights,
    and what all layers share) remain. On a GPU the copies run beside the computation.
    """
    staying = {tensor.untyped_storage().data_ptr() for tensor in stay}
    sent: dict[Any, tuple[_Away, Tensor]] = {}  # several operations save the same; the tensors themselves, for as long

    def pack(tensor: Tensor) -> Any:
        if (
            not tensor.is_floating_point()
            or tokens not in tensor.shape
            or tensor.untyped_storage().data_ptr() in staying
        ):
            return tensor
        key = (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride())
        if key not in sent:
            sent[key] = (_send(tensor), tensor)
        return sent[key][0]

    return _Hooks(pack, sent)


class _Hooks(torch.autograd.graph.saved_tensors_hooks):
    def __init__(self, pack: Any, sent: dict[Any, Any]) -> None:
        super().__init__(pack, _fetch)
        self._sent = sent

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._sent.clear()


def _send(tensor: Tensor) -> _Away:
    if not tensor.is_cuda:
        return _Away(tensor.clone(), tensor.device, None)
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    aside = _stream(tensor.device)
    aside.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(aside):
        host.copy_(tensor, non_blocking=True)
        tensor.record_stream(aside)
        return _Away(host, tensor.device, aside.record_event())


def _fetch(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if kept.copied is not None:
        torch.cuda.current_stream(kept.device).wait_event(kept.copied)
    return kept.host.to(kept.device, non_blocking=True)


@cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
