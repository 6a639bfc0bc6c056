"""What is settled before a vLLM starts, however its base lies: whether it can, and with how much memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.plan.demand import adapter_counts
from lorl.plan.footprint import SPARE_TOKENS, fullest_cache
from lorl.policy import adapters
from lorl.policy.load import pick_device, pick_dtype, positions
from lorl.policy.policy import Policy
from lorl.policy.shards import Sharers
from lorl.policy.sharing import empty_model, parameter_bytes
from lorl.rollout.vllm import launch, tensor_parallel, versions
from lorl.rollout.vllm.engine import VllmEngine
from lorl.rollout.vllm.memory import (
    GIB,
    adapter_bytes,
    budget,
    engine_bytes,
    kv_bytes_per_token,
    moment_bytes,
    training_bytes,
)
from lorl.rollout.vllm.versions import Inside

_PROOF_TOKENS = 160  # what `PublishProof` asks for: a block of the CPU build's cache and a few tokens
_CPU_KV_BYTES = 4 * GIB  # at most, where rollout.memory_fraction is not set: a laptop does other things too


@dataclass(frozen=True, slots=True)
class Spread:
    """A base that no rank holds whole."""

    sharers: Sharers  # that run one engine
    held: int  # bytes of this rank's parts: the engine's, and the trainer's where it has parts of its own
    gathered: int  # bytes that a pass holds beyond them at most


@dataclass(frozen=True, slots=True)
class Opening:
    """A vLLM that can be started.

    Attributes:
        model: the base, its parameters on the meta device.
        start: starts it; what is given goes to vLLM's EngineArgs.
    """

    config: RunConfig
    model: PreTrainedModel
    start: Callable[..., Inside]
    sharers: Sharers | None  # the ranks that run it together, where there are several
    shape: launch.Shape
    rests: bool  # whether its KV cache rests while the policy trains

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
    return _open(config, config.rollout.adapter_mode, None, None)


def open_together(
    config: RunConfig, sharers: Sharers, bytes_of: Callable[[PreTrainedModel], tuple[int, int]]
) -> Opening:
    """One vLLM of all `sharers`. `bytes_of` tells of the base what a rank holds, and what a pass gathers beyond that.
    Raises UserError, also where these ranks cannot deal the model out evenly."""
    return _open(config, "adapter", sharers, bytes_of)


def _open(
    config: RunConfig,
    mode: str,
    sharers: Sharers | None,
    bytes_of: Callable[[PreTrainedModel], tuple[int, int]] | None,
) -> Opening:
    versions.check()
    device = pick_device(config.model)
    dtype = pick_dtype(config.model, device)
    launch.check_mode(mode, device, dtype, parts=sharers is not None)
    lora = adapters.configured(config.adapter)
    model = empty_model(config.model, dtype)
    spread = None
    if sharers is not None and bytes_of is not None:
        tensor_parallel.check(model.config, sharers.size)
        spread = Spread(sharers, *bytes_of(model))
    shape, rests = shape_of(config, model, device, dtype, launch.slot_rank(lora), spread)
    start = partial(launch.start, config, device, dtype, shape)
    if sharers is not None:
        start = partial(tensor_parallel.start, sharers, start)
    return Opening(config, model, start, sharers, shape, rests)


def shape_of(
    config: RunConfig,
    model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    spread: Spread | None = None,
) -> tuple[launch.Shape, bool]:
    """What vLLM is started with, and whether its KV cache must rest while the policy trains. Ranks that share it agree:
    their schedulers have to decide alike."""
    text = model.config.get_text_config()
    max_tokens = longest_sample(config, model.config)
    ways = 1 if spread is None else spread.sharers.size
    base, gathered = (parameter_bytes(model), 0) if spread is None else (spread.held, spread.gathered)
    per_token = kv_bytes_per_token(text, dtype.itemsize, ways)
    smallest = per_token * (max_tokens + SPARE_TOKENS)
    fraction = config.rollout.memory_fraction
    free, total = _memory(device, config.parallel.gpus)
    if device.type == "cpu":
        fraction = fraction or max(min(0.4, _CPU_KV_BYTES / total), smallest / total)
    adapters, training = _adapter_and_training_bytes(config, text, device, dtype, rank, ways)
    rows = min(config.rollout.max_concurrent, config.data.prompts_per_step * config.rollout.n)
    batched = launch.batched_tokens(config)
    on_gpu = device.type == "cuda"
    found = budget(
        total=total,
        free=free,
        base=base,
        adapters=adapters,
        engine=engine_bytes(text, batched, rows, itemsize=dtype.itemsize, ways=ways) if on_gpu else 0,
        training=gathered + training,
        fraction=fraction,
        smallest=smallest,
        fullest=fullest_cache(per_token, config.rollout.max_concurrent, max_tokens),
        rest=config.rollout.rest,
    )
    kv_bytes, rests = found.kv_bytes, found.rests
    if spread is not None:
        kv_bytes = min(spread.sharers.values(kv_bytes, "the size of the KV cache"))
        rests = any(spread.sharers.values(rests, "whether the KV cache rests"))
    shape = launch.Shape(
        rank=rank,
        slots=config.rollout.adapter_slots,
        max_tokens=max_tokens,
        kv_bytes=kv_bytes,
        can_rest=rests,
    )
    return shape, rests


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


def _adapter_and_training_bytes(
    config: RunConfig, text: Any, device: torch.device, dtype: torch.dtype, rank: int, ways: int
) -> tuple[int, int]:
    """Of all adapters, the slots of an engine of `ways` ranks among them; and of the largest pass, with layers computed
    again where the run may do so, or the largest step. What a GPU's host holds is in neither."""
    tree = config.data.max_prompt_tokens + config.rollout.n * config.rollout.max_response_tokens
    tokens, recompute = config.parallel.microbatch_tokens, config.model.gradient_checkpointing
    on_gpu, (learning, frozen) = device.type == "cuda", adapter_counts(config)
    adapters = adapter_bytes(
        text,
        rank,
        config.rollout.adapter_slots,
        itemsize=dtype.itemsize,
        learning=learning,
        frozen=frozen,
        ways=ways,
    )
    training = training_bytes(
        text,
        tokens,
        itemsize=dtype.itemsize,
        checkpointing=on_gpu if recompute == "auto" else recompute,
        rank=rank,
        masked=0 if on_gpu else min(tree, tokens),
        entropy=config.algorithm.entropy_coef != 0,
        away=on_gpu and config.model.activation_offload,
    )
    if on_gpu and config.parallel.optimizer_offload:  # moments come for a step, one adapter's at a time
        moments = moment_bytes(text, rank)
        return adapters - learning * moments, max(training, moments)
    return adapters, training


def _memory(device: torch.device, ranks: int) -> tuple[int, int]:
    """Bytes, free and in all, of this rank's own device or its part of what the `ranks` of this machine share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return psutil.virtual_memory().available // ranks, psutil.virtual_memory().total // ranks
