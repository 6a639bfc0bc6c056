"""What is settled before a vLLM starts, however its base lies: whether it can, and with how much memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.plan.demand import demand_of
from lorl.plan.hardware import Cluster, described_gpu
from lorl.plan.layout import Layout
from lorl.plan.memory import Memory, memory
from lorl.plan.shape import Shape
from lorl.policy import adapters
from lorl.policy.load import pick_device, pick_dtype, positions
from lorl.policy.policy import Policy
from lorl.policy.shards import Sharers
from lorl.policy.sharing import empty_model
from lorl.rollout.vllm import launch, tensor_parallel, versions
from lorl.rollout.vllm.engine import VllmEngine
from lorl.rollout.vllm.memory import check
from lorl.rollout.vllm.versions import Inside

_PROOF_TOKENS = 160  # what `PublishProof` asks for: a block of the CPU build's cache and a few tokens


@dataclass(frozen=True, slots=True)
class Opening:
    """A vLLM that can be started.

    Attributes:
        model: the base, its parameters on the meta device.
        can_fold: whether what a fold takes fits beside its KV cache.
        start: starts it; what is given goes to vLLM's EngineArgs.
    """

    config: RunConfig
    model: PreTrainedModel
    start: Callable[..., Inside]
    sharers: Sharers | None  # the ranks that run it together, where there are several
    shape: launch.Shape
    rests: bool  # whether its KV cache rests while the policy trains
    can_fold: bool

    def engine(
        self, inside: Inside, policy: Policy, again: Callable[[], Inside], let_go: Callable[[], None] = lambda: None
    ) -> VllmEngine:
        """The engine of `policy` over the vLLM that runs in `inside`; `again` starts one in its place, and `let_go` has
        the trainer give back what its last pass holds."""
        return VllmEngine(
            again,
            inside,
            policy,
            max_concurrent=self.config.rollout.max_concurrent,
            adapter_slots=self.config.rollout.adapter_slots,
            rank=self.shape.rank,
            rests=self.rests,
            sharers=self.sharers,
            let_go=let_go,
        )


def open_alone(config: RunConfig) -> Opening:
    """A vLLM in this process alone, with the whole base.

    Raises:
        UserError: vLLM or its version is not at hand, the memory does not suffice, or the adapter is of a kind that
            vLLM does not compute. The same of `open_together`.
    """
    return _open(config, config.rollout.adapter_mode, None)


def open_together(config: RunConfig, sharers: Sharers) -> Opening:
    """One vLLM of all `sharers`. Raises UserError, also where these ranks cannot deal the model out evenly."""
    return _open(config, "adapter", sharers)


def _open(config: RunConfig, mode: str, sharers: Sharers | None) -> Opening:
    versions.check()
    device = pick_device(config.model)
    dtype = pick_dtype(config.model, device)
    launch.check_mode(mode, device, dtype, parts=sharers is not None)
    versions.prepare(cpu=device.type == "cpu")
    lora = adapters.configured(config.adapter)
    model = empty_model(config.model, dtype)
    if sharers is not None:
        tensor_parallel.check(model.config, sharers.size)
    max_tokens = longest_sample(config, model.config)
    held = planned(config, model, device, lora, sharers.size if sharers else None)
    check(held, config.rollout.rest, has_slots=launch.slots_compute(device, dtype))
    kv_bytes, rests = held.cache.wanted, held.cache.rests
    if sharers is not None:  # their schedulers have to decide alike
        kv_bytes = min(sharers.values(kv_bytes, "the size of the KV cache"))
        rests = any(sharers.values(rests, "whether the KV cache rests"))
    shape = launch.Shape(
        rank=launch.slot_rank(lora),
        slots=config.rollout.adapter_slots,
        max_tokens=max_tokens,
        kv_bytes=kv_bytes,
        can_rest=rests,
    )
    start = partial(launch.start, config, device, dtype, shape)
    if sharers is not None:
        start = partial(tensor_parallel.start, sharers, start)
    return Opening(config, model, start, sharers, shape, rests, held.can_fold)


def planned(
    config: RunConfig, model: PreTrainedModel, device: torch.device, lora: LoraConfig, ways: int | None = None
) -> Memory:
    """What the plan says of this rank's device as it is now: how large the KV cache of an engine of `ways` ranks (None:
    of this process alone) is to be, and whether it rests while the policy trains.

    `model` may be on the meta device. Raises UserError where the plan has no formulas for it.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    shape = Shape.of(model.config)
    demand, _ = demand_of(config, shape, adapters.counted(lora, shape), kind)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    demand = replace(demand, engine="vllm", parameters=parameters)
    strategy, parallel = config.parallel.strategy, config.parallel
    layout = Layout("ddp")
    if ways is not None:
        assert strategy not in ("auto", "local"), "a strategy is settled before ranks open an engine together"
        layout = Layout(strategy, ways, ways, demand.offload)
    free, total = _memory(device, parallel.gpus)
    cluster = Cluster(described_gpu(None, total), parallel.gpus, parallel.nodes)
    return memory(demand, layout, cluster, others=total - free)


def longest_sample(config: RunConfig, shape: Any) -> int:
    """Tokens of prompt and answer that the engine makes room for. Raises UserError where the base has no positions for
    so many, which vLLM would refuse in keys of its own."""
    prompt, answer = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    if (known := positions(shape)) is not None and prompt + answer > known:
        raise UserError(
            f"data.max_prompt_tokens={prompt} and rollout.max_response_tokens={answer} are more than the {known} "
            f"positions of model.path={config.model.path}; lower one of them."
        )
    return max(prompt + answer, _PROOF_TOKENS)


def _memory(device: torch.device, ranks: int) -> tuple[int, int]:
    """Bytes, free and in all, of this rank's own device or its part of what the `ranks` of this machine share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return psutil.virtual_memory().available // ranks, psutil.virtual_memory().total // ranks
