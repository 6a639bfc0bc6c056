"""From a configuration to its workers: in this process, or one process a GPU."""

import importlib.util
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.parallel.cluster import set_environment
from lorl.parallel.local import local_worker
from lorl.parallel.workers import Workers
from lorl.rollout.vllm import versions


def check(config: RunConfig) -> None:
    """What can be said of parallel.* before anything loads. Raises UserError."""
    parallel = config.parallel
    ranks = parallel.gpus * parallel.nodes
    if parallel.strategy == "fsdp":
        raise UserError("parallel.strategy=fsdp: FSDP1 needs flat copies of what it shards; use fsdp2, its successor")
    if ranks == 1:
        return
    many = f"parallel.gpus={parallel.gpus} on parallel.nodes={parallel.nodes}"
    if parallel.strategy == "local":
        raise UserError(f"{many} contradicts parallel.strategy=local, which is one process; use strategy=auto")
    if parallel.shard_size is not None and ranks % parallel.shard_size:
        raise UserError(
            f"parallel.shard_size={parallel.shard_size} does not divide the {ranks} ranks of {many}; use a divisor"
        )
    if parallel.strategy in ("fsdp2", "shared") and config.adapter.dora:
        raise UserError(
            f"adapter.dora reads whole weights, and parallel.strategy={parallel.strategy} keeps parts; use strategy=ddp"
        )
    if parallel.strategy == "shared" and config.rollout.adapter_mode == "fold":
        raise UserError(
            "rollout.adapter_mode=fold writes into whole weights, and parallel.strategy=shared keeps parts; use "
            "adapter_mode=adapter, or strategy=ddp"
        )
    if config.rollout.engine == "vllm":
        if parallel.strategy == "fsdp2":
            raise UserError(
                "rollout.engine=vllm has no use for the parts that parallel.strategy=fsdp2 keeps; use strategy=shared, "
                "whose parts are vLLM's own, or engine=torch"
            )
        versions.check()
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"{many} needs Ray, which is not installed: pip install 'lorl[ray]', or set both to 1")


def start_workers(config: RunConfig, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]) -> Workers:
    """The workers that `config` asks for. `tell` gets what a user should know. Raises UserError."""
    check(config)
    if config.parallel.gpus * config.parallel.nodes == 1:
        return local_worker(config, tokenizer, tell)
    set_environment()
    from lorl.parallel.ray import RayWorkers

    return RayWorkers(config, tell)
