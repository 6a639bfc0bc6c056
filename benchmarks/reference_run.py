"""verl's reference run for 72B on 8 GPUs, through `python -m lorl.main_ppo`, on CPU processes and a model cut to size.

    PYTHONPATH=src python benchmarks/reference_run.py [--ranks 8] [--steps 2] [key=value ...]

The run's own overrides stand as they are (`scaling.REFERENCE`); `overrides` lists what is added for paths, sizes and
the CPU. The model has Qwen2.5-72B's architecture and numbers of heads with 4 layers, narrow ones, and random weights:
what is shown is that the command line runs, not that anything is learnt. docs/scaling.md has the same run's bytes at
its true size. Further words are verl's keys too, such as +lorl.parallel.strategy=fsdp2.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from conftest import save_tiny_model  # noqa: E402
from lorl.data.gsm8k import write_gsm8k  # noqa: E402
from lorl_command import ENVIRONMENT  # noqa: E402
from scaling import REFERENCE  # noqa: E402

SHAPE = {  # Qwen2.5-72B: 80 layers of 8192 and 29568, 64 heads of 128, 8 of them with keys
    "hidden_size": 512,
    "intermediate_size": 1848,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    "Random weights answer no question: different letters are something that samples differ in."
    return len(set(solution_str)) / 16
"""
RUN = "checkpoints/verl_examples/gsm8k"  # verl's defaults
TENSOR_PARALLEL = "actor_rollout_ref.rollout.tensor_model_parallel_size"
COLUMNS = {
    "reward": "reward/mean",
    "gradient": "policy/grad_norm",
    "engine - trainer": "rollout/mismatch",
    "answer, tokens": "rollout/response_tokens_mean",
    "s": "time/step_s",
}


def overrides(folder: Path, ranks: int, steps: int) -> list[str]:
    """What is added to the run's own words: paths, then sizes, then the CPU."""
    return [
        f"actor_rollout_ref.model.path={folder}/model",
        f"data.train_files={folder}/gsm8k/train.parquet",
        f"data.val_files={folder}/gsm8k/test.parquet",
        f"custom_reward_function.path={folder}/reward.py",
        f"trainer.total_training_steps={steps}",
        "data.max_response_length=16",
        "trainer.device=cpu",
        "+lorl.rollout.engine=auto",  # on a CPU the embedded engine, whether vLLM is installed or not
        *([] if ranks == 8 else [f"trainer.n_gpus_per_node={ranks}", f"{TENSOR_PARALLEL}={ranks}"]),
    ]


def prepare(folder: Path, prompts: int) -> None:
    """The model, rows in GSM8K's layout and the reward, in `folder`."""
    save_tiny_model(folder / "model", "qwen2", **SHAPE)
    (folder / "reward.py").write_text(REWARD)
    source = folder / "source"
    source.mkdir()
    for split, count in (("train", prompts), ("test", 8)):
        rows = [{"question": f"What is {i} and {i}?", "answer": f"{i}+{i} #### {2 * i}"} for i in range(count)]
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_gsm8k(source, folder / "gsm8k")


def run(folder: Path, ranks: int, steps: int, more: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """The command, in `folder`, which `prepare` has filled."""
    added = [*overrides(folder, ranks, steps), *more]
    changed = {word.partition("=")[0] for word in added}
    words = [*(word for word in REFERENCE if word.partition("=")[0] not in changed), *added]
    path = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "lorl.main_ppo", *words],
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / RUN / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["step"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("words", nargs="*", metavar="key=value")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, prompts=64 * asked.steps)
        done = run(folder, asked.ranks, asked.steps, asked.words)
        if done.returncode:
            sys.exit(f"{done.stdout}\n{done.stderr}")
        print(
            "added to the run's own words:", *overrides(Path("DIR"), asked.ranks, asked.steps), *asked.words, sep="\n  "
        )
        print(
            *(line for line in done.stdout.splitlines() if "parallel.strategy" in line or " ranks on " in line),
            sep="\n",
        )
        print("step", *(f"{column:>17}" for column in COLUMNS))
        for row in steps_of(folder):
            print(f"{row['step']:>4}", *(f"{row.get(metric, float('nan')):17.4g}" for metric in COLUMNS.values()))


if __name__ == "__main__":
    main()
