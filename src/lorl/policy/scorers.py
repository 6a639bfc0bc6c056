"""Reward models: an adapter with a score head on the policy's base, or a sequence classifier of its own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.experience import Completion, Experience, Outcome
from lorl.packing import cut, pack, select
from lorl.policy import adapters
from lorl.policy.load import pick_device, pick_dtype
from lorl.policy.policy import Policy

REWARD = "reward"  # the adapter's name
SCORE_HEAD = "score_head"  # `score_head.weight` [1, hidden] and `score_head.bias` [1] lie in the adapter's own file
CARD = "reward_model.json"  # what `lorl train-reward` found, with the fingerprint of its base


class Scorer(Protocol):
    description: str  # what it is and what memory it costs, for people
    on_policy: bool  # whether its passes are the policy's, which several ranks may make together

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """One number an answer; the answers to one prompt are adjacent."""
        ...


def load_scorer(config: RunConfig, policy: Policy) -> Scorer:
    """What `reward_model.path` names. Raises UserError when it is no reward model, or one of another base."""
    path = config.reward_model.path
    assert path is not None
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").is_file():
        return AdapterScorer(config, policy, folder)
    return ClassifierScorer(config, path)


class AdapterScorer:
    """A third adapter: the score is read off the hidden state of the answer's last token."""

    on_policy = True

    def __init__(self, config: RunConfig, policy: Policy, folder: Path) -> None:
        key = "reward_model.path"
        tensors = adapters.read_tensors(folder, key)
        card = _read_card(folder / CARD)
        if card.get("base", policy.base_fingerprint()) != policy.base_fingerprint():
            raise UserError(
                f"{key}={str(folder)!r} was trained on another base than model.path={config.model.path!r}; a reward "
                "adapter scores on the base that it was made for."
            )
        policy.add_adapter(REWARD, adapters.read_config(folder, key), seed=0, learns=False)
        policy.add_scalar_head(REWARD, SCORE_HEAD)
        policy.load_adapter(REWARD, tensors, f"{key}={str(folder)!r}")
        self._policy = policy
        self._budget = config.parallel.microbatch_tokens * config.parallel.sequence
        size = sum(tensor.numel() for tensor in tensors.values()) * 4 / 2**20
        self.description = f"reward model: an adapter of {size:.1f} MiB on the same base"

    @torch.no_grad()
    def score(self, completions: Sequence[Completion]) -> list[float]:
        experience = pack(completions, [Outcome("ok", 0.0)] * len(completions))
        scores = torch.empty(len(completions))
        for sequences in cut(experience, torch.arange(len(completions)), self._budget):
            scores[sequences] = score_sequences(self._policy, select(experience, sequences), REWARD).cpu()
        return scores.tolist()


def score_sequences(policy: Policy, experience: Experience, adapter: str) -> Tensor:
    """float32[S]: the score head of `adapter` at each sequence's last sampled token. Every sequence has one."""
    ends = experience.layout.lengths().cumsum(0) - 1
    forest = experience.forest.to(policy.device)
    return policy.scalars(forest, forest.sampled[ends.to(policy.device)], adapter=adapter)


class ClassifierScorer:
    """A Hugging Face sequence classifier with one output. It reads text, in its own chat template where it has one."""

    on_policy = False

    def __init__(self, config: RunConfig, path: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = pick_device(config.model)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=pick_dtype(config.model, device)
            )
        except Exception as error:  # transformers raises what it likes for a path that is no usable model
            raise UserError(
                f"reward_model.path={path!r} cannot be loaded ({str(error).strip().splitlines()[0][:200]}); name a "
                "folder that `lorl train-reward` made, or a Hugging Face sequence classifier."
            ) from None
        if model.config.num_labels != 1:
            raise UserError(
                f"reward_model.path={path!r} has {model.config.num_labels} outputs; a reward model has one "
                "(num_labels=1)."
            )
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        self._model = model.requires_grad_(False).to(device).eval()
        self._limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._budget = config.parallel.microbatch_tokens
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self.description = f"reward model: {type(model).__name__}, a model of its own of {size / 2**20:.0f} MiB"

    @torch.no_grad()
    def score(self, completions: Sequence[Completion]) -> list[float]:
        encoded = [self._encode(completion) for completion in completions]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        scores = [0.0] * len(encoded)
        while order:
            longest = len(encoded[order[-1]])
            batch = [order.pop() for _ in range(min(len(order), max(1, self._budget // longest)))]
            padded = self._tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt")
            found = self._model(**padded.to(self._model.device)).logits.squeeze(-1).float()
            for index, value in zip(batch, found.tolist(), strict=True):
                scores[index] = value
        return scores

    def _encode(self, completion: Completion) -> list[int]:
        prompt = completion.prompt
        if self._tokenizer.chat_template and prompt.messages:
            conversation = [*prompt.messages, {"role": "assistant", "content": completion.text}]
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False)
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            before = "\n\n".join(message["content"] for message in prompt.messages) or prompt.text
            tokens = self._tokenizer(f"{before}\n\n{completion.text}")["input_ids"]
        if self._limit is not None and len(tokens) > self._limit:
            raise UserError(
                f"reward_model.path reads at most {self._limit} tokens, and the answer to prompt {prompt.id!r} comes "
                f"to {len(tokens)} with its prompt; lower data.max_prompt_tokens or rollout.max_response_tokens."
            )
        return tokens


def _read_card(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
