"""verl's reference run (`scaling.REFERENCE`) on several GPUs of one machine, by strategy, beside `lorl plan`.

    python benchmarks/many_gpus.py --gpus 4 --shape 32b [--runs one ddp shared fsdp2] [--words key=value ...]

Each run is a `python -m lorl.main_ppo` of its own, with the reference's words but for the model, the data, their
lengths and the number of GPUs. Random weights of true size are drawn on the devices: nothing of that size is read. The
runs are `one` (a single GPU), `ddp` (a whole base and engine on each), `shared` (one tensor-parallel vLLM over the
trainer's own parts), `fsdp2` (the trainer's parts by FSDP2, and beside them a tensor-parallel vLLM with a copy of the
base, as verl has it). That all ranks hold the same adapter is checked at every publish, or the run ends. Short table
last; its memory, in GiB of the fullest GPU: what torch held at most, what nvidia-smi saw at most (start and capture
included), and the peak that `lorl plan` says.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from datasets import Dataset

from _planned import InUse, nvidia_smi, plan_of
from engine_gpu import LETTERS, SHAPES, device_name, model_folder
from lorl.plan.hardware import GIB
from scaling import REFERENCE

COLUMNS = {
    "step s": "time/step_s", "rollout": "time/rollout_s", "update": "time/update_s", "publish": "time/publish_s",
    "its copy": "time/publish_copy_s",
    "rollout tok/s": "throughput/rollout_tokens_per_s", "peak GiB": "memory/peak_gib", "mismatch": "rollout/mismatch",
}  # fmt: skip
RUNS = {"one": "auto", "ddp": "ddp", "shared": "shared", "fsdp2": "fsdp2"}  # parallel.strategy
ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"


def words(args: argparse.Namespace, folder: Path, name: str) -> list[str]:
    """The command line of the run `name`: the reference's words, and those that this machine and its model ask for."""
    gpus = 1 if name == "one" else args.gpus
    own = [
        f"actor_rollout_ref.model.path={folder / 'model'}", "+lorl.model.random_weights=true",
        f"data.train_files={folder / 'train.parquet'}", f"data.train_batch_size={args.prompts}",
        f"data.max_prompt_length={args.prompt + 8}", f"data.max_response_length={args.response}",
        f"custom_reward_function.path={folder / 'rule.py'}", f"trainer.n_gpus_per_node={gpus}",
        f"{ROLLOUT}.tensor_model_parallel_size={gpus}", f"{ACTOR}.fsdp_config.fsdp_size={gpus}",
        f"{ROLLOUT}.n={args.samples}", f"{ROLLOUT}.ignore_eos=True", f"{ROLLOUT}.enforce_eager={args.eager}",
        f"trainer.total_training_steps={args.steps}", "trainer.val_before_train=False", "+lorl.data.val=null",
        f"+lorl.parallel.strategy={RUNS[name]}", "+lorl.rollout.engine=vllm", "+lorl.rollout.adapter_mode=adapter",
        "+lorl.rollout.max_mismatch=1",  # many layers of random weights amplify what bfloat16 rounds
        f"+lorl.run.dir={folder}", f"+lorl.run.name={name}", *args.words,
    ]  # fmt: skip
    given = {word.partition("=")[0] for word in own}
    return [*(word for word in REFERENCE if word.partition("=")[0] not in given), *own]


def measured(args: argparse.Namespace, folder: Path, name: str) -> str:
    """A run's line in the table: medians of its steps but the first."""
    command = [sys.executable, "-m", "lorl.main_ppo", *words(args, folder, name)]
    with InUse() as in_use:
        try:
            code = str(subprocess.run(command, timeout=args.limit).returncode)
        except subprocess.TimeoutExpired:
            code = f"the limit of {args.limit:g} s"
    metrics = folder / name / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    rows = [row for row in rows if row["step"] > 1]
    medians = [
        statistics.median(row.get(key, float("nan")) for row in rows) if rows else float("nan")
        for key in COLUMNS.values()
    ]
    if metrics.parent.exists() and nvidia_smi("name"):
        planned = plan_of(folder / name / "config.yaml").memory.peak / GIB
    else:
        planned = float("nan")
    cells = [f"{value:14.4g}" for value in [*medians, in_use.gib, planned]]
    return f"{name:8}{''.join(cells)}" + ("" if code == "0" else f"  ended with {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--response", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: starts sooner")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one run may take")
    parser.add_argument("--words", nargs="*", default=[], help="more of verl's key=value for every run")
    args = parser.parse_args()
    draw = random.Random(0)
    table: list[str] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        folder = Path(scratch)
        model_folder(args.shape, folder / "model")
        prompts = ["".join(draw.choice(LETTERS) for _ in range(args.prompt)) for _ in range(args.prompts * args.steps)]
        rows = [
            {"data_source": "letters", "prompt": [{"role": "user", "content": prompt}], "ability": "none",
             "reward_model": {"style": "rule", "ground_truth": "a"}, "extra_info": {"index": index}}
            for index, prompt in enumerate(prompts)
        ]  # fmt: skip
        Dataset.from_list(rows).to_parquet(folder / "train.parquet")
        (folder / "rule.py").write_text("import random\ndef compute_score(*a, **k):\n    return random.random()\n")
        for name in args.runs:
            table.append(measured(args, folder, name))
            print(table[-1], flush=True)
    print(f"\n{args.gpus} x {device_name()}, {args.shape}, {args.prompts} x {args.samples}, "
          f"{args.prompt} + {args.response} tokens")  # fmt: skip
    titles = [*COLUMNS, "in use GiB", "planned GiB"]
    print("\n".join([f"{'run':8}" + "".join(f"{title:>14}" for title in titles), *table]))


if __name__ == "__main__":
    main()
