"""Algorithms by name: the built-in ones, their verl names, and a user's own."""

import subprocess
import sys

import pytest
import torch
from algorithm_cases import random_case
from torch import Tensor

from lorl.algorithms import names
from lorl.algorithms.catalogue import available, filled, get_advantage, get_kl, get_policy_loss
from lorl.algorithms.inputs import AdvantageInputs
from lorl.algorithms.registry import ADVANTAGES, KL_ESTIMATORS, POLICY_LOSSES, advantage, policy_loss
from lorl.errors import UserError


def built_in(registry) -> tuple[str, ...]:
    return tuple(entry.name for entry in filled(registry) if entry.function.__module__.startswith("lorl."))


def test_the_list_of_names_is_complete() -> None:
    assert built_in(ADVANTAGES) == names.ADVANTAGES
    assert built_in(POLICY_LOSSES) == names.POLICY_LOSSES
    assert built_in(KL_ESTIMATORS) == names.KL_ESTIMATORS
    assert {entry.name for entry in ADVANTAGES if entry.min_group > 1} == names.NEED_A_GROUP


def test_names_load_without_torch() -> None:
    code = "import sys, lorl.algorithms.names, lorl.algorithms.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("listing", available(), ids=lambda listing: f"{listing.kind}-{listing.name}")
def test_every_algorithm_says_what_it_is_and_whose(listing) -> None:
    assert 5 < len(listing.summary) <= 120
    assert listing.source


@pytest.mark.parametrize("alias", names.ALIASES)
def test_verls_names_find_the_same_functions(alias: str) -> None:
    found = [get(alias) for get in (get_advantage, get_policy_loss, get_kl) if _knows(get, alias)]
    assert [entry.name for entry in found] == [names.ALIASES[alias]]


def _knows(get, name: str) -> bool:
    try:
        return bool(get(name))
    except UserError:
        return False


@pytest.mark.parametrize(
    ("get", "wrong", "right"),
    [(get_advantage, "gpro", "grpo"), (get_policy_loss, "ppo_clp", "ppo_clip"), (get_kl, "low_var_k", "low_var_kl")],
)
def test_a_misspelt_name_gets_the_nearest_one(get, wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=f"{wrong!r}; did you mean {right!r}"):
        get(wrong)


def test_a_users_own_estimator_gets_the_settings_it_names() -> None:
    @advantage("test_shifted", source="a test")
    def shifted(inputs: AdvantageInputs, *, shift: float = 1.0) -> Tensor:
        """A = shift"""
        return torch.full((inputs.layout.num_tokens,), shift)

    inputs = random_case(3).inputs()
    assert get_advantage("test_shifted")(inputs, {"shift": 4.0, "gamma": 0.5}).advantages.unique().tolist() == [4.0]
    assert get_advantage("test_shifted")(inputs, {}).advantages.unique().tolist() == [1.0]
    assert any(listing.name == "test_shifted" for listing in available())


def test_a_users_own_loss_may_not_take_a_built_in_name() -> None:
    get_policy_loss("gspo")
    for name in ("gspo", "vanilla"):
        with pytest.raises(UserError, match="registered already"):
            policy_loss(name)(lambda *arrays: arrays)


def test_an_estimator_says_what_the_batch_lacks() -> None:
    layout = random_case(3).layout()
    bare = AdvantageInputs(layout, torch.zeros(layout.num_sequences))
    with pytest.raises(UserError, match="'gae' needs values"):
        get_advantage("gae")(bare, {})
    with pytest.raises(UserError, match="'remax' needs greedy_rewards"):
        get_advantage("remax")(bare, {})


def test_one_sample_a_prompt_is_refused_where_nothing_could_be_learnt() -> None:
    with pytest.raises(UserError, match=r"rollout\.n=1; use rollout\.n=2 or more or algorithm\.group_of_one=reward"):
        get_advantage("grpo").check_group(1, {})
    with pytest.raises(UserError, match=r"use rollout\.n=2 or more$"):
        get_advantage("grpo_passk").check_group(1, {"group_of_one": "reward"})
    get_advantage("grpo").check_group(1, {"group_of_one": "reward"})
    get_advantage("reinforce_plus_plus").check_group(1, {})


def test_a_loss_with_a_selection_stage_refuses_to_run_without_it() -> None:
    arrays = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="select"):
        get_policy_loss("kl_cov")(*arrays, random_case(0).layout(), {})
