"""A policy and a vLLM engine on one base: vLLM loads the weights, the policy binds to views of them."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.policy.load import TRAINED, fill_random, load_base, load_policy, pick_device
from lorl.policy.policy import Policy
from lorl.policy.shards import ShardedBase, Sharers
from lorl.policy.sharing import CannotBindError, Weights, bind, parameter_bytes, unshared_bytes
from lorl.rollout.vllm import launch, loader, tensor_parallel, versions
from lorl.rollout.vllm.engine import VllmEngine
from lorl.rollout.vllm.mode import faster_mode
from lorl.rollout.vllm.opening import Opening, open_alone, open_together
from lorl.rollout.vllm.versions import Inside


def chosen(config: RunConfig) -> bool:
    """Whether this run samples with vLLM: as asked, or by `auto` on a GPU that has one lorl knows, which does not
    compute DoRA. On a CPU the embedded engine is the faster one."""
    if config.rollout.engine != "auto":
        return config.rollout.engine == "vllm"
    return not config.adapter.dora and versions.known() and pick_device(config.model).type == "cuda"


def policy_and_engine(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    tell: Callable[[str], None],
    agree: Callable[[bool], bool] = bool,
) -> tuple[Policy, VllmEngine]:
    """Both, on one base. `tell` gets what a user should know: copies that could not be avoided, the mode chosen.
    `agree` tells whether all ranks say True, where each has an engine of its own: what one samples, another trains on.

    Raises:
        UserError: vLLM or its version is not at hand, the memory does not suffice, or the adapter is of a kind that
            vLLM does not compute.
    """
    opening = open_alone(config)
    inside = opening.start()
    try:
        return _on_base_of(inside, opening, tokenizer, tell, agree)
    except BaseException:
        inside.shut_down(resting=False)
        raise


def _on_base_of(
    inside: Inside,
    opening: Opening,
    tokenizer: PreTrainedTokenizerBase,
    tell: Callable[[str], None],
    agree: Callable[[bool], bool],
) -> tuple[Policy, VllmEngine]:
    """Binds the model to the weights of the vLLM that runs in `inside`, or loads it apart where that can't be."""
    config, model = opening.config, opening.model
    weights = Weights(inside.weights(), inside.packed_modules())
    shares = True
    try:
        bind(model, weights)
    except CannotBindError as error:
        if inside.borrowed:
            raise UserError(
                f"model.path={config.model.path}: {error}; and a copy of its own cannot be, since vLLM computes with "
                "transformers' class for it and has changed that; use rollout.engine=torch."
            ) from None
        shares = False
        model = load_base(config.model)
        tell(f"the base is in memory twice, {parameter_bytes(model) / 2**20:,.1f} MiB more than shared: {error}")
    model.requires_grad_(False)
    if config.model.random_weights and shares:
        fill_random(model)  # vLLM's dummy weights are so small that the model's output hardly depends on them
    policy = load_policy(config.model, config.adapter, seed=config.seed, tokenizer=tokenizer, base=model.eval())
    if shares:
        tell(f"the base is shared with vLLM: {unshared_bytes(policy.base_tensors(), weights)} extra bytes")
    again = partial(_relaunch, opening.start, inside.weights(tied=True)) if shares else opening.start
    engine = opening.engine(inside, policy, again)
    engine.folds = _folds(opening, engine, policy, shares, tell, agree)
    return policy, engine


def sharded_policy_and_engine(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None], sharers: Sharers
) -> tuple[Policy, VllmEngine, ShardedBase]:
    """`policy_and_engine` over `sharers`: one vLLM of all of them, and a policy that gathers what each rank's holds.
    Also returns what gathers."""
    opening = open_together(config, sharers)
    model, inside = opening.model, opening.start()
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
        again = partial(_relaunch, opening.start, inside.weights(tied=True))
        return policy, opening.engine(inside, policy, again, base.free), base  # free: the head of its last pass
    except CannotBindError as error:
        inside.shut_down(resting=False)
        raise UserError(f"parallel.strategy=shared: {error}; use strategy=ddp or fsdp2") from None
    except BaseException:
        inside.shut_down(resting=False)
        raise


def _folds(
    opening: Opening,
    engine: VllmEngine,
    policy: Policy,
    shares: bool,
    tell: Callable[[str], None],
    agree: Callable[[bool], bool],
) -> bool:
    config = opening.config
    mode = config.rollout.adapter_mode
    if mode == "fold" and not shares:
        raise UserError("rollout.adapter_mode=fold needs a shared base, and this one is not; use adapter_mode=adapter.")
    if not launch.slots_compute(policy.device, policy.dtype):
        launch.check_mode(mode if shares else "adapter", policy.device, policy.dtype)
        return True
    if mode != "auto" or not shares:
        return mode == "fold"
    folds, told = False, "rollout.adapter_mode=adapter: what a fold takes has no room beside the KV cache"
    if opening.can_fold:
        engine.publish(TRAINED, 0, policy.checksum(TRAINED))
        folds, told = faster_mode(engine, policy, config)
    tell(told)
    agreed = agree(folds)
    if folds and not agreed:
        tell("rollout.adapter_mode=adapter: on another rank folding is slower, or has no room")
    return agreed


def _relaunch(start: Callable[..., Inside], kept: Mapping[str, Tensor]) -> Inside:
    """vLLM anew on the tensors that the policy's parameters are views of."""
    with loader.adopting(kept):
        return start(load_format=loader.FORMAT)
