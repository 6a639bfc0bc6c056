"""Passes that ranks split among them: the numbers of one process, and a part of the tokens on each rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_equal_runs
from test_group import each
from test_ranks import ALGORITHMS, SHARDED, STEPS, alone, trained
from torch import Tensor

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig
from lorl.experience import Completion, Experience, Outcome, Prompt
from lorl.packing import pack
from lorl.parallel.group import Ranks
from lorl.parallel.ulysses import Ulysses
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.policy import Policy
from lorl.rewards.pool import RewardPool
from small_trainer import small_config

__all__ = ["alone"]

pytest_plugins = ["trainer_fixtures"]

CRITIC = "critic"


def batch(tokens: int) -> Experience:
    """Three prompts that begin alike and end apart, whose answers branch late, at once and never. `tokens` in all."""
    shared = list(range(40, 60))
    prompts = [Prompt(f"p{i}", [*shared, 60 + i, 70 + i], "") for i in range(3)]
    answers = [[[5, 6, 7, 8], [5, 6, 9]], [[10, 11], [12], [13, 14, 15]], [[16, 17, 18], [16, 17, 18]]]
    spare = tokens - len(shared) - 3 * 2 - (4 + 1 + 2 + 1 + 3 + 3)
    answers[2] = [[*answer, *range(80, 80 + spare)] for answer in answers[2]]
    completions = [
        Completion(prompt, j, answer, [0.0] * len(answer), "", "stop", 1)
        for prompt, group in zip(prompts, answers, strict=True)
        for j, answer in enumerate(group)
    ]
    packed = pack(completions, [Outcome("ok", 0.0)] * len(completions))
    assert len(packed.forest.tokens) == tokens
    return packed


def policy_on(folder: Path, **settings: Any) -> Policy:
    """An adapter that does something, and a critic."""
    policy = load_policy(ModelConfig(path=str(folder), **settings), AdapterConfig(rank=4), seed=0)
    policy.add_adapter(CRITIC, policy.lora_config(TRAINED), seed=1, learns=True)
    policy.add_scalar_head(CRITIC, "value_head")
    generator = torch.Generator().manual_seed(3)
    for adapter in (TRAINED, CRITIC):
        for parameter in policy.parameters(adapter).values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def everything(policy: Policy, experience: Experience) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All that passes say of a forest, and gradients (this rank's) of a number that depends on all of it."""
    forest = experience.forest
    with torch.no_grad():
        anchor = policy.states(forest, adapter=None)
        squares = policy.logprobs(forest, adapter=TRAINED, sum_pi_squared=True).sum_pi_squared
    assert squares is not None
    plain = policy.plain_head
    scores = policy.logprobs(forest, adapter=TRAINED, temperature=0.7, entropy=True, anchor=anchor if plain else None)
    values = policy.scalars(forest, forest.previous[forest.sampled], adapter=CRITIC)
    found = {"logprobs": scores.logprobs, "entropy": scores.entropy, "values": values}
    found |= {"kl": scores.kl} if plain else {}
    weights = torch.linspace(-1, 2, len(forest.sampled))
    sequences = torch.zeros(experience.layout.num_sequences).index_add(0, experience.layout.sequence, scores.logprobs)
    loss = sum((weights * x).sum() for x in found.values()) + sequences.exp().sum()  # of tokens, and of sequences
    loss.backward()
    parameters = policy.parameters(TRAINED) | policy.parameters(CRITIC)
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    return {name: x.detach() for name, x in found.items()} | {"squares": squares}, grads


@pytest.mark.parametrize(
    ("ranks", "tokens", "shape", "settings"),
    [
        (2, 48, {}, {}),
        (2, 41, {}, {}),  # the last rank's are more than one short
        (4, 47, {}, {}),  # two heads of keys for four ranks
        (3, 43, {"num_attention_heads": 6, "hidden_size": 48, "head_dim": 8}, {}),  # 2 heads of keys, 3 ranks
        (2, 45, {}, {"gradient_checkpointing": True}),
        (2, 45, {"model_type": "gemma2", "head_dim": 12, "sliding_window": 4, "attn_logit_softcapping": None}, {}),
    ],
)
def test_a_split_pass_says_and_teaches_what_a_whole_one_does(
    ranks: int, tokens: int, shape: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    folder, experience = save_tiny_model(tmp_path / "model", **shape), batch(tokens)
    values, grads = everything(policy_on(folder, **settings), experience)
    assert min(float(grad.abs().max()) for grad in grads.values()) > 1e-3

    def work(group: Ranks) -> Any:
        policy = policy_on(folder, **settings)
        policy.sequence = Ulysses(group.of_part())
        seen: list[int] = []
        policy.peft.get_base_model().base_model.layers[0].mlp.register_forward_hook(
            lambda module, args, out: seen.append(out.shape[1])
        )
        found, own = everything(policy, experience)
        for grad in own.values():
            group.sum_(grad, "gradients")
        group.gather("done", "done")
        errors = {name: float((found[name] - value).abs().max()) for name, value in values.items()}
        errors |= {name: float((own[name] - grad).abs().max() / grad.abs().max()) for name, grad in grads.items()}
        return errors, set(seen)

    for errors, seen in each(ranks, tmp_path, work, sequence=ranks):
        assert seen == {-(-tokens // ranks)}
        assert not {name: error for name, error in errors.items() if not error < 1e-5}


@pytest.mark.parametrize(
    ("algorithm", "ranks", "sequence", "keys"),
    [
        ("grpo", 2, 2, []),
        ("ppo", 4, 2, []),
        ("full_kl", 2, 2, []),
        ("optimal", 2, 2, []),
        ("grpo", 2, 2, SHARDED),
        ("ppo", 4, 2, SHARDED),
    ],
)
def test_training_with_split_passes_comes_to_the_numbers_of_one_process(
    algorithm: str,
    ranks: int,
    sequence: int,
    keys: list[str],
    alone: Callable[[str], Path],
    tiny_model: Path,
    tmp_path: Path,
    pool: RewardPool,
) -> None:
    spread = ["optim.lr=3e-4", *ALGORITHMS[algorithm], f"parallel.gpus={ranks}", f"parallel.sequence={sequence}", *keys]
    run = trained(small_config(tiny_model, tmp_path, *spread), pool)
    assert_equal_runs(alone(algorithm), run, STEPS)
