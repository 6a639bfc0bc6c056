"""A real Trainer on the tiny model, in this process: two prompts a step, four samples each, a rule in a file."""

import io
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from lorl import settings
from lorl.config import RunConfig
from lorl.data.loader import PromptLoader
from lorl.experience import Prompt
from lorl.parallel.local import local_worker
from lorl.policy.load import load_tokenizer
from lorl.rewards.pool import RewardPool
from lorl.run_folder import RunFolder
from lorl.setup import check
from lorl.tracking import trackers
from lorl.tracking.console import Console
from lorl.trainer import Trainer

# A reward of two parts. Prompt "flat" gives every answer the same, so its groups teach nothing.
RULE = """
def compute_score(solution_str, ground_truth):
    if ground_truth == "flat":
        return {"score": 0.5, "varied": 0.5, "short": 0.5}
    varied = len(set(solution_str)) / 16
    short = -len(solution_str) / 16
    return {"score": varied + short / 4, "varied": varied, "short": short}
"""
NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def small_config(model: Path, folder: Path, *overrides: str, name: str = "r") -> RunConfig:
    """Checked as `lorl train` checks it."""
    config = settings.load(
        None,
        [
            f"model.path='{model}'",
            "data.train=unread.jsonl",
            "data.prompts_per_step=2",
            "rollout.n=4",
            "rollout.max_response_tokens=10",
            "adapter.rank=4",
            "optim.lr=3e-3",
            "checkpoint.every_steps=null",
            f"run.dir='{folder}'",
            f"run.name={name}",
            *overrides,
        ],
    )
    check(config)
    return config


def prompts_for(config: RunConfig, truths: Sequence[str] = NAMES) -> list[Prompt]:
    tokenizer = load_tokenizer(config.model)
    rows = []
    for index, truth in enumerate(truths):
        messages = [{"role": "user", "content": f"{truth}{index}"}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append(Prompt(f"q{index}", list(tokens), text, ground_truth=truth, messages=messages))
    return rows


def make_trainer(
    config: RunConfig,
    pool: RewardPool | None,
    stack: ExitStack,
    *,
    steps: int,
    truths: Sequence[str] = NAMES,
    out: TextIO | None = None,
) -> Trainer:
    """Set up as `lorl.setup.train` sets it up, resuming where the folder says so."""
    folder = stack.enter_context(RunFolder.open(config, settings.to_yaml(config)))
    worker = local_worker(config, load_tokenizer(config.model), lambda note: None)
    prompts = prompts_for(config, truths)
    trainer = Trainer(
        config=config,
        workers=worker,
        pool=pool,
        loader=PromptLoader(prompts, config.data.prompts_per_step, shuffle=True, seed=config.seed),
        val=[],
        folder=folder,
        trackers=trackers.Trackers([], lambda text: None),
        console=Console(out or io.StringIO()),
        total_steps=steps,
    )
    resumed = None
    if folder.resume_from is not None:
        trainer.resume(folder.resume_from)
        resumed = trainer.progress.step
    trainer.trackers = trackers.open([], folder.path, {}, resumed, warn=lambda text: None)
    stack.callback(trainer.trackers.close)
    return trainer


def run(
    config: RunConfig,
    pool: RewardPool | None,
    *,
    steps: int = 2,
    truths: Sequence[str] = NAMES,
    out: TextIO | None = None,
) -> tuple[list[dict[str, Any]], Trainer]:
    """Trains to step `steps`. Returns the steps' metrics, less the machine's, and the trainer."""
    with ExitStack() as stack:
        trainer = make_trainer(config, pool, stack, steps=steps, truths=truths, out=out)
        trainer.run()
    return read_metrics(trainer.folder.path), trainer


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "memory/"))}
        for row in rows
        if row["step"]
    ]
