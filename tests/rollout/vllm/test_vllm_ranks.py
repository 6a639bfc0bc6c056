"""Several ranks sample with vLLM: each with an engine of its own, or all with one over their shards.

No engine runs in the tests' own process: ranks forked from one that has had vLLM's threads wait for them for ever. So
`make test` runs this file by itself.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "parallel"))  # its helpers, as pytest finds them for its own tests

import torch
from comparison import assert_equal_runs
from forked import ForkedRanks
from safetensors.torch import load_file
from test_group import each

import small_trainer
import vllm_engines
from lorl.errors import DivergedError, InfrastructureError, UserError
from lorl.parallel.group import Ranks
from lorl.parallel.local import local_worker
from lorl.parallel.sharding import ShardedTrainer
from lorl.parallel.shared import sharers_of
from lorl.policy.load import TRAINED, load_tokenizer
from lorl.policy.policy import Policy
from lorl.policy.shards import ShardedBase
from lorl.rewards.pool import RewardPool
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.vllm import copied, shared, slots
from lorl.rollout.vllm.engine import VllmEngine
from small_trainer import run, small_config
from vllm_engines import distance, draw, needs_vllm, prompts, save_model, vllm_config
from vllm_engines import run as sample

pytest_plugins = ["trainer_fixtures"]
pytestmark = needs_vllm

STEPS = 5
START_S = 300.0  # two engines on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", num_key_value_heads=2)


def trained(model: Path, folder: Path, pool: RewardPool, *overrides: str, name: str) -> Path:
    """The run folder of a finished run."""
    config = small_config(
        model,
        folder,
        "model.device=cpu",
        "data.max_prompt_tokens=64",
        "optim.lr=3e-4",
        "algorithm.kl_coef=0.05",
        "rollout.engine=vllm",
        "rollout.memory_fraction=0.004",
        "rollout.max_concurrent=8",
        "rollout.rest=always",
        "parallel.threads=1",  # a fork has none of the threads that its parent's OpenMP counts on
        *overrides,
        name=name,
    )
    with pytest.MonkeyPatch.context() as patch:
        vllm_engines._no_inspectors()  # of no rank
        patch.setattr(small_trainer, "local_worker", lambda config, *_: ForkedRanks(config))
        _, trainer = run(config, pool, steps=STEPS)
        trainer.workers.close()
    return trainer.folder.path


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory, pool: RewardPool) -> Path:
    """The run of one process."""
    return trained(model, tmp_path_factory.mktemp("alone"), pool, "rollout.adapter_mode=adapter", name="one")


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(["rollout.adapter_mode=adapter"], id="an engine each"),
        pytest.param(["parallel.strategy=shared"], id="one engine on shared parts"),
        pytest.param(
            ["parallel.strategy=fsdp2", "parallel.gpus=4", "parallel.shard_size=2"], id="two engines beside fsdp2"
        ),
        pytest.param(["parallel.strategy=fsdp", "parallel.param_offload=true"], id="one engine beside fsdp, offloaded"),
    ],
)
def test_ranks_train_to_the_numbers_of_one_process(
    keys: list[str], model: Path, alone: Path, tmp_path: Path, pool: RewardPool
) -> None:
    many = trained(model, tmp_path, pool, "parallel.gpus=2", *keys, name="many")
    assert_equal_runs(alone, many, STEPS)


@pytest.mark.parametrize("slow", [None, 1])
def test_ranks_with_an_engine_each_fold_all_or_none(
    slow: int | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one samples, another trains on, and it rounds as its own engine."""
    vllm_engines._no_inspectors()

    def work(group: Ranks) -> Any:
        config = vllm_config(model, "model.dtype=bfloat16", "rollout.adapter_mode=auto", "parallel.gpus=2")
        monkeypatch.setattr(shared, "faster_mode", lambda *_: (group.rank != slow, "timed"))
        told: list[str] = []
        worker = local_worker(config, load_tokenizer(config.model), told.append, group)
        return worker._policy.folds, told

    for rank, (folds, told) in enumerate(each(2, tmp_path, work, end_s=START_S)):
        assert folds == (slow is None)
        assert ("rollout.adapter_mode=adapter: on another rank" in told[-1]) == (slow is not None and rank != slow)


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 2}),
    "smollm": ("llama", {"vocab_size": 321}),  # tied; padded; both ranks hold the only key and value head
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),  # biases
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 64, "initializer_range": 0.1}),
}


def opened(group: Ranks, model: Path, *overrides: str) -> tuple[Policy, VllmEngine, ShardedBase, list[str]]:
    config = vllm_config(model, "parallel.strategy=shared", f"parallel.gpus={group.size}", *overrides)
    told: list[str] = []
    sharers = sharers_of(group.size, 60.0)
    policy, engine, base = shared.sharded_policy_and_engine(config, load_tokenizer(config.model), told.append, sharers)
    return policy, engine, base, told


def differing(policy: Policy, base: ShardedBase, stored: dict[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Names of the base's parameters that a pass saw, and of those that were not the checkpoint's bit for bit."""
    seen, wrong = set[str](), set[str]()

    def look(module: torch.nn.Module, *_: Any) -> None:
        prefix = next(name for name, one in policy.peft.get_base_model().named_modules() if one is module)
        for name, parameter in module.named_parameters():
            full = f"{prefix}.{name}".replace(".base_layer", "")
            if "lora_" in name or full not in stored:  # a tied head
                continue
            seen.add(full)
            wrong.update([full] if not torch.equal(parameter, stored[full]) else [])

    inner: Any = base.decoder
    hooks = [module.register_forward_pre_hook(look) for module in [inner.embed_tokens, *inner.layers, inner.norm]]
    policy.check_packing()
    look(policy.peft.get_base_model().get_output_embeddings())
    for hook in hooks:
        hook.remove()
    return seen, wrong


def before_and_after_a_rebuild(policy: Policy, engine: VllmEngine) -> tuple[list[float], bool]:
    """How far engine and trainer are apart, on the base and with an adapter, and whether both times the same came."""
    draw(policy, 1)
    apart, answers = [], []
    for version in (1, 2):
        if version == 2:
            engine.rest()
            engine.rebuild()
        engine.publish(TRAINED, version, policy.checksum(TRAINED))
        answers.append(sample(engine, TRAINED))
        apart += [distance(policy, sample(engine), None), distance(policy, answers[-1], TRAINED)]
    first, again = ([one.tokens for one in found] for found in answers)
    return apart, first == again


@pytest.mark.parametrize("case", list(CASES))
def test_the_engines_parts_are_the_trainers_base(case: str, tmp_path: Path) -> None:
    model_type, overrides = CASES[case]
    folder = save_model(tmp_path / "model", model_type, **overrides)
    stored = load_file(folder / "model.safetensors")
    vllm_engines._no_inspectors()

    def work(group: Ranks) -> Any:
        policy, engine, base, told = opened(group, folder, "rollout.rest=always")
        seen, wrong = differing(policy, base, stored)
        apart, same = before_and_after_a_rebuild(policy, engine)
        group.gather("done", "done")
        return told, sorted(seen), sorted(wrong), apart, same, base.held_bytes

    size = sum(tensor.nbytes for tensor in stored.values())
    for told, seen, wrong, apart, same, held in each(2, tmp_path, work, end_s=START_S):
        assert told == ["the base is shared with one vLLM over 2 ranks: 0 extra bytes on each"]
        assert seen == sorted(stored)
        assert wrong == []
        assert max(apart) < 1e-5
        assert same
        assert size / 2 < held < 0.6 * size  # norms, and the key and value head of which there is one


def beside(group: Ranks, model: Path, *overrides: str) -> tuple[Policy, VllmEngine, ShardedTrainer, list[str]]:
    config = vllm_config(model, *overrides, "parallel.gpus=2")
    told: list[str] = []
    trainer = ShardedTrainer(config, load_tokenizer(config.model), group, told.append)
    policy, engine = copied.policy_and_engine(config, trainer, told.append, sharers_of(group.size, 60.0))
    return policy, engine, trainer, told


def test_an_engine_beside_the_trainers_parts_has_a_copy_of_them(tmp_path: Path) -> None:
    model_type, overrides = CASES["smollm"]
    keys = ["parallel.strategy=fsdp2", "parallel.param_offload=true", "model.random_weights=true"]
    folder = save_model(tmp_path / "model", model_type, **overrides)
    vllm_engines._no_inspectors()

    def work(group: Ranks) -> Any:
        policy, engine, trainer, told = beside(group, folder, *keys, "rollout.rest=always")
        names = [name for name, _ in trainer.wholes(policy)]
        apart, same = before_and_after_a_rebuild(policy, engine)
        group.gather("done", "done")
        copy = sum(tensor.nbytes for tensor in engine.inside.weights().values())
        return told[-1], sorted(names), apart, same, copy

    stored = load_file(folder / "model.safetensors")
    size = sum(tensor.nbytes for tensor in stored.values())
    for told, names, apart, same, copy in each(2, tmp_path, work, end_s=START_S):
        assert "the base is in memory twice" in told
        assert names == sorted(stored)
        assert max(apart) < 1e-5
        assert same
        assert copy < 0.65 * size


def published_without_a_part(group: Ranks, policy: Policy, engine: VllmEngine) -> str:
    """What a publish says where rank 1 loses its part of a module on the way and nobody looks at the slots."""
    write = slots.write

    def losing(links: Sequence[slots.Link]) -> None:
        write(links)
        for link in links:
            if group.rank == 1 and "layers.1.mlp.down_proj" in link.name:
                link.target.zero_()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "write", losing)
        patch.setattr(slots, "check", lambda links, what: None)
        try:
            engine.publish(TRAINED, 2, policy.checksum(TRAINED))
        except DivergedError as error:
            return str(error)
    return ""


def test_a_damaged_part_of_a_slot_and_ranks_that_sample_apart_are_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", num_key_value_heads=2)
    vllm_engines._no_inspectors()

    def work(group: Ranks) -> Any:
        policy, engine, _, _ = opened(group, folder)
        draw(policy, 1)
        engine.publish(TRAINED, 1, policy.checksum(TRAINED))
        links = engine._published[TRAINED].links
        links[5].target[0, 0] += 1e-6
        damaged = slots.differing(links)
        slots.write(links)
        lost = published_without_a_part(group, policy, engine)
        engine.publish(TRAINED, 3, policy.checksum(TRAINED))
        requests = [Request(prompt, [7 + group.rank, 8]) for prompt in prompts(2)]
        try:
            list(engine.generate(requests, Sampling(max_tokens=8, ignore_eos=True), adapter=TRAINED))
            said = ""
        except InfrastructureError as error:
            said = str(error)
        group.gather("done", "done")
        return damaged, links[5].name, lost, said

    for damaged, name, lost, said in each(2, tmp_path, work, end_s=START_S):
        assert damaged == [name]
        assert lost.endswith("they differ in model.layers.1 (mlp.down_proj).")
        assert "rank 1 sampled other tokens than rank 0" in said


def test_adapters_on_what_the_checkpoint_fuses_are_one_sentence(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "phi3", num_key_value_heads=2)
    vllm_engines._no_inspectors()

    def work(group: Ranks) -> Any:
        policy, engine, _, _ = beside(group, folder, "parallel.strategy=fsdp2")
        apart = distance(policy, sample(engine), None)
        try:
            engine.publish(TRAINED, 1, policy.checksum(TRAINED))
        except UserError as error:
            return apart, str(error)
        return apart, ""

    for apart, said in each(2, tmp_path, work, end_s=START_S):
        assert apart < 1e-5
        assert "the checkpoint fuses" in said
        assert "adapter.exclude_modules" in said


def test_heads_that_ranks_cannot_share_evenly_are_one_sentence(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", hidden_size=96, num_attention_heads=3)

    def work(group: Ranks) -> str:
        try:
            opened(group, folder)
        except UserError as error:
            return str(error)
        return ""

    for said in each(2, tmp_path, work, end_s=START_S):
        assert "cannot deal out 3 heads" in said
        assert "parallel.shard_size" in said
