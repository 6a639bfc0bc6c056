"""A whole GRPO step on one GPU, beside its floor measured in the same process, and beside TRL's in another.

    python benchmarks/step_gpu.py lorl     rollouts by vLLM on the shared base; the floor after every step
    python benchmarks/step_gpu.py trl      TRL's GRPOTrainer with colocated vLLM, on the same work

The work: prompts of 256 tokens, 8 answers each, of 512 tokens whatever the model says, on-policy, an adapter of rank 32
on all linear layers, Qwen2.5's 1.5B shape with random bf16 weights. The floor is vLLM's own generation with the
adapter, no log-probabilities, and a forward and backward pass over the same number of tokens packed in the same way: no
rewards, no publish, no optimizer, no proof. It is measured after every step. Medians of all but the first.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from engine_gpu import GIB, LETTERS, bare, device_name, model_folder, model_keys, sync
from forest_gpu import train as train_pass
from lorl import settings
from lorl.config import RunConfig
from lorl.experience import Completion, Outcome, Prompt
from lorl.packing import cut, pack, select
from lorl.policy.load import TRAINED
from lorl.policy.policy import Policy
from lorl.rollout.vllm import shared
from lorl.rollout.vllm.engine import VllmEngine
from lorl.tracking.console import Console
from lorl.worker import Worker

SAMPLES = 8
PHASES = ("rollout", "estimate", "update", "publish", "step")


def rows(args: argparse.Namespace) -> list[dict[str, str]]:
    """A prompt a row; the tokenizer makes a token of each letter."""
    draw = random.Random(0)
    count = args.prompts * (args.steps + 1)
    return [{"prompt": "".join(draw.choice(LETTERS) for _ in range(args.prompt)), "answer": "a"} for _ in range(count)]


def generation_floor(engine: VllmEngine, args: argparse.Namespace, seed: int) -> float:
    """Seconds of vLLM's own rollout of one step: groups share their prompt's cache, as lorl's do."""
    draw = random.Random(seed)
    asked = [Prompt(f"p{i}", [draw.randrange(2, 258) for _ in range(args.prompt)], "") for i in range(args.prompts)]
    return bare(engine, [prompt for prompt in asked for _ in range(SAMPLES)], args.response, None, True)


def pass_floor(policy: Policy, args: argparse.Namespace, budget: int) -> float:
    """Seconds of forward and backward over one step's tokens, log-probabilities included."""
    draw = random.Random(1)
    answers = []
    for group in range(args.prompts):
        prompt = Prompt(f"p{group}", [draw.randrange(2, 258) for _ in range(args.prompt)], "")
        for sample in range(SAMPLES):
            tokens = [draw.randrange(2, policy.config.vocab_size) for _ in range(args.response)]
            answers.append(Completion(prompt, sample, tokens, [0.0] * len(tokens), "", "length", 1))
    experience = pack(answers, [Outcome("ok", 0.0)] * len(answers))
    parts = [select(experience, part).forest for part in cut(experience, torch.arange(len(answers)), budget)]
    sync()
    started = time.perf_counter()
    for forest in parts:
        train_pass(policy, forest.to(policy.device))
    sync()
    seconds = time.perf_counter() - started
    for parameter in policy.parameters(TRAINED).values():
        parameter.grad = None
    return seconds


class FloorBetweenSteps(Console):
    """Measures a step's floor right after the step: a machine's processors are not as fast at all times."""

    def __init__(self, args: argparse.Namespace, engines: list[tuple[Policy, VllmEngine]], budget: int) -> None:
        super().__init__(sys.stdout)
        self._args, self._engines, self._budget = args, engines, budget
        self.generation: list[float] = []  # seconds after each step, as the passes'
        self.passes: list[float] = []

    def step(self, step: int, metrics: dict[str, float], total: int | None = None) -> None:
        super().step(step, metrics, total)
        if self._args.skip_floor:
            return
        policy, engine = self._engines[0]
        engine.wake()
        self.generation.append(generation_floor(engine, self._args, step))
        engine.rest()
        self.passes.append(pass_floor(policy, self._args, self._budget))


def lorl_side(args: argparse.Namespace, folder: Path) -> None:
    from lorl.setup import train

    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(args)))
    (folder / "rule.py").write_text("import random\ndef compute_score(*a, **k):\n    return random.random()\n")
    config = settings.load(None, [
        *model_keys(args, folder), "rollout.engine=vllm", f"data.train='{folder / 'train.jsonl'}'",
        f"data.prompts_per_step={args.prompts}", f"rollout.n={SAMPLES}", f"data.max_prompt_tokens={args.prompt + 8}",
        f"rollout.max_response_tokens={args.response}", f"rollout.max_concurrent={args.prompts * SAMPLES}",
        "rollout.ignore_eos=true", f"reward.path='{folder / 'rule.py'}'", f"trainer.total_steps={args.steps}",
        "checkpoint.every_steps=null", f"run.dir='{folder}'", "run.name=run", *args.keys,
    ])  # fmt: skip
    engines: list[tuple[Policy, VllmEngine]] = []

    def start(config: RunConfig, tokenizer: Any, tell: Any) -> Worker:
        engines.append(shared.policy_and_engine(config, tokenizer, tell))
        return Worker(config, *engines[0])

    console = FloorBetweenSteps(args, engines, config.parallel.microbatch_tokens)
    train(config, console, start)
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    phases = {name: [row[f"time/{name}_s"] for row in metrics if row["step"]] for name in PHASES}
    print(f"\nlorl, {device_name()}, {args.prompts} x {SAMPLES}, {args.prompt} + {args.response} tokens, {args.shape}")
    phases |= {"floor: gen": console.generation, "and pass": console.passes}
    phases["floor"] = [sum(both) for both in zip(console.generation, console.passes, strict=True)]
    ratios = [step / floor for step, floor in zip(phases["step"], phases["floor"], strict=False)]
    for name, values in {**phases, "step/floor": ratios}.items():
        if values:
            print(f"{name:11} {statistics.median(values[1:]):6.3f}   {[round(value, 2) for value in values]}")
    print(f"mismatch    {metrics[-1]['rollout/mismatch']:.4f}")
    report_memory()


def report_memory() -> None:
    if not torch.cuda.is_available():
        return
    free, total = torch.cuda.mem_get_info()
    print(
        f"torch's peak {torch.cuda.max_memory_allocated() / GIB:.1f} GiB, reserved "
        f"{torch.cuda.max_memory_reserved() / GIB:.1f}; device {total / GIB:.1f}, in use {(total - free) / GIB:.1f} GiB"
    )


def trl_side(args: argparse.Namespace, folder: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            sync()
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            print(f"TRL step {len(self.seconds)}: {self.seconds[-1]:.2f} s", flush=True)
            self.last = now

    path = model_folder(args.shape, folder / "model")
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    model.save_pretrained(path)
    del model
    torch.cuda.empty_cache()
    micro = args.trl_micro_batch
    passes = args.prompts * SAMPLES // micro
    settings_of_trl = GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=args.steps, per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes, steps_per_generation=passes, num_generations=SAMPLES, num_iterations=1,
        beta=0.0, max_completion_length=args.response, temperature=1.0, learning_rate=3e-5, bf16=True,
        gradient_checkpointing=False, use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=args.prompt + args.response + 8, generation_kwargs={"ignore_eos": True},
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "sdpa"}, logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
    lengths: set[int] = set()

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.update(map(len, completion_ids))
        return [random.random() for _ in completion_ids]

    clock = Clock()
    trainer = GRPOTrainer(
        model=str(path), reward_funcs=rewards, args=settings_of_trl,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows(args)]),
        processing_class=AutoTokenizer.from_pretrained(path), callbacks=[clock],
        peft_config=LoraConfig(r=32, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    print(f"\nTRL, {device_name()}, {args.prompts} x {SAMPLES}, answers of {sorted(lengths)} tokens, {args.shape}")
    print(f"step       {statistics.median(clock.seconds[1:]):6.2f} s   {[round(s, 2) for s in clock.seconds]}")
    report_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["lorl", "trl"])
    parser.add_argument("--shape", default="1.5b")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--response", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="the first is not counted")
    parser.add_argument("--skip-floor", action="store_true")
    parser.add_argument("--trl-micro-batch", type=int, default=16, help="answers in one of TRL's passes")
    parser.add_argument("--keys", nargs="*", default=[], help="more key=value for lorl")
    args = parser.parse_args()
    args.model = None
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (lorl_side if args.side == "lorl" else trl_side)(args, Path(folder))


if __name__ == "__main__":
    main()
