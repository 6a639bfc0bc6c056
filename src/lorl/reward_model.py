"""`lorl train-reward`: fits a reward adapter to preference pairs.

Bradley-Terry (1952): P(chosen beats rejected) = sigmoid(score(chosen) - score(rejected)), and the loss is its negative
log-likelihood (Ouyang et al. 2022, arXiv 2203.02155, eq. 1). The two answers of a pair hang off one prompt in the
packed forest.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorl import settings
from lorl.checkpoint import ADAPTER_CONFIG, ADAPTER_TENSORS, fsync_folder, write_durably
from lorl.config import RunConfig
from lorl.data.rows import BadRowError, messages_of
from lorl.data.sources import Row, read_rows
from lorl.errors import UserError
from lorl.experience import Completion, Outcome, Prompt
from lorl.optim import learning_rate, make_optimizer
from lorl.packing import pack
from lorl.parallel.group import Alone
from lorl.passes import guarded_step
from lorl.policy.load import TRAINED, load_policy, load_tokenizer
from lorl.policy.policy import Policy
from lorl.policy.scorers import CARD, SCORE_HEAD, score_sequences
from lorl.seeding import stable_seed
from lorl.tracking.console import Console

Pair = tuple[Completion, Completion]  # chosen, rejected: two answers to one prompt

USED = (
    "model.",
    "adapter.",
    "optim.",
    "parallel.",
    "seed",
    "trainer.total_",
    "data.prompts_per_step",
    "data.max_prompt_tokens",
)
"""Prefixes of the keys that mean something here; data.prompts_per_step counts pairs an optimizer step."""

HELD_OUT = 0.1  # share of the pairs that the accuracy is measured on


def train_reward(config: RunConfig, source: str, output: Path, console: Console) -> dict[str, Any]:
    """Fits an adapter with a score head to the pairs in `source`, and writes it to the new folder `output`.

    A row has `prompt` (text or messages), `chosen` and `rejected` (text, or messages that end with the answer). A tenth
    of the pairs, picked by hash, is held out.

    Returns:
        {"accuracy", "pairs", "held_out", "steps", "loss"}: accuracy is the share of held-out pairs whose chosen answer
        scores higher.

    Raises:
        UserError: a row is no pair, a key is set that means nothing here, or `output` exists.
    """
    _check(config, output)
    tokenizer = load_tokenizer(config.model)
    pairs = read_pairs(source, config, tokenizer)
    with console.phase(f"loading {config.model.path}"):
        policy = load_policy(config.model, config.adapter, seed=config.seed, tokenizer=tokenizer)
    policy.add_scalar_head(TRAINED, SCORE_HEAD)
    order = sorted(range(len(pairs)), key=lambda i: stable_seed(config.seed, "held out", i))
    held = order[: max(1, round(HELD_OUT * len(pairs)))]
    training = [pairs[i] for i in order[len(held) :]]
    steps, loss = _fit(policy, training, config, console)
    card = {
        "accuracy": accuracy(policy, [pairs[i] for i in held], config.parallel.microbatch_tokens),
        "pairs": len(training),
        "held_out": len(held),
        "steps": steps,
        "loss": loss,
    }
    _write(policy, output, card)
    return card


def read_pairs(source: str, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """The pairs of a file, tokenised. Raises UserError that names the first row that is none."""
    rows = read_rows(source, "--pairs")
    if len(rows) < 2:
        raise UserError(f"--pairs: {source} holds {len(rows)} pair; two are the least, one of them to test on")
    pairs = []
    for index, row in enumerate(rows):
        try:
            pairs.append(_pair(row, str(index), config, tokenizer))
        except BadRowError as error:
            raise UserError(f"--pairs: {row.where} {error}") from None
    return pairs


def pair_loss(policy: Policy, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """float32[P] losses -log sigmoid(margin), and float32[P] margins score(chosen) - score(rejected)."""
    answers = [answer for pair in pairs for answer in pair]
    scores = score_sequences(policy, pack(answers, [Outcome("ok", 0.0)] * len(answers)), TRAINED)
    margins = scores[0::2] - scores[1::2]
    return -F.logsigmoid(margins), margins


@torch.no_grad()
def accuracy(policy: Policy, pairs: Sequence[Pair], budget: int) -> float:
    """The share of pairs whose chosen answer scores higher; a tie counts half."""
    margins = torch.cat([pair_loss(policy, part)[1] for part in _cut(pairs, budget)])
    return float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean())


def _fit(policy: Policy, pairs: Sequence[Pair], config: RunConfig, console: Console) -> tuple[int, float]:
    """Steps over shuffled pairs. Returns how many there were, and the last one's mean loss."""
    parameters = policy.parameters(TRAINED)
    optimizer = make_optimizer(parameters, config.optim)
    size = min(config.data.prompts_per_step, len(pairs))
    total = config.trainer.total_steps or -(-config.trainer.total_epochs * len(pairs) // size)
    batches = _batches(len(pairs), size, config.seed)
    torch.manual_seed(stable_seed(config.seed, "train-reward"))
    mean = float("nan")
    with console.phase("training the reward model", total=total) as advance:
        for step in range(1, total + 1):
            batch = [pairs[i] for i in next(batches)]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, config.optim)
            optimizer.zero_grad(set_to_none=True)
            policy.train_mode(config.adapter.dropout > 0)
            mean = 0.0
            for part in _cut(batch, config.parallel.microbatch_tokens):
                loss = pair_loss(policy, part)[0].sum() / len(batch)
                loss.backward()
                mean += float(loss.detach())
            policy.train_mode(False)
            taken = guarded_step(optimizer, parameters.values(), mean, config.optim.max_grad_norm, Alone(), "gradients")
            if taken.problem:
                console.warn(f"step {step} skipped: {taken.problem}")
            advance(1)
    return total, mean


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of `size`, each epoch in an order of its own; batches run on across an epoch's end."""
    queue: list[int] = []
    epoch = 0
    while True:
        while len(queue) < size:
            queue += sorted(range(count), key=lambda i: stable_seed(seed, "pairs", epoch, i))
            epoch += 1
        yield queue[:size]
        del queue[:size]


def _cut(pairs: Sequence[Pair], budget: int) -> Iterator[list[Pair]]:
    """Micro-batches of at most `budget` tokens where they fit; prompts count once a pair."""
    part: list[Pair] = []
    held = 0
    for pair in pairs:
        size = len(pair[0].prompt.tokens) + sum(len(answer.tokens) for answer in pair)
        if part and held + size > budget:
            yield part
            part, held = [], 0
        part.append(pair)
        held += size
    if part:
        yield part


def _check(config: RunConfig, output: Path) -> None:
    changed = settings.diff(RunConfig.model_validate({}), config)
    if idle := [key for key in changed if not key.startswith(USED)]:
        raise UserError(f"{idle[0]} means nothing to train-reward; it reads {', '.join(u.rstrip('.') for u in USED)}.")
    if output.exists():
        raise UserError(f"--output {output} exists; name a new folder")


def _pair(row: Row, name: str, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Pair:
    if row.fault:
        raise BadRowError(row.fault)
    values = row.values
    for key in ("chosen", "rejected"):
        if not isinstance(values.get(key), str | list) or not values[key]:
            raise BadRowError(f"has no {key!r}: a row needs prompt, chosen and rejected")
    given = values.get("prompt")
    if given is None and isinstance(values["chosen"], list):  # the whole conversation, as some data sets have it
        given = values["chosen"][:-1]
    if given is None:
        raise BadRowError("has no 'prompt': a row needs prompt, chosen and rejected")
    messages = messages_of(given)
    if tokenizer.chat_template:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        text = "\n\n".join(message["content"] for message in messages)
        tokens = tokenizer(text)["input_ids"]
    if len(tokens) > config.data.max_prompt_tokens:
        raise BadRowError(f"the prompt has {len(tokens)} tokens and data.max_prompt_tokens is less; raise it")
    prompt = Prompt(id=name, tokens=list(tokens), text=text, messages=messages)
    chosen, rejected = (_answer(prompt, i, values[key], tokenizer) for i, key in enumerate(("chosen", "rejected")))
    return chosen, rejected


def _answer(prompt: Prompt, index: int, given: Any, tokenizer: PreTrainedTokenizerBase) -> Completion:
    """An answer as the engine would have sampled it: its tokens, and the end-of-sequence token."""
    text = given if isinstance(given, str) else given[-1].get("content") if isinstance(given[-1], dict) else None
    if not isinstance(text, str):
        raise BadRowError("chosen and rejected must be text, or messages that end with the answer")
    tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Completion(prompt, index, tokens, [0.0] * len(tokens), text, "stop", 0)


def _write(policy: Policy, output: Path, card: dict[str, Any]) -> None:
    import safetensors.torch

    tensors = safetensors.torch.save(policy.adapter_tensors(TRAINED), metadata={"format": "pt"})
    files = {
        ADAPTER_TENSORS: tensors,
        ADAPTER_CONFIG: json.dumps(policy.adapter_config(TRAINED), indent=2, default=str).encode(),
        CARD: json.dumps({**card, "base": policy.base_fingerprint()}, indent=2).encode(),
    }
    try:
        for name, data in files.items():
            write_durably(output / name, data)
        fsync_folder(output)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}") from None
