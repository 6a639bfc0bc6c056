"""Reward models: trained from preferences as an adapter, or any sequence classifier, mixed with the rule."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from conftest import save_tiny_model, tiny_tokenizer
from lorl import settings
from lorl.errors import UserError
from lorl.policy.scorers import SCORE_HEAD
from lorl.reward_model import train_reward
from lorl.rewards.pool import RewardPool
from lorl.tracking.console import Console
from lorl_command import Forks, small_run, write_rows
from small_trainer import run, small_config

pytest_plugins = ["trainer_fixtures"]


def write_pairs(path: Path, count: int) -> Path:
    """Answers that end in a good mark are chosen over those that end in a bad one."""
    letters = "abcdefghij"
    rows = [
        {"prompt": f"question {i}", "chosen": f"{letters[i % 10]}good", "rejected": f"{letters[(i * 7) % 10]}bad!"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reward_config(model: Path, *overrides: str):  # type: ignore[no-untyped-def]
    return settings.load(
        None,
        [
            f"model.path='{model}'",
            "adapter.rank=4",
            "optim.lr=1e-2",
            "data.prompts_per_step=8",
            "trainer.total_epochs=3",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def reward_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rm")
    pairs = write_pairs(folder / "pairs.jsonl", 80)
    card = train_reward(reward_config(tiny_model), str(pairs), folder / "rm", Console())
    assert card["accuracy"] > 0.9
    assert (card["pairs"], card["held_out"], card["steps"]) == (72, 8, 27)
    return folder / "rm"


def test_the_adapter_scores_as_transformers_does_and_is_mixed_in(
    reward_adapter: Path, tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    config = small_config(
        tiny_model,
        tmp_path,
        f"reward_model.path='{reward_adapter}'",
        "reward_model.weight=0.5",
        "reward_model.rule_weight=2.0",
        "algorithm.advantage=gae",
        "algorithm.kl_coef=0.01",
    )
    rows, trainer = run(config, pool)
    samples = trainer.sampler.batch(3, 4).samples
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(reward_adapter)).eval()
    head = load_file(reward_adapter / "adapter_model.safetensors")
    for sample in samples:
        tokens = torch.tensor([[*sample.completion.prompt.tokens, *sample.completion.tokens]])
        with torch.no_grad():
            last = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1][0, -1]
        score = float(last @ head[f"{SCORE_HEAD}.weight"][0] + head[f"{SCORE_HEAD}.bias"])
        extras = sample.outcome.extras
        assert extras["model"] == pytest.approx(score, abs=1e-4)
        assert sample.outcome.reward == pytest.approx(2.0 * float(extras["rule"]) + 0.5 * float(extras["model"]))
    assert rows[0]["reward/mean"] == pytest.approx(2 * rows[0]["reward/rule"] + 0.5 * rows[0]["reward/model"])


def test_the_model_alone_needs_no_rule(reward_adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = small_config(tiny_model, tmp_path, f"reward_model.path='{reward_adapter}'", "reward_model.rule_weight=0")
    rows, _ = run(config, None)
    assert rows[0]["reward/mean"] == pytest.approx(rows[0]["reward/model"])
    assert "reward/rule" not in rows[0]
    assert rows[0]["rollout/informative_fraction"] == 1


def test_any_sequence_classifier_scores_with_its_own_template(
    tiny_model: Path, tmp_path: Path, pool: RewardPool
) -> None:
    torch.manual_seed(3)
    classifier = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=258,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,
            pad_token_id=1,
            initializer_range=0.5,
        )
    ).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "classifier")
    config = small_config(
        tiny_model,
        tmp_path,
        f"reward_model.path='{tmp_path / 'classifier'}'",
        "parallel.microbatch_tokens=150",  # several padded batches
    )
    rows, trainer = run(config, pool)
    assert rows[0]["reward/model"] != 0
    size = sum(p.numel() * 4 for p in classifier.parameters()) / 2**20
    assert f"{size:.0f} MiB" in trainer.workers.scorer.description  # type: ignore[attr-defined]
    for sample in trainer.sampler.batch(3, 4).samples:
        conversation = [*sample.completion.prompt.messages, {"role": "assistant", "content": sample.completion.text}]
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            want = float(classifier(input_ids=tokens["input_ids"]).logits)
        assert sample.outcome.extras["model"] == pytest.approx(want, abs=1e-4)


def test_a_reward_adapter_of_another_base_is_refused(reward_adapter: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", initializer_range=0.2)
    config = small_config(other, tmp_path, f"reward_model.path='{reward_adapter}'", "reward_model.rule_weight=0")
    with pytest.raises(UserError, match="another base"):
        run(config, None)


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"prompt": "a", "chosen": "b"}, "'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected'"),
        ({"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "c"}, "messages"),
    ],
)
def test_rows_that_are_no_pairs_are_named(row: dict[str, object], word: str, tiny_model: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 2)
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"pairs.jsonl:3") as caught:
        train_reward(reward_config(tiny_model), str(path), tmp_path / "rm", Console())
    assert word in str(caught.value)


def test_conversations_are_pairs_too(tiny_model: Path, tmp_path: Path) -> None:
    asked = {"role": "user", "content": "hello"}
    rows = [
        {
            "chosen": [asked, {"role": "assistant", "content": f"{i}"}],
            "rejected": [asked, {"role": "assistant", "content": "no"}],
        }
        for i in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = train_reward(reward_config(tiny_model), str(tmp_path / "pairs.jsonl"), tmp_path / "rm", Console())
    assert card["pairs"] == 3


def test_keys_without_meaning_and_an_existing_folder_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    with pytest.raises(UserError, match=r"rollout\.n"):
        train_reward(reward_config(tiny_model, "rollout.n=3"), str(pairs), tmp_path / "rm", Console())
    with pytest.raises(UserError, match="exists"):
        train_reward(reward_config(tiny_model), str(pairs), tmp_path, Console())


def test_from_pairs_to_a_trained_policy_on_the_command_line(forks: Forks, tiny_model: Path, tmp_path: Path) -> None:
    """`lorl train-reward`, then `lorl train` and `lorl eval` on its score alone: no grader, no data source."""
    write_pairs(tmp_path / "pairs.jsonl", 40)
    fitted = forks.run(
        "train-reward",
        "--pairs",
        "pairs.jsonl",
        "--output",
        "rm",
        f"model.path={tiny_model}",
        "adapter.rank=4",
        "optim.lr=1e-2",
        "data.prompts_per_step=8",
        "trainer.total_epochs=2",
        cwd=tmp_path,
    )
    assert fitted.code == 0, fitted.err
    assert "accuracy" in fitted.out
    assert "4 held-out pairs" in fitted.out
    for file, count in (("train.jsonl", 8), ("val.jsonl", 3)):  # without answers
        write_rows(tmp_path / file, ({"prompt": f"{i}+{i}="} for i in range(count)))
    alone = ["reward_model.path=rm", "reward_model.rule_weight=0", "data.val=val.jsonl", "data.answer_key=null"]
    command = [word for word in small_run(tmp_path, tiny_model, *alone) if not word.startswith("reward.")]
    trained = forks.run(*command, cwd=tmp_path)
    assert trained.code == 0, trained.err
    assert "reward model: an adapter of" in trained.err + trained.out
    judged = forks.run("eval", f"model.path={tiny_model}", *alone, "--json", cwd=tmp_path)
    assert judged.code == 0, judged.err
    assert json.loads(judged.out)["n"] == 3
    refused = forks.run("train-reward", "--pairs", "pairs.jsonl", "--output", "rm", cwd=tmp_path)
    assert refused.code == 2
    assert "rm exists" in refused.err
