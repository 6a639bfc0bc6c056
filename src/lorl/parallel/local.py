"""The workers of a run in one process, on one device."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from lorl.config import RunConfig
from lorl.parallel.group import Ranks
from lorl.parallel.sharding import sharded_policy
from lorl.parallel.shared import policy_and_engine
from lorl.policy.load import load_policy
from lorl.rollout.torch_engine import TorchEngine
from lorl.rollout.vllm import shared
from lorl.worker import Worker


def local_worker(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None], group: Ranks | None = None
) -> Worker:
    """Loads the base once; policy, reference and engine all read it. `tell` gets what a user should know; `group` are
    the other ranks, where there are any."""
    worker = _worker(config, tokenizer, tell, group)
    if worker.scorer is not None:
        tell(worker.scorer.description)
    return worker


def _worker(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None], group: Ranks | None
) -> Worker:
    if group is not None and config.parallel.strategy == "shared":
        return Worker(config, *policy_and_engine(config, tokenizer, tell, group), group)
    in_parts = group is not None and config.parallel.strategy == "fsdp2"
    if not in_parts and shared.chosen(config):  # with ddp each rank has an engine of its own
        return Worker(config, *shared.policy_and_engine(config, tokenizer, tell), group)
    if group is not None and in_parts:
        policy = sharded_policy(config, tokenizer, group)
    else:
        policy = load_policy(config.model, config.adapter, seed=config.seed, tokenizer=tokenizer)
    engine = TorchEngine(
        policy, max_concurrent=config.rollout.max_concurrent, memory_fraction=config.rollout.memory_fraction
    )
    return Worker(config, policy, engine, group)
