"""What a verl command line means: each key's work, units, spellings, defaults and contradictions."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from lorl import schema, settings
from lorl.algorithms.names import ADVANTAGES, ALIASES, KL_ESTIMATORS, POLICY_LOSSES
from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.rollout.vllm import versions
from lorl.setup import check
from lorl.verl import translate
from lorl.verl.docs import markdown
from lorl.verl.table import KEYS, ROWS, TABLE, find

ROOT = Path(__file__).parent.parent
RUNS: dict[str, list[str]] = json.loads((ROOT / "tests" / "data" / "verl_runs.json").read_text())
LORL_KEYS = {key.name for key in settings.describe()}
SMALL = ["actor_rollout_ref.model.lora_rank=32", "algorithm.adv_estimator=grpo", "data.train_batch_size=16",
         "trainer.n_gpus_per_node=1"]  # fmt: skip

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
CORRECTION = "algorithm.rollout_correction"


def config(*words: str) -> RunConfig:
    return translate([*SMALL, *words]).config


def value(of: RunConfig, key: str) -> Any:
    node: Any = of
    for part in key.split("."):
        node = getattr(node, part)
    return node


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        translate([*SMALL, *words])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The table


def test_no_key_stands_twice_in_the_table():
    assert len(KEYS) == len([name for row in TABLE for name in (row.key, *row.spellings)])


def test_every_row_sets_keys_that_lorl_has_or_says_why_it_does_not():
    for row in TABLE:
        assert set(row.sets) <= LORL_KEYS, row.key
        assert row.sets or row.why, row.key


def test_every_key_of_every_run_has_a_row():
    for words in RUNS.values():
        for word in words:
            assert find(word.partition("=")[0]) is not None


def test_the_documentation_is_what_the_table_says():
    assert (ROOT / "docs" / "from-verl.md").read_text(encoding="utf-8") == markdown(), (
        "run: python -m lorl.verl docs/from-verl.md"
    )


@pytest.mark.parametrize("row", [row for row in TABLE if not row.prefix and not row.joint], ids=lambda row: row.key)
def test_every_key_takes_its_default_in_every_spelling(row):
    plain = config()
    for spelling in (row.key, *row.spellings):
        words = [word for word in SMALL if word.partition("=")[0] != spelling]
        word = f"{spelling}={json.dumps(row.default)}"
        if row.refused and row.default not in row.off:
            assert row.why in refusal(word)
        elif row.only_given:
            translate([*words, word])
        elif spelling == "algorithm.adv_estimator":
            assert translate([*words, word]).config.algorithm.advantage == row.default
        else:
            translation = translate([*SMALL, word])
            assert translation.config == plain or spelling.partition("=")[0] in str(SMALL)
            if not row.sets and not row.refused:
                assert any(spelling in line and row.why in line for line in translation.notes)


def test_every_name_of_verl_is_one_of_lorls():
    estimators = schema.options(ROWS["algorithm.adv_estimator"].type)
    for name in estimators:
        assert config(f"algorithm.adv_estimator={name}").algorithm.advantage in ADVANTAGES
    for name in schema.options(ROWS[f"{ACTOR}.policy_loss.loss_mode"].type):
        assert config(f"{ACTOR}.policy_loss.loss_mode={name}").algorithm.policy_loss in POLICY_LOSSES
    for name in schema.options(ROWS["algorithm.kl_penalty"].type):
        found = config(f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_type={name}").algorithm.kl_estimator
        assert ALIASES.get(found.removesuffix("+"), found.removesuffix("+")) in KL_ESTIMATORS
        assert found.endswith("+") == name.endswith("+")


# What the keys mean

MEANINGS: list[tuple[list[str], dict[str, Any]]] = [
    # verl's defaults, where they are not lorl's
    ([], {"optim.lr": 1e-6, "optim.weight_decay": 0.01, "adapter.alpha": 16, "rollout.n": 1, "trainer.total_epochs": 30,
          "eval.temperature": 0, "checkpoint.every_steps": None, "checkpoint.keep": None, "trainer.eval_every": None,
          "algorithm.group_of_one": "reward", "algorithm.kl_coef": 0, "algorithm.kl_cov_coef": 0.1,
          "data.overlong": "error", "run.dir": "checkpoints/verl_examples", "run.name": "gsm8k",
          "run.project": "verl_examples",
          "trainer.trackers": [], "model.device": "auto", "model.dtype": "auto"}),
    # batches, in prompts
    ([f"{ACTOR}.ppo_mini_batch_size=4"], {"data.prompts_per_step": 16, "algorithm.minibatch_prompts": 4}),
    ([f"{ACTOR}.ppo_mini_batch_size=16"], {"algorithm.minibatch_prompts": None}),
    (["data.train_batch_size=1024"], {"algorithm.minibatch_prompts": 256}),
    ([f"{ACTOR}.use_dynamic_bsz=True", f"{ACTOR}.ppo_max_token_len_per_gpu=4096"],
     {"parallel.microbatch_tokens": 4096}),
    ([f"{ACTOR}.ppo_max_token_len_per_gpu=4096"], {"parallel.microbatch_tokens": 8192}),
    # the adapter
    (["actor_rollout_ref.model.target_modules=[q_proj,v_proj]", "actor_rollout_ref.model.exclude_modules='.*head.*'"],
     {"adapter.target_modules": ["q_proj", "v_proj"], "adapter.exclude_modules": ".*head.*"}),
    # KL
    ([f"{ACTOR}.use_kl_loss=True"],
     {"algorithm.kl_in": "loss", "algorithm.kl_coef": 0.001, "algorithm.kl_estimator": "low_var_kl"}),
    ([f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_type=k3+"], {"algorithm.kl_estimator": "low_var_kl+"}),
    (["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.kl_coef=0.2",
      "algorithm.kl_ctrl.target_kl=0.05", "algorithm.kl_ctrl.horizon=500"],
     {"algorithm.kl_in": "reward", "algorithm.kl_coef": 0.2, "algorithm.kl_estimator": "k1",
      "algorithm.kl_control": "adaptive", "algorithm.kl_target": 0.05, "algorithm.kl_horizon": 500}),
    # the loss
    ([f"{ACTOR}.clip_ratio=0.1"], {"algorithm.clip_low": 0.1, "algorithm.clip_high": 0.1}),
    ([f"{ACTOR}.clip_ratio=0.1", f"{ACTOR}.clip_ratio_high=0.28"],
     {"algorithm.clip_low": 0.1, "algorithm.clip_high": 0.28}),
    ([f"{ACTOR}.clip_ratio_c=10"], {"algorithm.clip_dual": 10, "algorithm.dppo_max_ratio": 10}),
    ([f"{ACTOR}.policy_loss.loss_mode=geo_mean"], {"algorithm.policy_loss": "gmpo"}),
    ([f"{ACTOR}.tau_neg=1.2", f"{ACTOR}.tau_pos=0.9"],
     {"algorithm.sapo_tau_negative": 1.2, "algorithm.sapo_tau_positive": 0.9}),
    (["algorithm.adv_estimator=gpg"], {"algorithm.advantage": "gpg_verl"}),
    (["algorithm.adv_estimator=gdpo", "algorithm.gdpo_reward_keys=[accuracy,format]",
      "algorithm.gdpo_reward_weights=[1,0.5]"],
     {"algorithm.advantage": "gdpo_verl", "algorithm.reward_weights": {"accuracy": 1.0, "format": 0.5}}),
    (["algorithm.adv_estimator=grpo_vectorized"], {"algorithm.advantage": "grpo"}),
    (["algorithm.norm_adv_by_std_in_grpo=False", f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm",
      f"{ACTOR}.loss_scale_factor=1024"],
     {"algorithm.normalize_std": False, "algorithm.aggregation": "seq-mean-token-sum-norm",
      "algorithm.aggregation_norm": 1024}),
    (["+algorithm.filter_groups.enable=True", f"{ROLLOUT}.n=8", "+algorithm.filter_groups.max_num_gen_batches=10",
      "+algorithm.filter_groups.metric=acc"], {"algorithm.dynamic_sampling": True, "algorithm.max_refills": 9}),
    # the optimizer
    ([f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1", "trainer.total_training_steps=50"], {"optim.warmup_steps": 5}),
    ([f"{ACTOR}.optim.lr_warmup_steps=7"], {"optim.warmup_steps": 7}),
    ([f"{ACTOR}.optim.warmup_style=cosine", f"{ACTOR}.optim.min_lr_ratio=null"],
     {"optim.schedule": "cosine", "optim.min_lr_ratio": 0.0}),
    ([f"{ACTOR}.grad_clip=0.3"], {"optim.max_grad_norm": 0.3}),
    ([f"{ACTOR}.optim.clip_grad=0.3"], {"optim.max_grad_norm": 0.3}),
    # rollout correction
    ([f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=0.5_5.0"],
     {"correction.importance": "token", "correction.lower": 0.5, "correction.upper": 5.0}),
    ([f"{CORRECTION}.rollout_rs=seq_mean_k1", f"{CORRECTION}.rollout_rs_threshold=0.999_1.001",
      f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.loss_type=reinforce"],
     {"correction.reject": ["seq_mean_k1:0.999_1.001"], "correction.bypass": True,
      "correction.bypass_loss": "reinforce"}),
    # data
    (["data.filter_overlong_prompts=True", "data.truncation=left"], {"data.overlong": "skip"}),
    (["data.truncation=left"], {"data.overlong": "truncate_left"}),
    (["algorithm.filter_groups=null"], {"algorithm.dynamic_sampling": False}),
    (["data.train_files=['a.parquet','b.parquet']", "data.val_files=null"],
     {"data.train": ["a.parquet", "b.parquet"], "data.val": None}),
    (["data.train_files='~/a.parquet'"], {"data.train": str(Path.home() / "a.parquet")}),
    (["+data.apply_chat_template_kwargs.enable_thinking=False"],
     {"data.chat_template_kwargs": {"enable_thinking": False}}),
    (["data.train_max_samples=100", "data.seed=7"], {"data.max_train_prompts": 100, "seed": 7}),
    ([f"+{ROLLOUT}.seed=3"], {"seed": 3}),
    # rewards, in both spellings
    (["custom_reward_function.path=r.py", "custom_reward_function.name=score",
      "+custom_reward_function.reward_kwargs.weight=2"],
     {"reward.path": "r.py", "reward.name": "score", "reward.kwargs": {"weight": 2}}),
    (["reward.custom_reward_function.path=r.py"], {"reward.path": "r.py", "reward.name": "compute_score"}),
    (["custom_reward_function.path=r.py", "reward.reward_manager.name=batch", "+reward_model.reward_kwargs.a.b=1"],
     {"reward.batched": True, "reward.kwargs": {"a": {"b": 1}}}),
    (["reward_model.reward_manager=dapo", "+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True",
      "+reward_model.reward_kwargs.overlong_buffer_cfg.len=128",
      "+reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor=0.5",
      "+reward_model.reward_kwargs.max_resp_len=${data.max_response_length}"],
     {"algorithm.overlong_buffer_tokens": 128, "algorithm.overlong_penalty": 0.5}),
    (["reward.reward_manager.name=dapo", "+reward.reward_kwargs={overlong_buffer_cfg:{enable:True,len:64}}"],
     {"algorithm.overlong_buffer_tokens": 64, "algorithm.overlong_penalty": 1.0}),
    (["reward_model.enable=True", "reward_model.model.path=rm"],
     {"reward_model.path": "rm", "reward_model.rule_weight": 0.0}),
    # PPO
    (["algorithm.adv_estimator=gae", "algorithm.lam=0.95", "critic.optim.lr=2e-5", "trainer.critic_warmup=3"],
     {"algorithm.advantage": "gae", "algorithm.lam": 0.95, "critic.lr": 2e-5, "critic.warmup_steps": 3,
      "critic.rank": None, "critic.weight_decay": 0.01, "critic.value_clip": 0.5}),
    (["algorithm.adv_estimator=gae", "critic.model.lora_rank=8", f"{ACTOR}.ppo_epochs=2"],
     {"critic.rank": 8, "critic.alpha": 16, "critic.epochs": 2}),
    # validation
    ([f"{ROLLOUT}.val_kwargs.n=4", f"{ROLLOUT}.val_kwargs.temperature=0.6", f"{ROLLOUT}.val_kwargs.do_sample=True"],
     {"eval.n": 4, "eval.temperature": 0.6}),
    # the run
    ([f"{ROLLOUT}.name=hf"], {"rollout.engine": "torch"}),
    ([f"{ROLLOUT}.max_num_batched_tokens=1536", f"{ROLLOUT}.max_num_seqs=512", f"{ROLLOUT}.enforce_eager=True",
      f"{ROLLOUT}.enable_prefix_caching=False", f"{ROLLOUT}.free_cache_engine=False",
      f"{ROLLOUT}.gpu_memory_utilization=0.3"],
     {"rollout.max_batched_tokens": 1536, "rollout.max_concurrent": 512, "rollout.enforce_eager": True,
      "rollout.prefix_caching": False, "rollout.rest": "never", "rollout.memory_fraction": 0.3}),
    ([f"+{ROLLOUT}.engine_kwargs.vllm.max_loras=2", f"+{ROLLOUT}.engine_kwargs={{vllm:{{max_num_seqs:64}}}}",
      f"+{ROLLOUT}.engine_kwargs.vllm.enforce_eager=True"],
     {"rollout.adapter_slots": 2, "rollout.max_concurrent": 64, "rollout.enforce_eager": True}),
    ([f"{ROLLOUT}.engine_kwargs.vllm={{}}", f"{ROLLOUT}.free_cache_engine=True"],
     {"rollout.adapter_slots": 1, "rollout.rest": "auto", "rollout.memory_fraction": None,
      "rollout.max_batched_tokens": 8192}),
    (["trainer.logger=['console','file','wandb','tensorboard']"], {"trainer.trackers": ["wandb", "tensorboard"]}),
    (["trainer.logger=console"], {"trainer.trackers": []}),
    (["trainer.default_local_dir=out/${trainer.project_name}/x1"], {"run.dir": "out/verl_examples", "run.name": "x1"}),
    (["trainer.experiment_name=1e5"], {"run.name": "1e5"}),
    (["trainer.resume_mode=disable"], {"resume": "never"}),
    (["trainer.resume_mode=resume_path", "trainer.resume_from_path=runs/a/checkpoints/step-3"],
     {"resume": "runs/a/checkpoints/step-3"}),
    (["trainer.nnodes=2", "trainer.n_gpus_per_node=8"],
     {"parallel.gpus": 8, "parallel.nodes": 2, "parallel.sequence": 1}),
    (["trainer.n_gpus_per_node=8", f"{ACTOR}.ulysses_sequence_parallel_size=4"], {"parallel.sequence": 4}),
    (["actor_rollout_ref.nccl_timeout=1200"], {"parallel.collective_limit_s": 1200}),
    (["+lorl.algorithm.reference=base", "+lorl.adapter.dropout=0.1"],
     {"algorithm.reference": "base", "adapter.dropout": 0.1}),
    (["algorithm.filter_groups.enable=True", "~algorithm.filter_groups"], {"algorithm.dynamic_sampling": False}),
    (["~actor_rollout_ref.model.lora_rank", "actor_rollout_ref.model.lora_rank=8"], {"adapter.rank": 8}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), MEANINGS)
def test_meaning(words: list[str], expected: dict[str, Any]):
    found = config(*words)
    assert {key: value(found, key) for key in expected} == expected
    if not found.trainer.trackers and found.parallel.gpus * found.parallel.nodes == 1:
        check(found)  # the start of training has nothing against it either


def test_an_adapter_to_start_from_needs_no_rank_and_is_the_reference():
    words = ["actor_rollout_ref.model.lora_adapter_path=a", f"{ACTOR}.use_kl_loss=True", "data.train_batch_size=16"]
    translation = translate(words)
    assert translation.config.adapter.path == "a"
    assert translation.config.algorithm.reference == "start"
    assert any("+lorl.algorithm.reference=base" in line for line in translation.notes)


@pytest.mark.parametrize(("version", "usable"), [("0.24.0", True), ("0.32.1", True), ("0.23.0", False), (None, False)])
def test_vllm_is_the_engine_where_lorl_knows_the_one_installed_and_the_log_says_where_not(
    monkeypatch: pytest.MonkeyPatch, version: str | None, usable: bool
):
    monkeypatch.setattr(versions, "installed", lambda: version and Version(version))
    translation = translate([*SMALL, f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.enforce_eager=True"])
    assert translation.config.rollout.engine == ("vllm" if usable else "auto")
    assert translation.config.rollout.enforce_eager
    said = [line for line in translation.notes if f"{ROLLOUT}.name=vllm: rollout.engine=auto" in line]
    idle = [line for line in translation.notes if f"{ROLLOUT}.enforce_eager" in line]
    assert len(said) == len(idle) == (0 if usable else 1)
    if not usable:
        assert (version or "not installed") in said[0]
        assert "only rollout.engine=vllm" in idle[0]


def test_vllm_is_the_engine_of_several_gpus_unless_they_split_passes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "installed", lambda: Version("0.24.0"))
    words = [*SMALL[:-1], "trainer.n_gpus_per_node=4", f"{ROLLOUT}.name=vllm"]
    assert translate(words).config.rollout.engine == "vllm"
    translation = translate([*words, f"{ACTOR}.ulysses_sequence_parallel_size=2"])
    assert translation.config.rollout.engine == "auto"
    assert any("rollout.engine=auto, since 2 ranks split each pass" in line for line in translation.notes)


def test_the_embedded_engine_is_told_which_keys_were_vllms():
    notes = translate([*SMALL, f"{ROLLOUT}.name=hf", f"{ROLLOUT}.free_cache_engine=False"]).notes
    assert any(f"{ROLLOUT}.free_cache_engine (only rollout.engine=vllm" in line for line in notes)


def test_the_share_of_memory_is_told_to_be_the_caches_alone():
    notes = translate([*SMALL, f"{ROLLOUT}.gpu_memory_utilization=0.4"]).notes
    assert any("gpu_memory_utilization=0.4: rollout.memory_fraction=0.4, for the KV cache" in line for line in notes)
    assert not any("memory_fraction" in line for line in translate(SMALL).notes)


def test_what_has_no_effect_is_named_with_its_reason():
    notes = translate([*SMALL, f"{ACTOR}.ppo_micro_batch_size_per_gpu=4", f"{ACTOR}.kl_loss_coef=0.1"]).notes
    assert any("ppo_micro_batch_size_per_gpu" in line and "microbatch_tokens" in line for line in notes)
    assert any("kl_loss_coef" in line and "use_kl_loss is False" in line for line in notes)


def test_a_mistake_is_answered_without_torch():
    code = (
        "import sys\nfrom lorl.errors import UserError\nfrom lorl.verl import translate\n"
        "try:\n    translate(['data.train_file=x'])\nexcept UserError as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'data.train_files'" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_decisive_defaults_of_verl_are_told():
    notes = translate(SMALL).notes
    assert any("actor_rollout_ref.actor.optim.lr=1e-06" in line for line in notes)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["custom_reward_function.path=a.py", "reward.custom_reward_function.path=b.py"], ["two spellings"]),
        (["custom_reward_function.path=pkg://m"], ["custom_reward_function.path=pkg://m", ".py file"]),
        (["custom_reward_function.name=f"], ["custom_reward_function.name=f", "path"]),
        (["reward.reward_manager.name=batch"], ["batch", "custom_reward_function.path"]),
        (["+reward_model.reward_kwargs.foo=1"], ["reward_kwargs.foo", "naive"]),
        (
            ["+reward_model.reward_kwargs.overlong_buffer_cfg.enable=True"],
            ["overlong_buffer_cfg.enable=true", "dapo"],
        ),
        (["reward_model.enable=True"], ["reward_model.enable=true", "model_path"]),
        ([f"{ACTOR}.use_kl_loss=True", "algorithm.use_kl_in_reward=True"], ["use_kl_in_reward=true", "one place"]),
        ([f"{ACTOR}.kl_loss_type=full"], ["kl_loss_type=full", "logits"]),
        ([f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1"], ["lr_warmup_steps_ratio=0.1", "trainer.total_training_steps"]),
        ([f"{ACTOR}.grad_clip=1", f"{ACTOR}.optim.clip_grad=2"], ["clip_grad=2", "contradicts", "grad_clip=1"]),
        ([f"{CORRECTION}.rollout_rs=seq_mean_k9", f"{CORRECTION}.rollout_rs_threshold=2"], ["seq_mean_k9", "seq_mean"]),
        ([f"{CORRECTION}.rollout_rs=seq_mean_k1"], ["rollout_rs_threshold"]),
        ([f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=-1"], ["rollout_is_threshold"]),
        ([f"{ROLLOUT}.val_kwargs.n=4"], ["val_kwargs.n=4", "val_kwargs.temperature"]),
        (
            [f"{ROLLOUT}.val_kwargs.temperature=0.5", f"{ROLLOUT}.val_kwargs.do_sample=False"],
            ["val_kwargs.temperature=0.5", "greedily"],
        ),
        ([f"{ROLLOUT}.response_length=9"], ["response_length=9", "data.max_response_length=512"]),
        ([f"{ROLLOUT}.temperature=0", f"{ROLLOUT}.n=4"], ["rollout.n=4", f"rollout.n is {ROLLOUT}.n"]),
        ([f"{ROLLOUT}.multi_turn.enable=True"], ["multi_turn.enable=true", "one turn"]),
        ([f"+{ROLLOUT}.engine_kwargs.vllm.seed=1"], ["engine_kwargs.vllm.seed", "nothing through"]),
        (
            [f"+{ROLLOUT}.engine_kwargs.vllm.enforce_eager=True", f"{ROLLOUT}.enforce_eager=False"],
            [f"{ROLLOUT}.enforce_eager=false", "engine_kwargs.vllm.enforce_eager=true", "two spellings"],
        ),
        ([f"{ROLLOUT}.quantization=fp8"], ["rollout.quantization=fp8", "very weights"]),
        ([f"{ROLLOUT}.logprobs_mode=raw_logprobs"], ["logprobs_mode=raw_logprobs", "before top_k"]),
        (["actor_rollout_ref.model.lora.rank=16"], ["actor_rollout_ref.model.lora.rank", "lora_rank"]),
        (["critic.enable=True"], ["critic.enable=true", "adv_estimator=grpo", "no use"]),
        (["algorithm.adv_estimator=gae", "critic.model.lora_rank=0"], ["critic.model.lora_rank=0", "adapter"]),
        (["algorithm.adv_estimator=gae", "critic.model.path=other"], ["critic.model.path=other", "actor's base"]),
        (["trainer.resume_from_path=x"], ["resume_from_path=x", "resume_path"]),
        (["trainer.logger=[swanlab]"], ["'swanlab'", "wandb"]),
        (["trainer.experiment_name='a b'"], ["trainer.experiment_name", "letters"]),
        (["algorithm.filter_groups.enable=True", "algorithm.filter_groups.max_num_gen_batches=1"], ["no refill"]),
        (["+lorl.adapter.rnk=3"], ["adapter.rnk", "adapter.rank"]),
        (["data.val_batch_size=${data.train_batch_sizes}"], ["data.val_batch_size", "train_batch_sizes"]),
        (["actor_rollout_ref.actor.optim=3"], ["unknown key"]),
        (["+data.apply_chat_template_kwargs.a=1", "+data.apply_chat_template_kwargs.a.b=2"], ["a is 1 already"]),
        (["data.apply_chat_template_kwargs=3"], ["expected a mapping"]),
        (["algorithm.adv_estimator=ppo"], ["PPO's estimator is gae"]),
    ],
)
def test_what_cannot_hold_is_refused_by_name(words: list[str], parts: list[str]):
    message = refusal(*words)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: file.name)
def test_every_example_is_a_valid_configuration(file: Path):
    assert settings.load(file).data.train
