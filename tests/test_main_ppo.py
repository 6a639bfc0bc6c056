"""`python -m lorl.main_ppo` as people run it: verl's command lines in, a run, a YAML or one sentence out."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lorl import settings
from lorl.data.gsm8k import write_gsm8k
from lorl.rollout.vllm import versions

RUNS: dict[str, list[str]] = json.loads((Path(__file__).parent / "data" / "verl_runs.json").read_text())
GRPO = RUNS["grpo_trainer/run_qwen2_5-3b_gsm8k_grpo_lora"]


def main_ppo(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorl.main_ppo", *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("name", RUNS)
def test_every_run_of_verl_prints_a_configuration_that_lorl_reads(name: str, tmp_path: Path):
    done = main_ppo(*RUNS[name], "--print-config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run.yaml").write_text(done.stdout)
    config = settings.load(tmp_path / "run.yaml")
    words = dict(word.split("=", 1) for word in RUNS[name])
    assert config.data.prompts_per_step == int(words["data.train_batch_size"])
    assert config.rollout.n == int(words["actor_rollout_ref.rollout.n"])
    assert config.optim.lr == float(words["actor_rollout_ref.actor.optim.lr"])
    if "lora_adapter_path" in str(words):
        assert config.adapter.path == "/path/saved/lora_adapter"
    else:
        assert config.adapter.rank == int(words["actor_rollout_ref.model.lora_rank"])
    assert config.parallel.gpus == int(words.get("trainer.n_gpus_per_node", 8))
    assert list(tmp_path.iterdir()) == [tmp_path / "run.yaml"]


def test_the_half_billion_run_trains_with_no_key_changed_but_model_data_and_lengths(tiny_model: Path, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"question": f"{i} and {i}?", "answer": f"{i}+{i} #### {2 * i}"} for i in range(count)]
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = write_gsm8k(source, tmp_path / "gsm8k")
    changes = [
        f"actor_rollout_ref.model.path={tiny_model}",
        f"data.train_files={files['train']}",
        f"data.val_files={files['test']}",
        "data.max_prompt_length=256",
        "data.max_response_length=16",
    ]
    if importlib.util.find_spec("wandb") is None:  # an extra of lorl's, which the script asks for
        changes.append('trainer.logger=["console"]')
    if versions.installed() is not None:  # whose runs are tests/rollout/vllm's, on models that it has kernels for
        changes.append("+lorl.rollout.engine=torch")
    changed = {word.partition("=")[0] for word in changes}
    words = [word for word in RUNS["tuning/0.5b"] if word.partition("=")[0] not in changed]

    done = main_ppo(*words, *changes, cwd=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "checkpoints" / "gsm8k-grpo-lora-qwen2.5-0.5b-DATE" / "0.5b-DATE"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics][-1] == 3
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    adapter = load_file(run / "checkpoints" / "step-3" / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["adapter"]["rank"], config["optim"]["lr"], config["rollout"]["n"]) == (32, 3e-5, 1)
    assert "without effect here: " in done.stdout
    assert "actor_rollout_ref.rollout.gpu_memory_utilization=0.1: rollout.memory_fraction=0.1" in done.stdout


def test_what_is_said_of_ray_and_collectives_fits_a_run_of_several_processes(tmp_path: Path):
    words = ["trainer.nnodes=2", "actor_rollout_ref.nccl_timeout=1200", "+ray_kwargs.ray_init.num_cpus=8"]
    done = main_ppo(*GRPO, *words, "--print-config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    parallel = yaml.safe_load(done.stdout)["parallel"]
    assert (parallel["gpus"], parallel["nodes"], parallel["collective_limit_s"]) == (2, 2, 1200)
    assert "nccl_timeout" not in done.stderr
    (said,) = (line for line in done.stderr.splitlines() if "ray_kwargs.ray_init.num_cpus" in line)
    assert "starts Ray itself where there are several GPUs" in said
    assert "RAY_ADDRESS" in said


def test_what_the_start_refuses_is_said_in_verls_names(tmp_path: Path):
    done = main_ppo(*GRPO, "+lorl.parallel.strategy=local", cwd=tmp_path)
    assert done.returncode == 2
    assert "parallel.gpus=2" in done.stderr
    assert "parallel.gpus is trainer.n_gpus_per_node" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# What is wrong -> what the one sentence has to name.
WRONG = {
    "actor_rollout_ref.actor.optim.lr_warmup_step=5": [
        "unknown key",
        "'actor_rollout_ref.actor.optim.lr_warmup_steps'",
    ],
    "actor_rollout_ref.actor.lr=1e-5": ["unknown key", "'actor_rollout_ref.actor.optim.lr'"],
    "actor_rollout_ref.model.lora_rnk=32": ["unknown key", "'actor_rollout_ref.model.lora_rank'"],
    "actor_rollout_ref.modle.path=x": ["unknown key", "'actor_rollout_ref.model.path'"],
    "data.train_file=x.parquet": ["unknown key", "'data.train_files'"],
    "trainer.total_epoch=1": ["unknown key", "'trainer.total_epochs'"],
    "+algorithm.filter_group.enable=True": ["unknown key", "'algorithm.filter_groups.enable'"],
    "++custom_reward_function.pth=reward.py": ["unknown key", "'custom_reward_function.path'"],
    "actor_rollout_ref.actor.optim.lr=fast": ["actor_rollout_ref.actor.optim.lr=fast", "a number > 0"],
    "actor_rollout_ref.model.lora_rank=-8": ["lora_rank=-8", "a whole number >= 0"],
    "actor_rollout_ref.model.lora_rank=0": ["lora_rank=0", "full fine-tuning", "lora_rank=32"],
    "actor_rollout_ref.rollout.gpu_memory_utilization=1.5": ["gpu_memory_utilization=1.5", "> 0 and < 1"],
    "actor_rollout_ref.rollout.top_p=0": ["top_p=0", "> 0 and <= 1"],
    "actor_rollout_ref.actor.clip_ratio_c=0.5": ["clip_ratio_c=0.5", "> 1"],
    "data.train_batch_size=sixteen": ["data.train_batch_size=sixteen", "a whole number"],
    "data.shuffle=maybe": ["data.shuffle=maybe", "true or false"],
    "actor_rollout_ref.actor.ppo_mini_batch_size=5": ["ppo_mini_batch_size=5", "data.train_batch_size=16", "is 4"],
    "actor_rollout_ref.actor.ppo_mini_batch_size=32": ["ppo_mini_batch_size=32", "more than data.train_batch_size=16"],
    "actor_rollout_ref.rollout.tensor_model_parallel_size=3": ["tensor_model_parallel_size=3", "2 GPUs"],
    "actor_rollout_ref.rollout.max_model_len=512": ["max_model_len=512", "1536"],
    "actor_rollout_ref.rollout.name=sglang": ["rollout.name=sglang", "no SGLang", "engines.md", "vllm, hf"],
    "actor_rollout_ref.rollout.name=vlm": ["rollout.name=vlm", "did you mean 'vllm'?"],
    "actor_rollout_ref.actor.strategy=megatron": ["strategy=megatron", "no Megatron", "fsdp, fsdp2"],
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2": ["actor.megatron.tensor_model", "no Megatron"],
    "actor_rollout_ref.actor.strategy=fsdp3": ["strategy=fsdp3", "fsdp, fsdp2", "did you mean 'fsdp"],
    "algorithm.adv_estimator=gpro": ["adv_estimator=gpro", "did you mean 'grpo'?"],
    "actor_rollout_ref.actor.loss_agg_mode=token_mean": ["loss_agg_mode=token_mean", "did you mean 'token-mean'?"],
    "data.image_key=images": ["data.image_key=images", "text only"],
    "reward_model.reward_manager=prime": ["reward_model.reward_manager=prime", "no PRIME", "naive, dapo, batch"],
    "trainer.device=npu": ["trainer.device=npu", "CUDA and CPU"],
    "--config-name=ppo_megatron_trainer": ["--config-name", "key=value"],
    "algorithm.adv_estimator": ["algorithm.adv_estimator", "key=value"],
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_line_gets_one_sentence_and_exit_code_2(word: str, tmp_path: Path):
    done = main_ppo(*GRPO, word, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for part in WRONG[word]:
        assert part in done.stderr


def test_help_says_how_to_go_on(tmp_path: Path):
    done = main_ppo("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--print-config" in done.stdout
