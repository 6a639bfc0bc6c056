"""vLLM's CUDA worker with the base outside the pool that sleeps: the KV cache rests alone and the base never moves.

vLLM imports this by name (`worker_cls`), on CUDA machines only.
"""

from contextlib import AbstractContextManager, nullcontext

from vllm.v1.worker.gpu_worker import Worker  # pyright: ignore[reportMissingImports]


class RestingWorker(Worker):
    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        return nullcontext() if tag == "weights" else super()._maybe_get_memory_pool_context(tag)
