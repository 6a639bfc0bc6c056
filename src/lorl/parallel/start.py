"""From a configuration to its workers: in this process, or one process a GPU."""

import importlib.util
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.parallel.cluster import set_environment
from lorl.parallel.combinations import check_combination
from lorl.parallel.local import local_worker
from lorl.parallel.ulysses import check_shape
from lorl.parallel.workers import Workers
from lorl.rollout.vllm import versions


def check(config: RunConfig) -> None:
    """What can be said of parallel.* before anything loads. Raises UserError."""
    check_combination(config)
    parallel = config.parallel
    if parallel.gpus * parallel.nodes > 1 and importlib.util.find_spec("ray") is None:
        raise UserError(
            f"parallel.gpus={parallel.gpus} on parallel.nodes={parallel.nodes} needs Ray, which is not installed: "
            "pip install 'lorl[ray]', or set both to 1"
        )
    if config.rollout.engine == "vllm":
        versions.check()


def start_workers(config: RunConfig, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]) -> Workers:
    """The workers that `config` asks for. `tell` gets what a user should know. Raises UserError."""
    check(config)
    if config.parallel.gpus * config.parallel.nodes == 1:
        return local_worker(config, tokenizer, tell)
    if config.parallel.sequence > 1:
        check_shape(config)
    set_environment()
    from lorl.parallel.ray import RayWorkers

    return RayWorkers(config, tell)
