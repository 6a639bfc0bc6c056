"""PPO: the critic is a second adapter with a value head on the policy's base."""

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorl.critic import CRITIC, VALUE_HEAD
from lorl.errors import UserError
from lorl.packing import pack
from lorl.policy.load import TRAINED
from lorl.rewards.pool import RewardPool
from lorl.sampler import Sampler
from small_trainer import make_trainer, run, small_config

PPO = ("algorithm.advantage=gae", "algorithm.lam=0.95", "critic.lr=1e-2")


pytest_plugins = ["trainer_fixtures"]


def test_values_are_the_heads_reading_of_transformers_own_states(
    tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    """The critic's folder in a checkpoint loads in peft, and with its head gives the values that PPO computed."""
    config = small_config(tiny_model, tmp_path, *PPO, "critic.rank=2")
    _, trainer = run(config, pool, steps=3)
    folder = trainer.folder.path / "checkpoints/step-3/critic"
    samples = trainer.sampler.batch(4, 6).samples
    experience = pack([s.completion for s in samples], [s.outcome for s in samples])
    got = trainer.workers.values(experience)

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folder)).eval()
    assert model.peft_config["default"].r == 2
    tensors = load_file(folder / "adapter_model.safetensors")
    weight, bias = tensors[f"{VALUE_HEAD}.weight"], tensors[f"{VALUE_HEAD}.bias"]
    assert weight.shape == (1, 48)
    assert bool(weight.any())
    want = []
    for sample in samples:
        completion = sample.completion
        tokens = torch.tensor([[*completion.prompt.tokens, *completion.tokens]])
        with torch.no_grad():
            states = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1][0]
        first = len(completion.prompt.tokens) - 1  # the state before the answer's first token
        want.append(states[first : first + len(completion.tokens)] @ weight[0] + bias)
    assert torch.allclose(got, torch.cat(want), atol=1e-5)
    assert got.abs().max() > 1e-3


def test_the_critic_learns_what_the_rewards_are(tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    config = small_config(tiny_model, tmp_path, *PPO, "optim.lr=1e-5", "critic.epochs=8", "critic.value_clip=null")
    rows, _ = run(config, pool, steps=6, truths=["flat", "alpha"])
    assert rows[0]["critic/values_mean"] == 0  # a new critic says 0 of everything
    assert rows[-1]["critic/loss"] < 0.3 * rows[0]["critic/loss"]
    assert rows[-1]["critic/explained_variance"] > 0.2
    for row in rows:
        assert math.isfinite(row["critic/grad_norm"])
        assert math.isfinite(row["critic/returns_mean"])


def test_tokens_whose_value_moved_far_enough_stop_pulling(tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    pull = {}
    for clip in ("null", "0.001"):
        config = small_config(
            tiny_model, tmp_path, *PPO, "critic.epochs=6", f"critic.value_clip={clip}", name=f"c{clip}"
        )
        (row,), _ = run(config, pool, steps=1)
        pull[clip] = row["critic/grad_norm"]
        assert ("critic/value_clip_fraction" in row) == (clip != "null")
    assert row["critic/value_clip_fraction"] > 0.5
    assert pull["0.001"] < 0.9 * pull["null"]


def test_the_policy_waits_while_the_critic_warms_up(tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    config = small_config(tiny_model, tmp_path, *PPO, "critic.warmup_steps=2", "checkpoint.every_steps=1")
    rows, trainer = run(config, pool, steps=3)
    folders = [trainer.folder.path / "checkpoints" / f"step-{step}" for step in (1, 2, 3)]

    def tensors(name: str) -> list[str]:
        return [hashlib.sha256((f / name / "adapter_model.safetensors").read_bytes()).hexdigest() for f in folders]

    policy, critic = tensors("adapter"), tensors("critic")
    assert policy[0] == policy[1] != policy[2]
    assert len(set(critic)) == 3
    assert ["policy/grad_norm" in row for row in rows] == [False, False, True]


@pytest.mark.parametrize("cut", ["40"])
def test_the_critics_gradient_does_not_depend_on_how_the_batch_is_cut(
    cut: str, tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    found = []
    for budget in ("8192", cut):
        config = small_config(
            tiny_model, tmp_path, *PPO, f"parallel.microbatch_tokens={budget}", "optim.eps=1e-3", name=f"r{budget}"
        )
        _, trainer = run(config, pool, steps=1)
        found.append(load_file(trainer.folder.path / "checkpoints/step-1/critic/adapter_model.safetensors"))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6), name


def test_a_critic_can_start_from_a_checkpoints(tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    first = run(small_config(tiny_model, tmp_path, *PPO, name="first"), pool)[1]
    path = first.folder.path / "checkpoints/step-2"
    rows, _ = run(
        small_config(tiny_model, tmp_path, *PPO, f"critic.path='{path / 'critic'}'", name="second"), pool, steps=1
    )
    assert rows[0]["critic/values_mean"] != 0
    wrong = small_config(tiny_model, tmp_path, *PPO, f"critic.path='{path / 'adapter'}'", name="third")
    with pytest.raises(UserError, match="value_head"):
        run(wrong, pool, steps=1)


def test_the_base_is_in_memory_once(tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    from contextlib import ExitStack

    with ExitStack() as stack:
        trainer = make_trainer(small_config(tiny_model, tmp_path, *PPO), pool, stack, steps=1)
        policy = trainer.workers._policy  # type: ignore[attr-defined]
        frozen = {p.data_ptr(): p.numel() for n, p in policy._peft.named_parameters() if "lora_" not in n}
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        assert sum(frozen.values()) == sum(p.numel() for p in base.parameters())
        assert policy.parameters(CRITIC).keys() - policy.parameters(TRAINED).keys() == {
            f"{VALUE_HEAD}.weight",
            f"{VALUE_HEAD}.bias",
        }


ALGORITHMS = {
    "grpo": ["algorithm.kl_coef=0.05", "algorithm.kl_control=adaptive", "algorithm.kl_horizon=100"],
    "ppo": [*PPO, "critic.warmup_steps=1", "algorithm.minibatch_prompts=1", "adapter.dropout=0.1"],
    "dapo": ["algorithm.preset=dapo", "optim.schedule=cosine"],
    "remax": ["algorithm.advantage=remax", "algorithm.policy_loss=clip_cov", "algorithm.clip_cov_low=0.01"],
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_stopped_and_resumed_run_gives_the_same_numbers(
    name: str, tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    """6 steps at once, or 3, a new process's worth of set-up, and 3 more: same adapters, same metrics."""
    truths = ["flat", "alpha", "beta", "flat", "gamma", "delta", "epsilon"]
    common = [*ALGORITHMS[name], "trainer.total_steps=6", "checkpoint.every_steps=3"]
    whole, trainer = run(small_config(tiny_model, tmp_path, *common, name="whole"), pool, steps=6, truths=truths)
    config = small_config(tiny_model, tmp_path, *common, name="parts")
    with_stop(config, pool, truths, after=3)
    parts, resumed = run(config, pool, steps=6, truths=truths)
    assert parts == whole
    for left, right in zip(hashes(trainer.folder.path), hashes(resumed.folder.path), strict=True):
        assert left == right
    assert resumed.progress.cursor == trainer.progress.cursor
    if name == "dapo":
        assert trainer.progress.cursor > 12  # it did refill


def with_stop(config, pool: RewardPool, truths: list[str], after: int) -> None:  # type: ignore[no-untyped-def]
    """The first `after` steps of a run, as a kill would leave it: with a checkpoint and no summary."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        trainer = make_trainer(config, pool, stack, steps=6, truths=truths)
        trainer.workers.publish()
        for _ in range(after):
            trainer._step()


def test_the_greedy_rollout_of_remax_is_not_counted_as_the_update(
    tiny_model: Path, tmp_path: Path, pool: RewardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy_rewards = Sampler.greedy_rewards

    def slow(*args: Any) -> torch.Tensor:
        time.sleep(2)
        return greedy_rewards(*args)

    monkeypatch.setattr(Sampler, "greedy_rewards", slow)
    _, trainer = run(small_config(tiny_model, tmp_path, "algorithm.advantage=remax"), pool, steps=1)
    (row,) = map(json.loads, (trainer.folder.path / "metrics.jsonl").read_text().splitlines())
    assert row["time/greedy_s"] > 2
    assert row["time/update_s"] < 2
    phases = ("rollout", "greedy", "estimate", "update", "publish")
    parts = sum(row[f"time/{phase}_s"] for phase in phases)
    assert row["time/step_s"] * 0.9 < parts <= row["time/step_s"]


def hashes(run_folder: Path) -> list[tuple[str, str]]:
    step = run_folder / "checkpoints/step-6"
    files = sorted(p for p in step.rglob("*.safetensors"))
    return [(str(p.relative_to(step)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def test_a_checkpoint_without_a_critic_is_refused(tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    _, grpo = run(small_config(tiny_model, tmp_path, name="grpo"), pool)
    step = grpo.folder.path / "checkpoints/step-2"
    with pytest.raises(UserError, match="holds no critic"):
        run(small_config(tiny_model, tmp_path, *PPO, f"resume='{step}'", name="ppo"), pool)
