"""Every estimator and every loss runs through real steps, and what the configuration says of them happens."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorl import settings
from lorl.algorithms.catalogue import available
from lorl.algorithms.correction import PRESETS
from lorl.errors import UserError
from lorl.policy.load import TRAINED
from lorl.rewards.pool import RewardPool
from small_trainer import run, small_config

pytest_plugins = ["trainer_fixtures"]

ESTIMATORS = [each.name for each in available() if each.kind == "advantage"]
LOSSES = [each.name for each in available() if each.kind == "policy loss"]


def adapter_of(trainer: Any, step: int = 2) -> dict[str, Tensor]:
    return load_file(trainer.folder.path / "checkpoints" / f"step-{step}" / "adapter" / "adapter_model.safetensors")


def check_trained(rows: list[dict[str, Any]], trainer: Any, *, may_be_null: tuple[str, ...] = ()) -> None:
    """Two steps, finite numbers, and an adapter that is no longer the base."""
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        bad = [k for k, v in row.items() if (v is None or not math.isfinite(v)) and k not in may_be_null]
        assert not bad
        assert row["train/skipped"] == 0
    assert any(bool(value.any()) for name, value in adapter_of(trainer).items() if "lora_B" in name)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_trains(name: str, tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    weights = ["algorithm.reward_weights={varied: 1.0, short: 0.5}"] if name.startswith("gdpo") else []
    config = small_config(tiny_model, tmp_path, f"algorithm.advantage={name}", *weights)
    check_trained(*run(config, pool))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_over_minibatches_and_epochs(
    name: str, tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    config = small_config(
        tiny_model,
        tmp_path,
        f"algorithm.policy_loss={name}",
        "algorithm.minibatch_prompts=1",
        "algorithm.epochs=2",
        "algorithm.kl_cov_ratio=0.1",
        "algorithm.clip_cov_ratio=0.1",
        "algorithm.clip_cov_low=0.01",
    )
    rows, trainer = run(config, pool)
    check_trained(rows, trainer)
    if name in ("clip_cov", "kl_cov"):
        assert 0 < rows[0]["policy/selected_fraction"] <= 0.12


@pytest.mark.parametrize("loss", ["ppo_clip", "clip_cov", "kl_cov", "gspo"])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(
    loss: str, tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    adapters, cuts = [], (8192, 40)
    for budget in cuts:
        config = small_config(
            tiny_model,
            tmp_path,
            f"algorithm.policy_loss={loss}",
            f"parallel.microbatch_tokens={budget}",
            "algorithm.kl_cov_ratio=0.1",
            "algorithm.clip_cov_ratio=0.1",
            "algorithm.clip_cov_low=0.01",
            "optim.eps=1e-3",  # Adam's first step is the gradient's sign otherwise, and noise around 0 would count
            name=f"r{budget}",
        )
        adapters.append(adapter_of(run(config, pool, steps=1)[1], 1))
    for name, value in adapters[0].items():
        assert torch.allclose(value, adapters[1][name], atol=1e-6, rtol=0), name


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "disabled"])
def test_every_correction_preset_trains(preset: str, tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    config = small_config(tiny_model, tmp_path, f"correction.preset={preset}")
    rows, trainer = run(config, pool)
    check_trained(rows, trainer)
    if preset != "bypass_ppo_clip":  # whose ratio is all there is to it
        assert abs(rows[0]["rollout_corr/kl"]) < 1e-4  # one model is both


def test_rejected_tokens_leave_the_loss_and_weights_scale_it(
    tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    """A bound that nothing passes leaves nothing to learn from, and weights truncated to 1e-3 leave little."""
    none, trainer = run(small_config(tiny_model, tmp_path, "correction.reject=[token_k1:1.5_2.0]", name="a"), pool)
    assert none[0]["rollout_corr/rollout_rs_masked_fraction"] == 1
    assert not any(bool(value.any()) for name, value in adapter_of(trainer).items() if "lora_B" in name)
    plain, _ = run(small_config(tiny_model, tmp_path, name="b"), pool, steps=1)
    small, _ = run(
        small_config(tiny_model, tmp_path, "correction.importance=token", "correction.upper=0.001", name="c"),
        pool,
        steps=1,
    )
    assert small[0]["policy/grad_norm"] == pytest.approx(1e-3 * plain[0]["policy/grad_norm"], rel=1e-3)


def test_no_correction_reports_nothing_and_a_harmless_one_changes_nothing(
    tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    plain, a = run(small_config(tiny_model, tmp_path, name="a"), pool)
    measured, b = run(small_config(tiny_model, tmp_path, "correction.reject=[token_k1:0.5_2.0]", name="b"), pool)
    assert not [key for key in plain[0] if key.startswith("rollout_corr/")]
    assert measured[0]["rollout_corr/rollout_rs_masked_fraction"] == 0
    for name, value in adapter_of(a).items():
        assert torch.allclose(value, adapter_of(b)[name], atol=1e-5)


@pytest.mark.parametrize("where", ["loss", "reward"])
def test_kl_is_measured_and_its_coefficient_adapts(
    where: str, tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    config = small_config(
        tiny_model,
        tmp_path,
        "algorithm.kl_coef=0.1",
        f"algorithm.kl_in={where}",
        "algorithm.kl_control=adaptive",
        "algorithm.kl_target=1e-9",
        "algorithm.kl_horizon=80",
        "optim.lr=1e-2",
    )
    rows, trainer = run(config, pool, steps=3)
    assert rows[0]["policy/kl"] == pytest.approx(0, abs=1e-9)  # the fresh adapter is the base
    assert rows[1]["policy/kl"] > 1e-6
    coefs = [row["policy/kl_coef"] for row in rows]
    assert coefs[0] == 0.1
    assert coefs[2] == pytest.approx(coefs[1] * (1 + 0.2 * 8 / 80))  # far above the target: clipped at +0.2
    assert trainer.progress.kl == {"coef": pytest.approx(coefs[2] * 1.02)}


def test_the_exact_kl_agrees_with_its_estimate_and_trains(tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    """In the reward as in the loss; k1 is unbiased, so over a batch's tokens its mean is near."""
    means = {}
    for where, estimator in (("reward", "full"), ("loss", "full"), ("reward", "k3")):
        config = small_config(
            tiny_model,
            tmp_path,
            "algorithm.kl_coef=1e-6",
            f"algorithm.kl_in={where}",
            f"algorithm.kl_estimator={estimator}",
            "rollout.n=64",
            "optim.lr=1e-2",
            name=f"{where}-{estimator}",
        )
        rows, _ = run(config, pool)
        assert rows[0]["policy/kl"] == pytest.approx(0, abs=1e-6)
        means[where, estimator] = rows[1]["policy/kl"]
    assert means["loss", "full"] == pytest.approx(means["reward", "full"], rel=1e-2)
    assert means["reward", "k3"] == pytest.approx(means["reward", "full"], rel=0.25)


def test_the_reference_of_a_warm_start_is_the_start_unless_the_base_is_asked_for(
    tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    warm = run(small_config(tiny_model, tmp_path, "optim.lr=2e-2", name="warm"), pool)[1]
    path = warm.folder.path / "checkpoints/step-2/adapter"
    kl = {}
    for reference in ("start", "base"):
        config = small_config(
            tiny_model,
            tmp_path,
            f"adapter.path='{path}'",
            "algorithm.kl_coef=0.1",
            "algorithm.kl_in=reward",
            f"algorithm.reference={reference}",
            name=reference,
        )
        kl[reference] = [row["policy/kl"] for row in run(config, pool)[0]]
    assert kl["start"][0] == 0
    assert kl["start"][1] > 0
    assert kl["base"][0] > 1e-4


def test_entropy_bonus_raises_the_entropy(tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    """With equal rewards only the entropy term is left."""
    config = small_config(tiny_model, tmp_path, "algorithm.entropy_coef=1.0", "optim.lr=1e-2")
    rows, _ = run(config, pool, steps=4, truths=["flat"] * 2)
    assert rows[-1]["policy/entropy"] > rows[0]["policy/entropy"] + 0.01


def test_dynamic_sampling_replaces_groups_that_teach_nothing(
    tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    truths = ["flat", "alpha", "flat", "beta", "flat", "gamma"]
    rows, trainer = run(
        small_config(tiny_model, tmp_path, "algorithm.dynamic_sampling=true"), pool, steps=3, truths=truths
    )
    for row in rows:
        assert row["rollout/informative_fraction"] == 1
        assert row["rollout/groups_kept"] == 2
    assert sum(row["rollout/refills"] for row in rows) > 0
    assert trainer.progress.cursor > 3 * 2


def test_dynamic_sampling_goes_on_short_where_nothing_is_left_to_draw(
    tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    config = small_config(tiny_model, tmp_path, "algorithm.dynamic_sampling=true", "algorithm.max_refills=2")
    out = io.StringIO()
    rows, _ = run(config, pool, truths=["flat", "alpha"], out=out)
    assert [row["rollout/groups_kept"] for row in rows] == [1, 1]
    assert "1 of 2 groups" in out.getvalue()
    nothing, _ = run(
        small_config(tiny_model, tmp_path, "algorithm.dynamic_sampling=true", name="n"), pool, truths=["flat"] * 4
    )
    assert nothing[0]["rollout/refills"] == 10


def test_overlong_answers_are_punished(tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    config = small_config(tiny_model, tmp_path, "algorithm.overlong_buffer_tokens=4", "algorithm.overlong_penalty=2.0")
    _, trainer = run(config, pool, steps=1)
    rows = trainer.sampler.batch(1, 0).samples
    cut = [sample for sample in rows if len(sample.completion.tokens) == 10]
    assert cut
    for sample in cut:
        assert sample.outcome.extras["overlong_penalty"] == -2.0
        rule = float(sample.outcome.extras["varied"]) + float(sample.outcome.extras["short"]) / 4
        assert sample.outcome.reward == pytest.approx(rule - 2.0)


def test_the_dapo_preset_lies_below_what_is_given() -> None:
    plain = settings.load(None, ["algorithm.preset=dapo", "rollout.max_response_tokens=1000"])
    assert (plain.algorithm.clip_high, plain.algorithm.dynamic_sampling) == (0.28, True)
    assert plain.algorithm.overlong_buffer_tokens == 200
    mine = settings.load(None, ["algorithm.preset=dapo", "algorithm.clip_high=0.3", "algorithm.dynamic_sampling=false"])
    assert (mine.algorithm.clip_high, mine.algorithm.dynamic_sampling) == (0.3, False)


def test_a_written_preset_reads_back_as_it_was(tmp_path: Path) -> None:
    config = settings.load(None, ["algorithm.preset=dapo", "algorithm.kl_coef=0.01"])
    (tmp_path / "c.yaml").write_text(settings.to_yaml(config))
    assert settings.load(tmp_path / "c.yaml") == config


OWN = """
from lorl.algorithms.registry import advantage, kl, policy_loss

@advantage("mine", source="ours")
def mine(inputs):
    "A = R - 0.1"
    return (inputs.rewards - 0.1)[inputs.layout.sequence]

@policy_loss("mine_too", source="ours")
def mine_too(logprobs, old_logprobs, advantages, layout):
    "-A log pi"
    return -advantages * logprobs, {"own_metric": advantages}

@kl("my_kl", source="ours")
def my_kl(logprobs, ref_logprobs):
    "d squared"
    return (logprobs - ref_logprobs).square()
"""


def test_algorithms_of_the_users_own_file_train(tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    (tmp_path / "own.py").write_text(OWN)
    config = small_config(
        tiny_model,
        tmp_path,
        f"algorithm.path='{tmp_path / 'own.py'}'",
        "algorithm.advantage=mine",
        "algorithm.policy_loss=mine_too",
        "algorithm.kl_estimator=my_kl",
        "algorithm.kl_coef=0.1",
    )
    rows, trainer = run(config, pool)
    check_trained(rows, trainer)
    assert rows[0]["policy/own_metric"] == pytest.approx(rows[0]["reward/mean"] - 0.1, abs=0.2)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.path=nowhere.py"], ["nowhere.py", "no such file"]),
        (["algorithm.advantage=gpro"], ["gpro", "'grpo'"]),
        (["algorithm.advantage=grpo", "rollout.n=1"], ["rollout.n=1"]),
        (["correction.preset=decoupled_tokenis"], ["decoupled_token_is"]),
        (["correction.reject=[seq_mean_k9:2.0]"], ["seq_mean_k9", "seq_mean_k"]),
        (["correction.reject=[seq_mean_k1]"], ["seq_mean_k1:"]),
        (["correction.upper=3.0"], ["correction.upper", "correction.importance"]),
        (["correction.bypass_loss=reinforce"], ["correction.bypass"]),
        (["correction.bypass=true", "correction.importance=token"], ["twice"]),
        (["correction.preset=bypass_pg_is", "algorithm.policy_loss=gspo"], ["gspo"]),
        (["correction.bypass=true", "adapter.dropout=0.1"], ["adapter.dropout"]),
        (["algorithm.overlong_buffer_tokens=11"], ["overlong_buffer_tokens=11", "max_response_tokens=10"]),
        (["algorithm.dynamic_sampling=true", "rollout.n=1", "algorithm.advantage=gae"], ["rollout.n"]),
        (["algorithm.kl_control=adaptive"], ["algorithm.kl_coef"]),
        (["reward_model.rule_weight=0.5"], ["reward_model.path"]),
        (["algorithm.kl_estimator=full+"], ["full+", "use full"]),
    ],
)
def test_mistakes_are_told_in_a_sentence_before_anything_loads(
    overrides: list[str], words: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        small_config(tiny_model, tmp_path, *overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("x = (\n", 1, "never closed"),
        ("import math\n\nmath.nothing\n", 3, "AttributeError"),
        (OWN.replace('"mine"', '"grpo"'), 4, "grpo"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(
    text: str, line: int, word: str, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserError) as caught:
        small_config(tiny_model, tmp_path, f"algorithm.path='{tmp_path / 'broken.py'}'")
    assert f"broken.py:{line}:" in str(caught.value)
    assert word in str(caught.value)


def test_gdpo_says_what_is_missing_where_the_reward_has_no_such_part(
    tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    config = small_config(tiny_model, tmp_path, "algorithm.advantage=gdpo", "algorithm.reward_weights={shorts: 1.0}")
    with pytest.raises(UserError, match=r"'shorts'.*'short'"):
        run(config, pool)


def test_trained_is_the_adapter_that_rollouts_came_from(tiny_model: Path, tmp_path: Path, pool: RewardPool) -> None:
    _, trainer = run(small_config(tiny_model, tmp_path, "algorithm.advantage=remax"), pool)
    assert {sample.completion.version for sample in trainer.sampler.batch(2, 2).samples} == {3}
    assert TRAINED == "policy"
