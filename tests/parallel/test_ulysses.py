"""Passes that ranks split among them: the numbers of one process, and a part of the tokens on each rank."""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_equal_runs
from test_group import each
from test_ranks import ALGORITHMS, SHARDED, STEPS, alone, trained
from test_ray import command
from torch import Tensor

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig
from lorl.errors import InfrastructureError, UserError
from lorl.experience import Completion, Experience, Outcome, Prompt
from lorl.packing import pack
from lorl.parallel.group import Ranks
from lorl.parallel.start import start_workers
from lorl.parallel.ulysses import CALL, Ulysses, exchange
from lorl.policy.load import TRAINED, load_policy, load_tokenizer
from lorl.policy.policy import Policy
from lorl.rewards.pool import RewardPool
from lorl_command import Forks
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
        (2, 45, {"model_type": "gemma2", "head_dim": 12, "sliding_window": 4, "attn_logit_softcapping": 2.0}, {}),
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
        return errors, set(seen), len(policy.states(experience.forest, adapter=TRAINED))

    distinct = len(experience.forest.distinct()[0])
    for errors, seen, read in each(ranks, tmp_path, work, sequence=ranks):
        assert seen == {-(-tokens // ranks)}  # what a layer got
        assert read in (distinct // ranks, -(-distinct // ranks))  # and the head
        assert not {name: error for name, error in errors.items() if not error < 1e-5}


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # gemma2's head is capped, and computed again
def test_a_rank_without_states_to_read_takes_part(model_type: str, tmp_path: Path) -> None:
    shape = {} if model_type == "llama" else {"head_dim": 12, "attn_logit_softcapping": None}
    folder = save_tiny_model(tmp_path / "model", model_type, **shape)
    experience = pack([Completion(Prompt("p", [7], ""), 0, [5], [0.0], "", "stop", 1)], [Outcome("ok", 0.0)])
    values, grads = everything(policy_on(folder), experience)

    def work(group: Ranks) -> Any:
        policy = policy_on(folder)
        policy.sequence = Ulysses(group.of_part())
        found, own = everything(policy, experience)
        for grad in own.values():
            group.sum_(grad, "gradients")
        nothing = replace(experience.forest, sampled=experience.forest.sampled[:0])
        shape = policy.logprobs(nothing, adapter=TRAINED).logprobs.shape
        group.gather("done", "done")
        same = [float((found[name] - value).abs().max()) < 1e-5 for name, value in values.items()]
        return all(same) and all(torch.allclose(own[name], grads[name], atol=1e-5) for name in grads), tuple(shape)

    assert each(2, tmp_path, work, sequence=2) == [(True, (0,))] * 2


def test_who_is_missed_in_a_split_pass_has_a_name(tmp_path: Path) -> None:
    """Rank 3 stops between its forward and its backward pass."""
    folder, experience = save_tiny_model(tmp_path / "model"), batch(48)

    def work(group: Ranks) -> None:
        policy = policy_on(folder)
        policy.sequence = Ulysses(group.of_part())
        found = policy.logprobs(experience.forest, adapter=TRAINED).logprobs
        if group.rank == 3:
            time.sleep(4)
        found.sum().backward()

    *others, waiting, _ = each(4, tmp_path, work, limit_s=2.0, sequence=2)
    assert others == [None, None]
    assert isinstance(waiting, InfrastructureError)
    assert "rank 2 waited" in str(waiting)
    assert f"rank 3 did not come, its last was {CALL!r}" in str(waiting)


def test_exchanges_are_compiled_with_what_is_around_them(tmp_path: Path) -> None:
    """In one graph, for passes of any length."""

    def turned(states: Tensor, name: str) -> Tensor:
        rows = states.cos().unflatten(1, (2, -1)).transpose(0, 1)  # [T / N, d] -> [N, T / N, d / N]
        whole = exchange(rows.contiguous(), [1, 1], [1, 1], name).flatten(0, 1).sin()
        return exchange(whole.unflatten(0, (2, -1)), [1, 1], [1, 1], name).transpose(0, 1).flatten(1)

    def work(group: Ranks) -> Any:
        ranks = group.of_part()
        Ulysses(ranks)
        compiled = torch.compile(turned, fullgraph=True, backend="aot_eager")
        errors = []
        for tokens in (6, 10, 14):
            states = torch.randn(tokens, 8, requires_grad=True)
            torch._dynamo.mark_dynamic(states, 0)
            (want,) = torch.autograd.grad(states.cos().sin().square().sum(), states)
            (got,) = torch.autograd.grad(compiled(states, ranks.name).square().sum(), states)
            errors.append(float((want - got).abs().max()))
        group.gather("done", "done")
        return max(errors) < 1e-6, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    assert each(2, tmp_path, work, sequence=2) == [(True, 1)] * 2


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


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_split_passes_over_ray_train_to_the_numbers_of_one_process(
    algorithm: str, forks: Forks, tiny_model: Path, tmp_path: Path
) -> None:
    keys = ALGORITHMS[algorithm]
    one = forks.run(*command(tmp_path, tiny_model, *keys, name="one"), cwd=tmp_path)
    assert one.code == 0, one
    split = [*keys, "parallel.gpus=2", "parallel.sequence=2"]
    many = forks.run(*command(tmp_path, tiny_model, *split, name="many"), cwd=tmp_path)
    assert many.code == 0, many
    assert "2 ranks on CPU processes, each with the whole base; 2 split each pass" in many.out
    assert_equal_runs(tmp_path / "runs/one", tmp_path / "runs/many", STEPS)


def test_ranks_and_heads_that_a_pass_cannot_be_split_over_are_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    def start(model: Path, *keys: str) -> None:
        config = small_config(model, tmp_path, *keys)
        start_workers(config, load_tokenizer(config.model), lambda note: None)

    def refusal(model: Path, *keys: str) -> str:
        with pytest.raises(UserError) as caught:
            start(model, *keys)
        return str(caught.value)

    assert "does not divide the number of ranks" in refusal(tiny_model, "parallel.sequence=2")
    assert refusal(tiny_model, "parallel.gpus=6", "parallel.sequence=4").endswith("; use 1, 2, 3 or 6")
    assert refusal(tiny_model, "parallel.gpus=6", "parallel.sequence=3").endswith("with 6 ranks use 1 or 2")
    rotary = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = save_tiny_model(tmp_path / "dynamic", rope_parameters=rotary)
    assert "(dynamic)" in refusal(model, "parallel.gpus=2", "parallel.sequence=2")
