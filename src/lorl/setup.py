"""From a configuration to a trainer that is ready to run. What is cheap to check comes before what is slow to load."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lorl import settings
from lorl.config import CriticConfig, DataConfig, RunConfig
from lorl.data.loader import PromptLoader
from lorl.data.prompts import PromptSet, load_prompts
from lorl.errors import UserError
from lorl.evaluation import Evaluation
from lorl.evaluation import evaluate as judge
from lorl.experience import Prompt
from lorl.objective import Objective
from lorl.parallel import start
from lorl.parallel.workers import Workers
from lorl.policy.load import TRAINED, load_shape, load_tokenizer, positions
from lorl.rewards.pool import RewardPool
from lorl.run_folder import RunFolder
from lorl.samples import Collector
from lorl.tracking import trackers
from lorl.tracking.console import Console
from lorl.trainer import Trainer

StartWorkers = Callable[[RunConfig, PreTrainedTokenizerBase, Callable[[str], None]], Workers]


def train(
    config: RunConfig, console: Console, start_workers: StartWorkers = start.start_workers
) -> dict[str, Any] | None:
    """Runs `config` to its end. Returns the summary, or None when a signal stopped the run and it was saved.

    `start_workers` makes what the trainer talks to, from the configuration, the tokenizer and what tells the user.
    """
    check(config)
    for text in advice(config):
        console.warn(text)
    _use_threads(config)
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder.open(config, settings.to_yaml(config)))
        console.info(f"run folder: {folder.path}")
        tokenizer = load_tokenizer(config.model)
        with console.phase("reading prompts"):
            assert config.data.train is not None
            data = _data(config)
            train_set = load_prompts(data, config.data.train, tokenizer, "train")
            val_set = load_prompts(data, config.data.val, tokenizer, "val") if config.data.val is not None else None
        _tell_left_out(train_set, console)
        _warn_of_length(config, [*train_set.prompts, *(val_set.prompts if val_set else [])], console)
        loader = PromptLoader(
            train_set.prompts, config.data.prompts_per_step, shuffle=config.data.shuffle, seed=config.seed
        )
        val = val_set.prompts if val_set else []
        pool = _rule(config, [*train_set.prompts, *val], stack)
        with console.phase(f"loading {config.model.path}"):
            worker = start_workers(config, tokenizer, console.info)
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
            val = load_prompts(_data(config), config.data.val, tokenizer, "val")
        _tell_left_out(val, console)
        _warn_of_length(config, val.prompts, console)
        pool = _rule(config, val.prompts, stack)
        with console.phase(f"loading {config.model.path}"):
            worker = start.start_workers(config, tokenizer, console.info)
        stack.callback(worker.close)
        worker.publish()
        with console.phase("evaluating", total=len(val.prompts) * config.eval.n) as advance:
            adapter = TRAINED if config.adapter.path else None
            samples = Collector(config, worker, pool).evaluation(val.prompts, advance, adapter)
    found = judge(samples, success=config.eval.success)
    if not found.n:
        raise UserError(f"data.val: no answer to its {len(val.prompts)} prompts was graded; {found.failures()}.")
    return found


def check(config: RunConfig) -> None:
    """Mistakes that show without reading data or loading a model. Raises UserError."""
    if config.data.train is None:
        raise UserError(
            "data.train is not set: name a parquet or JSON-lines file of prompts, for instance "
            "data.train=data/train.parquet (`lorl data --help` makes one)."
        )
    start.check(config)
    trackers.check(config.trainer.trackers)
    _check_algorithm(config)


def _check_algorithm(config: RunConfig) -> None:
    algorithm, rollout, model = config.algorithm, config.rollout, config.reward_model
    Objective.of(config).advantage.check_group(rollout.n, algorithm.model_dump())
    if algorithm.overlong_buffer_tokens > rollout.max_response_tokens:
        raise UserError(
            f"algorithm.overlong_buffer_tokens={algorithm.overlong_buffer_tokens} is more than "
            f"rollout.max_response_tokens={rollout.max_response_tokens}; use a part of it, such as "
            f"{max(1, rollout.max_response_tokens // 5)}."
        )
    if algorithm.dynamic_sampling and rollout.n == 1:
        raise UserError(
            "algorithm.dynamic_sampling keeps the groups whose rewards differ, and with rollout.n=1 none can; use "
            "rollout.n=2 or more."
        )
    if algorithm.kl_control == "adaptive" and not algorithm.kl_coef:
        raise UserError("algorithm.kl_control=adaptive steers a coefficient that is 0; set algorithm.kl_coef above 0.")
    if model.path is None and (model.weight != 1 or model.rule_weight != 1):
        raise UserError("reward_model.weight and rule_weight mix a rule with a model; set reward_model.path as well.")


def _asks_rule(config: RunConfig) -> bool:
    """Whether a rule grades, or the reward model alone decides."""
    return config.reward_model.path is None or config.reward_model.rule_weight != 0


def _rule(config: RunConfig, prompts: list[Prompt], stack: ExitStack) -> RewardPool | None:
    """The graders, where a rule is asked."""
    return stack.enter_context(RewardPool(config.reward, _sources(prompts))) if _asks_rule(config) else None


def _data(config: RunConfig) -> DataConfig:
    """data.*; where no rule is asked, a prompt needs no answer."""
    return config.data if _asks_rule(config) else config.data.model_copy(update={"answer_key": None})


def advice(config: RunConfig) -> list[str]:
    """Warnings about what is allowed and has been seen to go wrong, or does nothing."""
    found = [_rank_advice(config), _kl_advice(config), _network_advice(config)]
    if config.critic != CriticConfig() and not Objective.of(config).needs_critic:
        found.append(f"critic.* has no effect: algorithm.advantage={config.algorithm.advantage} has no critic")
    return [text for text in found if text is not None]


def _kl_advice(config: RunConfig) -> str | None:
    """The division blows the KL's small differences up to full size where all rewards of a group are equal."""
    algorithm = config.algorithm
    divides = algorithm.advantage in ("grpo", "grpo_passk") and algorithm.normalize_std
    if not (divides and algorithm.kl_in == "reward" and algorithm.kl_coef > 0):
        return None
    return (
        f"algorithm.kl_in=reward with algorithm.advantage={algorithm.advantage}, which divides by the group's standard "
        "deviation, has been seen to stop the learning (docs/algorithms.md); use algorithm.kl_in=loss, or "
        "algorithm.normalize_std=false"
    )


def _network_advice(config: RunConfig) -> str | None:
    """torch's store, gloo and NCCL know no passwords, and across nodes they leave the loopback address."""
    if config.parallel.nodes == 1:
        return None
    return (
        f"parallel.nodes={config.parallel.nodes}: what ranks send each other is neither encrypted nor authenticated "
        "(torch.distributed has no such thing); run on a private network that nobody else reaches "
        '(docs/architecture.md, "Many ranks")'
    )


def _rank_advice(config: RunConfig) -> str | None:
    """High ranks with large batches have been seen to collapse ("Structure Over Scale", ICML 2026 workshop)."""
    batch = config.algorithm.minibatch_prompts or config.data.prompts_per_step
    if config.adapter.path is not None or config.adapter.rank < 64 or batch < 128:
        return None
    return (
        f"adapter.rank={config.adapter.rank} with {batch} prompts an update has been seen to collapse; a rank of 32 or "
        "less, or a smaller algorithm.minibatch_prompts, is safer (docs/recipes.md)"
    )


def _warn_of_length(config: RunConfig, prompts: list[Prompt], console: Console) -> None:
    """Past the positions that it was made for, a model computes something, and nobody trained it to."""
    known, longest = positions(load_shape(config.model)), max(len(prompt.tokens) for prompt in prompts)
    answer = config.rollout.max_response_tokens
    if known is None or longest + answer <= known:
        return
    console.warn(
        f"the longest prompt has {longest} tokens, and with rollout.max_response_tokens={answer} that is more than the "
        f"{known} positions of model.path={config.model.path}; "
        + (f"at most {known - longest} make sense" if longest < known else "lower data.max_prompt_tokens as well")
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
