"""A policy and a vLLM engine on one base: vLLM loads the weights, the policy binds to views of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.plan.demand import adapter_counts
from lorl.plan.footprint import SPARE_TOKENS, fullest_cache
from lorl.plan.layout import GATHERED_LAYERS
from lorl.policy import adapters
from lorl.policy.load import TRAINED, fill_random, load_base, load_policy, pick_device, pick_dtype
from lorl.policy.policy import Policy
from lorl.policy.shards import ShardedBase, Sharers
from lorl.policy.sharing import CannotBindError, Weights, bind, empty_model, parameter_bytes, unshared_bytes
from lorl.rollout.vllm import launch, loader, tensor_parallel, versions
from lorl.rollout.vllm.engine import VllmEngine
from lorl.rollout.vllm.memory import (
    GIB,
    adapter_bytes,
    budget,
    kv_bytes_per_token,
    moment_bytes,
    training_bytes,
)
from lorl.rollout.vllm.mode import faster_mode
from lorl.rollout.vllm.versions import Inside

_PROOF_TOKENS = 160  # what `PublishProof` asks for: a block of the CPU build's cache and a few tokens
_CPU_KV_BYTES = 4 * GIB  # at most, where rollout.memory_fraction is not set: a laptop does other things too


@dataclass(frozen=True, slots=True)
class Spread:
    """A base that no rank holds whole."""

    sharers: Sharers  # that run one engine
    held: int  # bytes of this rank's parts: the engine's, and the trainer's where it has parts of its own
    gathered: int  # bytes that a pass holds beyond them at most


def chosen(config: RunConfig) -> bool:
    """Whether this run samples with vLLM: as asked, or by `auto` on a GPU that has one lorl knows, which does not
    compute DoRA. On a CPU the embedded engine is the faster one."""
    if config.rollout.engine != "auto":
        return config.rollout.engine == "vllm"
    return not config.adapter.dora and versions.known() and pick_device(config.model).type == "cuda"


def policy_and_engine(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]
) -> tuple[Policy, VllmEngine]:
    """Both, on one base. `tell` gets what a user should know: copies that could not be avoided, the mode chosen.

    Raises:
        UserError: vLLM or its version is not at hand, the memory does not suffice, or the adapter is of a kind that
            vLLM does not compute.
    """
    versions.check()
    device = pick_device(config.model)
    dtype = pick_dtype(config.model, device)
    launch.check_mode(config.rollout.adapter_mode, device, dtype)
    lora = adapters.configured(config.adapter)
    model = empty_model(config.model, dtype)
    shape, rests = shape_of(config, model, device, dtype, launch.slot_rank(lora))
    start = partial(launch.start, config, device, dtype, shape)
    inside = start()
    try:
        return _on_base_of(inside, start, config, model, shape.rank, rests, tokenizer, tell)
    except BaseException:
        inside.shut_down(resting=False)
        raise


def _on_base_of(
    inside: Inside,
    start: Callable[..., Inside],
    config: RunConfig,
    model: PreTrainedModel,
    rank: int,
    rests: bool,
    tokenizer: PreTrainedTokenizerBase,
    tell: Callable[[str], None],
) -> tuple[Policy, VllmEngine]:
    """Binds `model` to the weights of the vLLM that runs in `inside`, or loads it apart where that can't be."""
    weights = Weights(inside.weights(), inside.packed_modules())
    shares = True
    try:
        bind(model, weights)
    except CannotBindError as error:
        shares = False
        model = load_base(config.model)
        tell(f"the base is in memory twice, {parameter_bytes(model) / 2**20:,.1f} MiB more than shared: {error}")
    model.requires_grad_(False)
    if config.model.random_weights and shares:
        fill_random(model)  # vLLM's dummy weights are so small that the model's output hardly depends on them
    policy = load_policy(config.model, config.adapter, seed=config.seed, tokenizer=tokenizer, base=model.eval())
    if shares:
        tell(f"the base is shared with vLLM: {unshared_bytes(policy.base_tensors(), weights)} extra bytes")
    engine = VllmEngine(
        partial(_relaunch, start, inside.weights(tied=True)) if shares else start,
        inside,
        policy,
        max_concurrent=config.rollout.max_concurrent,
        adapter_slots=config.rollout.adapter_slots,
        rank=rank,
        rests=rests,
    )
    engine.folds = _folds(config, engine, policy, shares, tell)
    return policy, engine


def sharded_policy_and_engine(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None], sharers: Sharers
) -> tuple[Policy, VllmEngine, ShardedBase]:
    """`policy_and_engine` over `sharers`: one vLLM of all of them, and a policy that gathers what each rank's holds.
    Also returns what gathers."""
    versions.check()
    device = pick_device(config.model)
    dtype = pick_dtype(config.model, device)
    launch.check_mode("adapter", device, dtype, parts=True)
    lora = adapters.configured(config.adapter)
    model = empty_model(config.model, dtype)
    tensor_parallel.check(model.config, sharers.size)
    spread = Spread(sharers, parameter_bytes(model) // sharers.size, _gathered_bytes(model))
    shape, rests = shape_of(config, model, device, dtype, launch.slot_rank(lora), spread)
    start = partial(tensor_parallel.start, sharers, partial(launch.start, config, device, dtype, shape))
    inside = start()
    try:
        parts = tensor_parallel.shards(inside, model, sharers.size)
        base = ShardedBase(model, parts, sharers)
        if config.model.random_weights:
            fill_random(model, base.rewriting)
        policy = load_policy(config.model, config.adapter, seed=config.seed, tokenizer=tokenizer, base=model.eval())
        policy.fingerprint = base.fingerprint()
        held = {name: shard.held for name, shard in parts.items()}
        extra = unshared_bytes(held, Weights(inside.weights(), inside.packed_modules()))
        tell(f"the base is shared with one vLLM over {sharers.size} ranks: {extra} extra bytes on each")
        engine = VllmEngine(
            partial(_relaunch, start, inside.weights(tied=True)),
            inside,
            policy,
            max_concurrent=config.rollout.max_concurrent,
            adapter_slots=config.rollout.adapter_slots,
            rank=shape.rank,
            rests=rests,
            sharers=sharers,
            let_go=base.free,  # the head of its last pass
        )
        return policy, engine, base
    except CannotBindError as error:
        inside.shut_down(resting=False)
        raise UserError(f"parallel.strategy=shared: {error}; use strategy=ddp or fsdp2") from None
    except BaseException:
        inside.shut_down(resting=False)
        raise


def _folds(config: RunConfig, engine: VllmEngine, policy: Policy, shares: bool, tell: Callable[[str], None]) -> bool:
    mode = config.rollout.adapter_mode
    if mode == "fold" and not shares:
        raise UserError("rollout.adapter_mode=fold needs a shared base, and this one is not; use adapter_mode=adapter.")
    if not launch.slots_compute(policy.device, policy.dtype):
        launch.check_mode(mode if shares else "adapter", policy.device, policy.dtype)
        return True
    if mode != "auto" or not shares:
        return mode == "fold"
    engine.publish(TRAINED, 0, policy.checksum(TRAINED))
    folds, told = faster_mode(engine, policy, config)
    tell(told)
    return folds


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
    max_tokens = max(config.data.max_prompt_tokens + config.rollout.max_response_tokens, _PROOF_TOKENS)
    ways = 1 if spread is None else spread.sharers.size
    base, gathered = (parameter_bytes(model), 0) if spread is None else (spread.held, spread.gathered)
    per_token = kv_bytes_per_token(text, dtype.itemsize, ways)
    smallest = per_token * (max_tokens + SPARE_TOKENS)
    fraction = config.rollout.memory_fraction
    free, total = _memory(device, config.parallel.gpus)
    if device.type == "cpu":
        fraction = fraction or max(min(0.4, _CPU_KV_BYTES / total), smallest / total)
    adapters, training = _adapter_and_training_bytes(config, text, device, dtype, rank, ways)
    found = budget(
        total=total,
        free=free,
        base=base,
        adapters=adapters,
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


def _gathered_bytes(model: PreTrainedModel) -> int:
    """What a pass over a base in parts holds beyond them at most: layers on their way, and the head."""
    decoder: Any = model.base_model
    head: Any = model.get_output_embeddings()
    return GATHERED_LAYERS * max(parameter_bytes(layer) for layer in decoder.layers) + parameter_bytes(head)


def _memory(device: torch.device, ranks: int) -> tuple[int, int]:
    """Bytes, free and in all, of this rank's own device or its part of what the `ranks` of this machine share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return psutil.virtual_memory().available // ranks, psutil.virtual_memory().total // ranks


def _relaunch(start: Callable[..., Inside], kept: Mapping[str, Tensor]) -> Inside:
    """vLLM anew on the tensors that the policy's parameters are views of."""
    with loader.adopting(kept):
        return start(load_format=loader.FORMAT)
