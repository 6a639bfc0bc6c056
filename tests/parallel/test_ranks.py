"""However many ranks and whatever each holds of the base: the same samples, losses and adapters. Without Ray."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from comparison import assert_equal_runs
from forked import ForkedRanks

import small_trainer
from lorl.config import RunConfig
from lorl.experience import Completion, Prompt
from lorl.rewards.pool import RewardPool
from lorl.trainer import Trainer
from small_trainer import make_trainer, small_config

pytest_plugins = ["trainer_fixtures"]

STEPS = 5
ALGORITHMS = {
    "grpo": [
        "algorithm.kl_coef=0.05",
        "algorithm.kl_control=adaptive",
        "algorithm.entropy_coef=0.01",
        "algorithm.minibatch_prompts=1",
        "parallel.microbatch_tokens=64",
    ],
    "ppo": ["algorithm.advantage=gae", "algorithm.lam=0.95", "critic.lr=1e-3", "algorithm.kl_coef=0.05"],
    "full_kl": ["algorithm.kl_coef=0.05", "algorithm.kl_estimator=full", "model.gradient_checkpointing=true"],
    "optimal": ["algorithm.advantage=optimal_token_baseline"],
    "bypass": ["correction.preset=bypass_pg_is", "algorithm.minibatch_prompts=1"],
}
SHARDED = ["parallel.strategy=fsdp2"]
FLAT = ["parallel.strategy=fsdp"]


def trained(config: RunConfig, pool: RewardPool, steps: int = STEPS, until: int = STEPS) -> Path:
    """Runs `config` up to step `until` of `steps`, as a kill would leave it if that is not the end."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            if config.parallel.gpus > 1:
                patch.setattr(small_trainer, "local_worker", lambda config, *_: ForkedRanks(config))
            trainer: Trainer = make_trainer(config, pool, stack, steps=steps)
        stack.callback(trainer.workers.close)
        if until == steps:
            trainer.run()
        else:
            trainer.workers.publish()
            for _ in range(until):
                trainer._step()
            trainer._save()
        return trainer.folder.path


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, pool: RewardPool) -> Callable[[str], Path]:
    """The run of an algorithm in one process."""
    folder, done = tmp_path_factory.mktemp("alone"), dict[str, Path]()

    def run(name: str) -> Path:
        if name not in done:
            keys = ["optim.lr=3e-4", *ALGORITHMS[name]]
            done[name] = trained(small_config(tiny_model, folder, *keys, name=name), pool)
        return done[name]

    return run


@pytest.mark.parametrize(
    ("algorithm", "ranks", "keys"),
    [
        ("grpo", 2, []),
        ("grpo", 3, []),
        ("ppo", 2, []),
        ("ppo", 3, ["parallel.microbatch_tokens=64"]),
        ("full_kl", 2, []),
        ("optimal", 2, []),
        ("bypass", 3, []),
        ("grpo", 2, SHARDED),
        ("grpo", 4, [*SHARDED, "parallel.shard_size=2"]),
        ("ppo", 3, SHARDED),
        ("full_kl", 2, SHARDED),
        ("bypass", 2, SHARDED),
        ("grpo", 2, FLAT),
        ("grpo", 4, [*FLAT, "parallel.shard_size=2"]),
        ("ppo", 3, FLAT),
        ("full_kl", 2, FLAT),
    ],
)
def test_every_number_of_ranks_and_strategy_trains_to_the_same_numbers(
    algorithm: str,
    ranks: int,
    keys: list[str],
    alone: Callable[[str], Path],
    tiny_model: Path,
    tmp_path: Path,
    pool: RewardPool,
) -> None:
    spread = ["optim.lr=3e-4", *ALGORITHMS[algorithm], f"parallel.gpus={ranks}", *keys]
    run = trained(small_config(tiny_model, tmp_path, *spread), pool)
    assert_equal_runs(alone(algorithm), run, STEPS)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_ranks_without_work_wait_for_the_others(
    strategy: str, tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    """One prompt, two samples, three ranks: at least one rank has nothing to sample and nothing to learn from."""
    few = ["data.prompts_per_step=1", "rollout.n=2", "optim.lr=3e-4", "algorithm.kl_coef=0.01"]
    one = trained(small_config(tiny_model, tmp_path, *few, name="one"), pool)
    spread = [*few, "parallel.gpus=3", f"parallel.strategy={strategy}"]
    assert_equal_runs(one, trained(small_config(tiny_model, tmp_path, *spread, name="three"), pool), STEPS)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["parallel.gpus=2", *SHARDED], []),
        ([], ["parallel.gpus=3"]),
        (["parallel.gpus=3"], [*SHARDED, "parallel.gpus=2"]),
        (["parallel.gpus=2"], [*FLAT, "parallel.gpus=3"]),
        (["parallel.gpus=2", *FLAT], ["parallel.gpus=2", "parallel.strategy=ddp"]),
    ],
)
def test_a_checkpoint_goes_on_with_other_ranks_and_another_strategy(
    first: list[str],
    then: list[str],
    alone: Callable[[str], Path],
    tiny_model: Path,
    tmp_path: Path,
    pool: RewardPool,
) -> None:
    keys = ["optim.lr=3e-4", *ALGORITHMS["ppo"]]
    trained(small_config(tiny_model, tmp_path, *keys, *first), pool, until=3)
    run = trained(small_config(tiny_model, tmp_path, *keys, *then), pool)
    assert_equal_runs(alone("ppo"), run, STEPS)


@pytest.mark.parametrize("more", [[], ["parallel.sequence=2"]])
def test_dropout_differs_between_ranks_and_repeats(
    more: list[str], tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    keys = ["adapter.dropout=0.2", "parallel.gpus=2", "optim.lr=3e-4", *more]
    first = trained(small_config(tiny_model, tmp_path, *keys, name="first"), pool)
    again = trained(small_config(tiny_model, tmp_path, *keys, name="again"), pool)
    assert (first / "checkpoints/step-5/adapter/adapter_model.safetensors").read_bytes() == (
        again / "checkpoints/step-5/adapter/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("keys", [[], SHARDED, FLAT, ["parallel.gpus=4", "parallel.sequence=2"]])
def test_answers_are_scored_by_all_ranks(keys: list[str], tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    run = trained(
        small_config(tiny_model, tmp_path, "algorithm.advantage=gae", "critic.lr=1e-2", name="critic"), pool, 1, 1
    )
    adapter = tmp_path / "rm"  # a critic's head is a scalar head too, under another name
    from safetensors.torch import load_file, save_file

    critic = run / "checkpoints/step-1/critic"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((critic / "adapter_config.json").read_bytes())
    (adapter / "reward_model.json").write_text(json.dumps({}))
    tensors = load_file(critic / "adapter_model.safetensors")
    save_file(
        {name.replace("value_head", "score_head"): value for name, value in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    config = small_config(tiny_model, tmp_path, f"reward_model.path='{adapter}'", "parallel.gpus=3", *keys, name="many")
    one = small_config(tiny_model, tmp_path, f"reward_model.path='{adapter}'", name="one")
    completions = [
        Completion(Prompt(f"p{g}", [5, 6, 7 + g], ""), j, [20 + g, 30 + j], [0.0, 0.0], "", "stop", 1)
        for g in range(4)
        for j in range(2)
    ]
    worker = small_trainer.local_worker(one, small_trainer.load_tokenizer(one.model), lambda note: None)
    ranks = ForkedRanks(config)
    assert any("reward model" in note for note in ranks.notes)
    want, got = worker.score(completions), ranks.score(completions)
    ranks.close()
    assert max(want) - min(want) > 1e-4
    assert torch.allclose(torch.tensor(got), torch.tensor(want), atol=1e-5)
