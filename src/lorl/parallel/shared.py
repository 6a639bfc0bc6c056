"""`parallel.strategy=shared`: one base for a group of ranks, in tensor-parallel parts, and a policy that gathers it.

With vLLM the parts are the engine's own. With the embedded engine, which computes with whole layers as the trainer
does, each rank keeps its part of every matrix.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorl.config import ModelConfig, RunConfig
from lorl.parallel.group import SPARE_S, Ranks
from lorl.parallel.lockstep import Lockstep
from lorl.parallel.sharding import STRATEGIES, shard_size
from lorl.policy.load import load_base, load_policy, pick_device, pick_dtype
from lorl.policy.policy import Policy
from lorl.policy.shards import Shard, ShardedBase, Sharers
from lorl.policy.sharing import empty_model
from lorl.rollout.engine import Engine
from lorl.rollout.torch_engine import TorchEngine
from lorl.rollout.vllm import shared as vllm


def ranks_per_engine(config: RunConfig) -> int:
    """Ranks that sample as one, from the same requests: those that hold a copy of the base among them."""
    in_parts = config.parallel.strategy in (*STRATEGIES, "shared")
    return shard_size(config) if in_parts and samples_with_vllm(config) else 1


def samples_with_vllm(config: RunConfig) -> bool:
    """`vllm.chosen`, in a layout that vLLM samples in; others are refused where it was asked for by name."""
    parallel = config.parallel
    has_a_copy = parallel.strategy in STRATEGIES and parallel.gpus * parallel.nodes > 1
    return vllm.chosen(config) and (has_a_copy or not parallel.param_offload) and parallel.sequence == 1


def policy_and_engine(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None], group: Ranks
) -> tuple[Policy, Engine]:
    """Both, on the parts that the ranks hold among them. Every pass is one of all ranks, as with fsdp2: `group.drain`
    follows those that have more to do, and then lets go what was gathered."""
    sharers = sharers_of(shard_size(config), config.parallel.collective_limit_s)
    if vllm.chosen(config):
        policy, engine, base = vllm.sharded_policy_and_engine(config, tokenizer, tell, sharers)
    else:
        model, base = load_cut(config.model, sharers)
        policy = load_policy(config.model, config.adapter, seed=config.seed, tokenizer=tokenizer, base=model)
        policy.fingerprint = base.fingerprint()
        engine = TorchEngine(
            policy, max_concurrent=config.rollout.max_concurrent, memory_fraction=config.rollout.memory_fraction
        )
    lockstep = Lockstep(group, policy, base.decoder)

    def follow() -> None:
        lockstep.drain()
        base.free()

    group.follow = follow
    return policy, engine


def sharers_of(size: int, limit_s: float) -> Sharers:
    """This rank's neighbours among groups of `size`. All ranks call it at the same time."""
    mine: Any = None
    for start in range(0, dist.get_world_size(), size):
        ranks = list(range(start, start + size))
        made = dist.new_group(ranks, timeout=timedelta(seconds=limit_s + SPARE_S))
        mine = made if dist.get_rank() in ranks else mine
    return Sharers(mine, limit_s)


def load_cut(config: ModelConfig, sharers: Sharers) -> tuple[PreTrainedModel, ShardedBase]:
    """The base of `config`, of which each rank keeps its part of every matrix; vectors stay whole.

    Rank 0 reads it into the host's memory and deals it out tensor by tensor: no other rank, and no GPU, ever holds more
    of it than its parts and one tensor.
    """
    device = pick_device(config)
    dtype = pick_dtype(config, device)
    model = empty_model(config, dtype)
    columns = _row_parallel(model)
    shards: dict[str, Shard] = {}
    for name, whole in _dealt(config, model, dtype, device):
        dim = None if whole.dim() != 2 else 1 if name in columns and whole.shape[1] % sharers.size == 0 else 0
        shape = list(whole.shape)
        if dim is not None:
            shape[dim] = -(-shape[dim] // sharers.size)
        shards[name] = Shard(whole.new_zeros(shape), dim)
        shards[name].take(whole, sharers.rank)
    base = ShardedBase(model, shards, sharers)
    return model.eval(), base


def _row_parallel(model: PreTrainedModel) -> set[str]:
    """Names of the weights that tensor parallelism cuts by columns, as the model's own plan in transformers says."""
    plan: dict[str, str] = getattr(model.config.get_text_config(), "base_model_tp_plan", None) or {}
    leaves = {pattern.rpartition(".")[2] for pattern, how in plan.items() if how.startswith("rowwise")}
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight" for name in linear if name.rpartition(".")[2] in leaves}


def _dealt(
    config: ModelConfig, model: PreTrainedModel, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of `model`, which is empty, in turn and whole, from rank 0's copy on the host."""
    first = dist.get_rank() == 0
    on_host = config.model_copy(update={"device": "cpu", "dtype": str(dtype).removeprefix("torch.")})
    read = dict(load_base(on_host).named_parameters()) if first else {}
    for name, parameter in model.named_parameters():
        whole = (
            read.pop(name).detach().to(device) if first else torch.empty(parameter.shape, dtype=dtype, device=device)
        )
        dist.broadcast(whole, 0)
        yield name, whole
