"""A base in tensor-parallel parts: what each rank holds, what a pass gathers and lets go, and equal numbers."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparison import assert_equal_runs
from forked import ForkedRanks
from test_group import each

import small_trainer
from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig, RunConfig
from lorl.experience import Forest
from lorl.parallel.group import Ranks
from lorl.parallel.shared import load_cut, ranks_per_engine, samples_with_vllm, sharers_of
from lorl.policy.checksums import fingerprint
from lorl.policy.load import TRAINED, load_base, load_policy
from lorl.policy.policy import Policy
from lorl.policy.shards import ShardedBase
from lorl.rewards.pool import RewardPool
from lorl.settings import load
from small_trainer import make_trainer, small_config

pytest_plugins = ["trainer_fixtures"]

STEPS = 5
SHARED = ["parallel.strategy=shared", "rollout.engine=torch"]
PPO = ["algorithm.advantage=gae", "algorithm.lam=0.95", "critic.lr=1e-3", "algorithm.kl_coef=0.05"]


def forest() -> Forest:
    tokens = torch.arange(10, 34)
    return Forest(
        tokens=tokens,
        positions=torch.arange(24),
        segments=torch.tensor([0, 24], dtype=torch.int32),
        parent=torch.tensor([-1], dtype=torch.int32),
        previous=torch.arange(24) - 1,
        sampled=torch.arange(8, 24),
    )


def read(policy: Policy) -> list[torch.Tensor]:
    """Log-probabilities, and the adapter's gradients of their sum."""
    scores = policy.logprobs(forest(), adapter=TRAINED).logprobs
    scores.sum().backward()
    return [scores.detach(), *(p.grad for p in policy.parameters(TRAINED).values() if p.grad is not None)]


def cut_policy(model: ModelConfig, size: int) -> tuple[Policy, ShardedBase]:
    base, shards = load_cut(model, sharers_of(size, 60.0))
    return load_policy(model, AdapterConfig(rank=4), seed=0, base=base), shards


@pytest.mark.parametrize(
    ("ranks", "size", "model_type", "fields"),
    [
        (2, 2, "llama", {}),
        (3, 3, "llama", {"tie_word_embeddings": False}),  # 3 divides neither the vocabulary nor the heads
        (4, 2, "qwen2", {"num_hidden_layers": 3, "tie_word_embeddings": False}),  # biases
    ],
)
def test_ranks_hold_a_part_each_and_a_pass_leaves_nothing_gathered(
    ranks: int, size: int, model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = ModelConfig(path=str(save_tiny_model(tmp_path / "model", model_type, **fields)))
    whole = load_base(model)
    named = {name: value.detach() for name, value in whole.named_parameters()}
    plain = load_policy(model, AdapterConfig(rank=4), seed=0)
    expected = read(plain)

    def work(group: Ranks) -> Any:
        policy, base = cut_policy(model, size)
        base.free()
        at_rest = base.gathered_bytes
        equal = [torch.equal(ours, theirs) for ours, theirs in zip(read(policy), expected, strict=True)]
        after = base.gathered_bytes
        dist.barrier()
        return base.held_bytes, at_rest, after, base.fingerprint(), equal

    matrices = sum(value.nbytes for value in named.values() if value.dim() == 2)
    vectors = sum(value.nbytes for value in named.values() if value.dim() == 1)
    found = each(ranks, tmp_path, work)
    for held, at_rest, after, digest, equal in found:
        padding = held - matrices / size - vectors
        assert 0 <= padding <= matrices / size * 0.05
        assert (at_rest, after) == (0, 0)
        assert digest == fingerprint(named)
        assert len(equal) == 1 + 28 * len(whole.base_model.layers) / 2
        assert all(equal)


@pytest.mark.parametrize("recompute", [False, True])
def test_no_more_than_two_layers_are_gathered_at_a_time(recompute: bool, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model", num_hidden_layers=6, vocab_size=258, tie_word_embeddings=False)
    model = ModelConfig(path=str(path), gradient_checkpointing=recompute)

    def work(group: Ranks) -> Any:
        policy, base = cut_policy(model, 2)
        peaks = [0, 0]
        for index, layer in enumerate(base.decoder.layers):
            layer.register_forward_pre_hook(lambda *_: _raise(peaks, 0, base))
            if index < 5:  # the last one's begins beside the head
                layer.mlp.register_full_backward_pre_hook(lambda *_: _raise(peaks, 1, base))
        scores = policy.logprobs(forest(), adapter=TRAINED).logprobs
        scores.sum().backward()
        dist.barrier()
        layer = sum(p.nbytes for n, p in base.decoder.layers[0].named_parameters() if "lora_" not in n and p.dim() == 2)
        head = policy.config.vocab_size * policy.config.hidden_size * 4
        return peaks, layer, head

    for peaks, layer, head in each(2, tmp_path, work):
        assert layer < peaks[0] <= layer + max(layer, head)
        assert layer < peaks[1] <= 2 * layer


def _raise(peaks: list[int], index: int, base: ShardedBase) -> None:
    peaks[index] = max(peaks[index], base.gathered_bytes)


def trained(config: RunConfig, pool: RewardPool) -> Path:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            if config.parallel.gpus > 1:
                patch.setattr(small_trainer, "local_worker", lambda config, *_: ForkedRanks(config))
            trainer = make_trainer(config, pool, stack, steps=STEPS)
        stack.callback(trainer.workers.close)
        trainer.run()
        return trainer.folder.path


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        (2, []),
        (4, ["parallel.shard_size=2"]),
        (2, ["model.gradient_checkpointing=true", "parallel.microbatch_tokens=64"]),
    ],
)
def test_a_run_in_parts_is_the_run_of_one_process(
    ranks: int, keys: list[str], tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    same = ["optim.lr=3e-4", *PPO]
    one = trained(small_config(tiny_model, tmp_path, *same, name="one"), pool)
    many = trained(
        small_config(tiny_model, tmp_path, *same, *SHARED, f"parallel.gpus={ranks}", *keys, name="many"), pool
    )
    assert_equal_runs(one, many, STEPS)


@pytest.mark.parametrize(
    ("keys", "ranks"),
    [
        (["parallel.gpus=4", "parallel.strategy=ddp"], 1),
        (["parallel.gpus=4", "parallel.strategy=shared"], 4),
        (["parallel.gpus=4", "parallel.strategy=fsdp2", "parallel.param_offload=true"], 4),
        (["parallel.gpus=4", "parallel.strategy=fsdp", "parallel.shard_size=2"], 2),
        (["parallel.strategy=fsdp2"], 1),
    ],
)
def test_the_ranks_that_hold_a_copy_of_the_base_run_one_vllm(keys: list[str], ranks: int) -> None:
    config = load(None, ["rollout.engine=vllm", *keys])
    assert samples_with_vllm(config)
    assert ranks_per_engine(config) == ranks
    assert ranks_per_engine(load(None, ["rollout.engine=torch", *keys])) == 1


@pytest.mark.parametrize(
    "keys",
    [["parallel.strategy=fsdp2", "parallel.param_offload=true"], ["parallel.gpus=2", "parallel.sequence=2"]],
)
def test_layouts_that_vllm_cannot_sample_in_leave_it_out(keys: list[str]) -> None:
    assert not samples_with_vllm(load(None, ["rollout.engine=vllm", *keys]))
