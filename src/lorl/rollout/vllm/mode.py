"""Adapter or fold: which samples faster here, measured once at the start."""

import time

import torch

from lorl.config import RunConfig
from lorl.experience import Prompt
from lorl.policy.load import TRAINED
from lorl.policy.policy import Policy
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.vllm.engine import VllmEngine


def faster_mode(engine: VllmEngine, policy: Policy, config: RunConfig) -> tuple[bool, str]:
    """Whether folding is the faster way for this run's rollouts, and a sentence that says so with the seconds.

    A short rollout each way, after one to warm up; the fold's own cost counts once a rollout, the tokens as many times
    as half the longest answer. Either way the trainer rounds as the engine does (`lorl.policy.lora`).
    """
    cuda = policy.device.type == "cuda"
    samples = min(config.rollout.max_concurrent, config.data.prompts_per_step * config.rollout.n, 256 if cuda else 8)
    tokens = 32 if cuda else 4
    steps = max(tokens, config.rollout.max_response_tokens // 2)
    seconds = {}
    for folds in (False, True):
        engine.folds = folds
        _rollout(engine, policy, samples, 2)
        short, long = _rollout(engine, policy, samples, 2), _rollout(engine, policy, samples, 2 + tokens)
        each = max(long - short, 0.0) / tokens
        seconds[folds] = short + each * steps
    engine.folds = False
    folds = seconds[True] < seconds[False]
    name, other = ("fold", "adapter") if folds else ("adapter", "fold")
    return folds, (
        f"rollout.adapter_mode={name}: {seconds[folds]:.2f} s a rollout of {samples} x {steps} tokens against "
        f"{seconds[not folds]:.2f} s with {other}"
    )


def _rollout(engine: VllmEngine, policy: Policy, samples: int, tokens: int) -> float:
    token = min(7, policy.config.get_text_config().vocab_size - 1)
    request = Request(Prompt("trial", [token] * 8, ""), list(range(samples)))
    started = time.perf_counter()
    for _ in engine.generate([request], Sampling(max_tokens=tokens, ignore_eos=True), adapter=TRAINED):
        pass
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
