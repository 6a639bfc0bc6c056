"""The workers of a run in one process, on one device."""

from transformers import PreTrainedTokenizerBase

from lorl.config import RunConfig
from lorl.policy.load import load_policy
from lorl.rollout.torch_engine import TorchEngine
from lorl.worker import Worker


def local_worker(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Worker:
    """Loads the base once; policy, reference and engine all read it."""
    policy = load_policy(config.model, config.adapter, seed=config.seed, tokenizer=tokenizer)
    engine = TorchEngine(
        policy, max_concurrent=config.rollout.max_concurrent, memory_fraction=config.rollout.memory_fraction
    )
    return Worker(config, policy, engine)
