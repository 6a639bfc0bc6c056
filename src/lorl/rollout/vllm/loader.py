"""A fresh vLLM model on tensors that are in memory already: nothing is read from disk, no weight is allocated twice."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lorl.errors import InfrastructureError
from lorl.rollout.vllm.versions import replaced

FORMAT = "lorl"  # vLLM's `load_format` while `adopting`


@contextmanager
def adopting(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, vLLM engines started with `load_format=FORMAT` take `tensors` for their parameters, by vLLM's names.

    Buffers are computed anew: those of unquantised models (rotary tables, scales of 1) follow from the configuration.

    Raises:
        InfrastructureError: the model has a parameter that `tensors` lacks, or has in another shape or dtype.
    """
    from vllm.model_executor.model_loader import (  # pyright: ignore[reportMissingImports]
        _LOAD_FORMAT_TO_MODEL_LOADER,
        register_model_loader,
    )
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader  # pyright: ignore[reportMissingImports]

    class AdoptingLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
            with ExitStack() as self.hollow:
                self.hollow.enter_context(_hollow_parameters())
                return super().load_model(*args, **kwargs)

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            self.hollow.close()  # what vLLM makes of the weights from here on is real
            for name, parameter in model.named_parameters(remove_duplicate=False):
                kept = tensors.get(name)
                if kept is None or kept.shape != parameter.shape or kept.dtype != parameter.dtype:
                    found = "nothing" if kept is None else f"{tuple(kept.shape)} {kept.dtype}"
                    raise InfrastructureError(
                        f"vLLM cannot be rebuilt on its weights: it wants {tuple(parameter.shape)} {parameter.dtype} "
                        f"for {name}, and the engine before held {found}."
                    )
                parameter.data = kept

    register_model_loader(FORMAT)(AdoptingLoader)
    try:
        yield
    finally:
        del _LOAD_FORMAT_TO_MODEL_LOADER[FORMAT]  # it holds the weights


@contextmanager
def _hollow_parameters() -> Iterator[None]:
    """Parameters registered inside keep shape, dtype, device and attributes and lose their memory: one entry, repeated.

    (On the meta device they would be of another type, which a parameter cannot change to and back.)
    """
    register: Callable[..., None] = nn.Module.register_parameter

    def hollow(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            param.data = param.data.new_zeros(()).expand(param.shape)

    with replaced(nn.Module, register_parameter=hollow):
        yield
