"""What parallel.* may be set to together, and beside which other settings."""

from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.parallel.sharding import STRATEGIES
from lorl.parallel.ulysses import check_ranks


def check_combination(config: RunConfig) -> None:
    """What parallel.* says, whatever is installed here: what this lets pass is what `auto` chooses among
    (`lorl.parallel.auto`). Raises UserError."""
    parallel = config.parallel
    ranks = parallel.gpus * parallel.nodes
    check_ranks(config)
    in_parts = ranks > 1 and parallel.strategy in STRATEGIES
    may_copy = in_parts or (ranks > 1 and parallel.strategy == "auto")
    if parallel.param_offload and config.rollout.engine == "vllm" and not may_copy:
        raise UserError(
            "rollout.engine=vllm reads the base on the device, parallel.param_offload=true keeps it in host memory; "
            "use engine=torch, or strategy=fsdp2 over several GPUs, where vLLM has a copy of its own"
        )
    if parallel.param_offload and config.adapter.dora:
        raise UserError(
            "adapter.dora=true reads whole weights, and parallel.param_offload=true keeps them in host memory; use one"
        )
    if config.adapter.dora and config.rollout.engine == "vllm":
        raise UserError("rollout.engine=vllm does not compute adapter.dora=true; use engine=torch")
    if ranks == 1:
        return
    many = f"parallel.gpus={parallel.gpus} on parallel.nodes={parallel.nodes}"
    if parallel.strategy == "local":
        raise UserError(f"{many} contradicts parallel.strategy=local, which is one process; use strategy=auto")
    if parallel.shard_size is not None and ranks % parallel.shard_size:
        raise UserError(
            f"parallel.shard_size={parallel.shard_size} does not divide the {ranks} ranks of {many}; use a divisor"
        )
    if (in_parts or parallel.strategy == "shared") and config.adapter.dora:
        raise UserError(
            f"adapter.dora=true reads whole weights, and parallel.strategy={parallel.strategy} keeps parts; use "
            "strategy=ddp"
        )
    if (in_parts or parallel.strategy == "shared") and config.rollout.adapter_mode == "fold":
        raise UserError(
            f"rollout.adapter_mode=fold writes into whole weights, and parallel.strategy={parallel.strategy} keeps "
            "parts; use adapter_mode=adapter, or strategy=ddp"
        )
    if parallel.strategy == "shared":
        _check_shared(config)
    if config.rollout.engine == "vllm" and parallel.sequence > 1:
        raise UserError(
            "rollout.engine=vllm proves its answers rank by rank, and parallel.sequence splits each pass among ranks; "
            "use engine=torch"
        )


def _check_shared(config: RunConfig) -> None:
    parallel = config.parallel
    for key, on in (("param_offload=true", parallel.param_offload), ("sequence", parallel.sequence > 1)):
        if on:
            raise UserError(
                f"parallel.{key} and parallel.strategy=shared don't go together: its parts lie where vLLM reads them, "
                "and all ranks pass over the same tokens; use strategy=fsdp2"
            )
