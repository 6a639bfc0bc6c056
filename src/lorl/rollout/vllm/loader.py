"""A fresh vLLM model from what is in memory already: on tensors that are there, or filled from the trainer's base.

Nothing is read from disk.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lorl.errors import InfrastructureError, UserError
from lorl.rollout.vllm.versions import replaced

FORMAT = "lorl"  # vLLM's `load_format` while `adopting` or `copying`


@contextmanager
def adopting(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, vLLM engines started with `load_format=FORMAT` take `tensors` for their parameters, by vLLM's names.

    Buffers are computed anew: those of unquantised models (rotary tables, scales of 1) follow from the configuration.

    Raises:
        InfrastructureError: the model has a parameter that `tensors` lacks, or has in another shape or dtype.
    """

    def adopt(model: nn.Module) -> None:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            kept = tensors.get(name)
            if kept is None or kept.shape != parameter.shape or kept.dtype != parameter.dtype:
                found = "nothing" if kept is None else f"{tuple(kept.shape)} {kept.dtype}"
                raise InfrastructureError(
                    f"vLLM cannot be rebuilt on its weights: it wants {tuple(parameter.shape)} {parameter.dtype} "
                    f"for {name}, and the engine before held {found}."
                )
            parameter.data = kept

    with _loading(adopt, hollow=True):
        yield


@contextmanager
def copying(wholes: Callable[[], Iterable[tuple[str, Tensor]]]) -> Iterator[None]:
    """Inside, vLLM engines started with `load_format=FORMAT` fill weights of their own from `wholes()`: Hugging Face's
    names and whole tensors, of which vLLM's own loading takes this rank's part, one after the other.

    Raises:
        UserError: vLLM's model has a parameter that none of them filled, or no place for one of them.
        InfrastructureError: one of them could not be gathered.
    """

    def gathered() -> Iterator[tuple[str, Tensor]]:
        try:
            yield from wholes()
        except (KeyError, ValueError, NotImplementedError) as error:  # vLLM raises these for a model that it refuses
            raise InfrastructureError(
                f"the trainer's base could not be gathered for vLLM's copy: {type(error).__name__}: {error}"
            ) from error

    def copy(model: Any) -> None:
        try:
            filled = model.load_weights(gathered())
        except (KeyError, ValueError) as error:
            raise UserError(
                f"vLLM has no place for a weight of the trainer's base ({error}); use parallel.strategy=ddp, or "
                "rollout.engine=torch"
            ) from error
        every = {name for name, _ in model.named_parameters()}
        if missing := sorted(every - (every if filled is None else filled)):  # a few of vLLM's models don't say
            raise UserError(
                f"the trainer's base has nothing for {missing[0]} of vLLM's model; use parallel.strategy=ddp, or "
                "rollout.engine=torch"
            )

    with _loading(copy, hollow=False):
        yield


@contextmanager
def _loading(load: Callable[[nn.Module], None], *, hollow: bool) -> Iterator[None]:
    """Inside, `load_format=FORMAT` has `load` give a new model its weights; `hollow`: it comes to `load` without memory
    for them."""
    from vllm.model_executor.model_loader import (  # pyright: ignore[reportMissingImports]
        _LOAD_FORMAT_TO_MODEL_LOADER,
        register_model_loader,
    )
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader  # pyright: ignore[reportMissingImports]

    class Loader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
            with ExitStack() as self.made:
                if hollow:
                    self.made.enter_context(_hollow_parameters())
                return super().load_model(*args, **kwargs)

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            self.made.close()  # what vLLM makes of the weights from here on is real
            load(model)

    register_model_loader(FORMAT)(Loader)
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
