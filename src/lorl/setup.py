"""From a configuration to a trainer that is ready to run. What is cheap to check comes before what is slow to load."""

from contextlib import ExitStack
from typing import Any

import torch

from lorl import settings
from lorl.algorithms.registry import get_advantage, get_kl, get_policy_loss
from lorl.config import RunConfig
from lorl.data.loader import PromptLoader
from lorl.data.prompts import PromptSet, load_prompts
from lorl.errors import UserError
from lorl.evaluation import Evaluation
from lorl.evaluation import evaluate as judge
from lorl.experience import Prompt
from lorl.parallel.local import local_worker
from lorl.policy.load import TRAINED, load_tokenizer
from lorl.rewards.pool import RewardPool
from lorl.run_folder import RunFolder
from lorl.samples import collect, eval_sampling
from lorl.tracking import trackers
from lorl.tracking.console import Console
from lorl.trainer import Trainer


def train(config: RunConfig, console: Console) -> dict[str, Any] | None:
    """Runs `config` to its end. Returns the summary, or None when a signal stopped the run and it was saved."""
    check(config)
    _use_threads(config)
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder.open(config, settings.to_yaml(config)))
        console.info(f"run folder: {folder.path}")
        tokenizer = load_tokenizer(config.model)
        with console.phase("reading prompts"):
            assert config.data.train is not None
            train_set = load_prompts(config.data, config.data.train, tokenizer, "train")
            val_set = load_prompts(config.data, config.data.val, tokenizer, "val") if config.data.val else None
        _tell_left_out(train_set, console)
        loader = PromptLoader(
            train_set.prompts, config.data.prompts_per_step, shuffle=config.data.shuffle, seed=config.seed
        )
        val = val_set.prompts if val_set else []
        pool = stack.enter_context(RewardPool(config.reward, _sources([*train_set.prompts, *val])))
        with console.phase(f"loading {config.model.path}"):
            worker = local_worker(config, tokenizer)
        stack.callback(worker.close)
        resume_step = None
        trainer = Trainer(
            config=config,
            workers=worker,
            pool=pool,
            loader=loader,
            val=val,
            folder=folder,
            trackers=trackers.Trackers([], console.warn),
            console=console,
            total_steps=config.trainer.total_steps or loader.steps(config.trainer.total_epochs),
        )
        if folder.resume_from is not None:
            trainer.resume(folder.resume_from)
            resume_step = trainer.progress.step
        folder.rewind(resume_step)
        trainer.trackers = trackers.open(
            config.trainer.trackers, folder.path, config.model_dump(), resume_step, warn=console.warn
        )
        stack.callback(trainer.trackers.close)
        return trainer.run()


def evaluate(config: RunConfig, console: Console) -> Evaluation:
    """Judges the base, or the adapter in adapter.path, on data.val. Writes nothing."""
    if config.data.val is None:
        raise UserError("data.val is not set: name a parquet or JSON-lines file, such as data.val=data/test.parquet.")
    _use_threads(config)
    with ExitStack() as stack:
        tokenizer = load_tokenizer(config.model)
        with console.phase("reading prompts"):
            val = load_prompts(config.data, config.data.val, tokenizer, "val")
        _tell_left_out(val, console)
        pool = stack.enter_context(RewardPool(config.reward, _sources(val.prompts)))
        with console.phase(f"loading {config.model.path}"):
            worker = local_worker(config, tokenizer)
        stack.callback(worker.close)
        worker.publish()
        with console.phase("evaluating", total=len(val.prompts) * config.eval.n) as advance:
            samples = collect(
                worker,
                pool,
                val.prompts,
                n=config.eval.n,
                sampling=eval_sampling(config.eval, config.rollout),
                adapter=TRAINED if config.adapter.path else None,
                seed=(config.seed, "eval"),
                batched_rewards=config.reward.batched,
                advance=advance,
            )
    return judge(samples, success=config.eval.success)


def check(config: RunConfig) -> None:
    """Mistakes that show without reading data or loading a model. Raises UserError."""
    if config.data.train is None:
        raise UserError(
            "data.train is not set: name a parquet or JSON-lines file of prompts, for instance "
            "data.train=data/train.parquet (`lorl data --help` makes one)."
        )
    if config.parallel.gpus * config.parallel.nodes > 1:
        raise UserError(
            f"parallel.gpus={config.parallel.gpus} on parallel.nodes={config.parallel.nodes}: this version of lorl trains "
            "on one GPU; set both to 1."
        )
    trackers.check(config.trainer.trackers)
    estimator = get_advantage(config.algorithm.advantage)
    get_policy_loss(config.algorithm.policy_loss)
    if get_kl(config.algorithm.kl_estimator).needs_logits:
        raise UserError(
            f"algorithm.kl_estimator={config.algorithm.kl_estimator} needs the reference's logits, and lorl keeps "
            "log-probabilities only; use k3."
        )
    if config.rollout.n < estimator.min_group:
        raise UserError(
            f"algorithm.advantage={estimator.name} needs rollout.n >= {estimator.min_group}, not {config.rollout.n}."
        )


def _use_threads(config: RunConfig) -> None:
    if config.parallel.threads:
        torch.set_num_threads(config.parallel.threads)


def _sources(prompts: list[Prompt]) -> set[str]:
    return {prompt.data_source for prompt in prompts}


def _tell_left_out(prompts: PromptSet, console: Console) -> None:
    for note in prompts.skipped[:3]:
        console.warn(f"left out {note.where}: {note.reason}")
    if len(prompts.skipped) > 3:
        console.warn(f"left out {len(prompts.skipped)} rows in all")
