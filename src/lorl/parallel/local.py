"""The workers of a run in one process, on one device."""

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedTokenizerBase

from lorl.config import RunConfig
from lorl.parallel import sharding
from lorl.parallel.group import Ranks
from lorl.parallel.shared import policy_and_engine, samples_with_vllm, sharers_of
from lorl.parallel.ulysses import Ulysses
from lorl.policy.load import load_policy
from lorl.policy.streaming import streamed_policy
from lorl.rollout.torch_engine import TorchEngine
from lorl.rollout.vllm import copied, shared
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
    parallel = config.parallel
    if group is not None and parallel.strategy == "shared":
        return Worker(config, *policy_and_engine(config, tokenizer, tell, group), group)
    in_parts = group is not None and parallel.strategy in sharding.STRATEGIES
    if samples_with_vllm(config):
        if group is None:
            return Worker(config, *shared.policy_and_engine(config, tokenizer, tell))
        if not in_parts:  # with ddp each rank has an engine of its own
            agree = partial(_all_say, group, "whether rollouts fold the adapter")
            return Worker(config, *shared.policy_and_engine(config, tokenizer, tell, agree), group)
        trainer = sharding.ShardedTrainer(config, tokenizer, group, tell)
        sharers = sharers_of(sharding.shard_size(config), parallel.collective_limit_s)
        return Worker(config, *copied.policy_and_engine(config, trainer, tell, sharers), group)
    if shared.chosen(config):
        key = "sequence" if parallel.sequence > 1 else "param_offload"
        tell(f"rollout.engine=auto: with parallel.{key} the embedded engine samples")
    if group is not None and in_parts:
        policy = sharding.sharded_policy(config, tokenizer, group, tell)
    elif parallel.param_offload:
        policy = streamed_policy(config, tokenizer)
    else:
        policy = load_policy(config.model, config.adapter, seed=config.seed, tokenizer=tokenizer)
    if group is not None and config.parallel.sequence > 1:
        policy.sequence = Ulysses(group.of_part())
    engine = TorchEngine(
        policy, max_concurrent=config.rollout.max_concurrent, memory_fraction=config.rollout.memory_fraction
    )
    return Worker(config, policy, engine, group)


def _all_say(group: Ranks, what: str, says: bool) -> bool:
    return all(group.gather(says, what))
