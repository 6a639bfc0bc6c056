"""Each adapter counts with its own size: the policy's, a critic's, a reference's and a reward model's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from conftest import save_tiny_model, tiny_tokenizer
from lorl.config import RunConfig
from lorl.critic import CRITIC, Critic
from lorl.errors import UserError
from lorl.parallel.group import Alone
from lorl.plan import footprint, host
from lorl.plan.choose import make_plan
from lorl.plan.demand import Demand, demand_of
from lorl.plan.hardware import GPUS, Cluster
from lorl.plan.host import OFFLOADED_OPTIMIZER
from lorl.plan.layout import Layout
from lorl.plan.lora import lora_on
from lorl.plan.memory import ACTIVATIONS, GRADIENTS, MASTERS, OPTIMIZER, SLOTS, Memory
from lorl.plan.shape import find_shape
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.policy import Policy
from lorl.settings import load

ONE = Cluster(GPUS["h100"], 1)
SHAPE = find_shape("qwen2.5-7b")
PPO = "algorithm.advantage=gae"
COPY = "a checkpoint's copy of adapters and optimizer"


def configured(*overrides: str, model: str = "qwen2.5-7b") -> RunConfig:
    return load(None, [f"model.path={model}", *overrides])


def run_of(*overrides: str) -> Demand:
    return demand_of(configured(*overrides))[0]


def held_by(demand: Demand) -> Memory:
    return make_plan(demand, Layout("ddp"), ONE).memory


def saved(folder: Path, rank: int, targets: str | list[str], **others: Any) -> str:
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "r": rank, "target_modules": targets, **others}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return str(folder)


def test_a_critics_rank_takes_its_masters_gradients_and_moments() -> None:
    small, large = (held_by(run_of(PPO, f"critic.rank={rank}")) for rank in (8, 512))
    more = lora_on(SHAPE, 512, "all-linear").parameters - lora_on(SHAPE, 8, "all-linear").parameters
    for holder, size in ((MASTERS, 4), (GRADIENTS, 4), (OPTIMIZER, 8)):
        assert large.row(holder).training - small.row(holder).training == size * more
        assert large.row(holder).sampling - small.row(holder).sampling == size * more
    assert large.row(SLOTS) == small.row(SLOTS), "the engine samples with the policy's adapter alone"
    assert dict(large.host)[COPY] - dict(small.host)[COPY] == 12 * more
    assert large.cache.room == small.cache.room - 16 * more


def test_the_larger_adapters_pass_is_the_one_that_has_to_fit() -> None:
    keys = ("model.gradient_checkpointing=false", "adapter.target_modules=[q_proj]")
    policy = held_by(run_of(*keys)).row(ACTIVATIONS)
    assert held_by(run_of(*keys, PPO, "critic.rank=1")).row(ACTIVATIONS) == policy
    demand = run_of(*keys, PPO, "critic.rank=512", "critic.target_modules=all-linear")
    tokens = demand.microbatch(1)
    critic = footprint.activation_bytes(
        SHAPE, lora_on(SHAPE, 512, "all-linear"), tokens, demand.passes_as(tokens, recompute=False)
    )
    assert held_by(demand).row(ACTIVATIONS).training == critic > policy.training


def test_moments_that_come_from_the_host_are_the_larger_adapters_alone() -> None:
    keys = (PPO, "critic.rank=512", "parallel.optimizer_offload=true", "rollout.n=1")
    demand = replace(run_of(*keys), microbatch_tokens=1, prompts=1, longest_prompt=1, longest_response=1)
    assert demand.critic is not None
    held = held_by(demand)
    assert held.row(OPTIMIZER).training == 8 * demand.critic.parameters
    assert dict(held.host)[OFFLOADED_OPTIMIZER] == sum(host.optimizer_bytes(lora) for lora in demand.learning)


def test_a_reward_adapter_has_the_rank_that_its_folder_says(tmp_path: Path) -> None:
    judge = saved(tmp_path / "judge", 4, ["q_proj", "v_proj"], rank_pattern={"q_proj": 128})
    plain, judged = held_by(run_of()), held_by(run_of(f"reward_model.path={judge}"))
    more = lora_on(SHAPE, 128, ["q_proj", "v_proj"]).parameters
    assert judged.row(MASTERS).sampling - plain.row(MASTERS).sampling == 4 * more
    assert (judged.row(GRADIENTS), judged.row(OPTIMIZER)) == (plain.row(GRADIENTS), plain.row(OPTIMIZER))


def test_a_reference_is_as_large_as_the_policy_that_it_was(tmp_path: Path) -> None:
    start = saved(tmp_path / "start", 16, ["q_proj"])
    demand = run_of(PPO, f"adapter.path={start}", "algorithm.kl_coef=0.01", "critic.rank=2")
    assert demand.frozen == (demand.lora,) == (lora_on(SHAPE, 16, ["q_proj"]),)
    assert demand.critic == lora_on(SHAPE, 2, ["q_proj"])


def with_critic(config: RunConfig) -> Policy:
    policy = load_policy(config.model, config.adapter, seed=0, tokenizer=tiny_tokenizer())
    Critic(config, policy, Alone())
    return policy


def save(policy: Policy, adapter: str, folder: Path) -> None:
    folder.mkdir()
    save_file(policy.adapter_tensors(adapter), str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps(policy.adapter_config(adapter)))


def test_a_critic_is_as_large_as_the_one_that_is_made(tmp_path: Path) -> None:
    tiny = str(save_tiny_model(tmp_path / "model", "qwen2"))
    small = ("adapter.rank=4", "adapter.exclude_modules=[k_proj]")
    start, critic = tmp_path / "start", tmp_path / "critic"
    first = with_critic(configured(PPO, *small, "critic.rank=2", "critic.target_modules=[v_proj]", model=tiny))
    save(first, TRAINED, start)
    save(first, CRITIC, critic)
    for keys in (
        small,
        (*small, "critic.rank=16"),
        (*small, "critic.target_modules=[q_proj,k_proj,down_proj]"),
        (f"adapter.path={start}", "critic.rank=8"),
        (f"adapter.path={start}", "critic.target_modules=[o_proj,k_proj]"),
        (f"critic.path={critic}", "critic.rank=16"),
    ):
        config = configured(PPO, *keys, model=tiny)
        made = with_critic(config).parameters(CRITIC)
        planned = demand_of(config)[0].critic
        assert planned is not None
        assert planned.parameters == sum(tensor.numel() for name, tensor in made.items() if "lora_" in name), keys


def test_what_an_adapter_cannot_be_is_said_with_its_own_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^critic\.target_modules: no linear layer is called 'q_prj'; did you mean"):
        run_of(PPO, "critic.target_modules=[q_prj]")
    with pytest.raises(UserError, match=r"^critic\.target_modules='\(' is not a regular expression"):
        run_of(PPO, "critic.target_modules='('")
    for key in ("critic.path", "reward_model.path"):
        (tmp_path / "adapter_config.json").write_text('{"r": 8, "target_modules": 8}')
        with pytest.raises(UserError, match=rf"^{key}={tmp_path}: adapter_config\.json cannot be read"):
            run_of(PPO, f"{key}={tmp_path}")


def test_a_run_that_checks_its_adapters_itself_gets_a_size_whatever_they_reach(tmp_path: Path) -> None:
    """Of the head, say, which is in no layer."""
    judge = saved(tmp_path / "judge", 8, ["lm_head"])
    config = configured(PPO, "critic.target_modules=[lm_head]", "critic.rank=4", f"reward_model.path={judge}")
    demand, _ = demand_of(config, SHAPE, lora_on(SHAPE, 32, ["q_proj"]))
    assert demand.critic == lora_on(SHAPE, 4, "all-linear")
    assert demand.frozen == (lora_on(SHAPE, 8, "all-linear"),)
