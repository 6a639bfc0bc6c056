"""The embedded engine: batched sampling on the trainer's own weights, in its process, on any device.

Sequences are decoded together. The samples of a prompt share its keys and values, and samples that agree so far are one
row of the batch, which forks where they part: each distinct beginning is computed once, as in training. Rows leave as
their samples finish, and waiting prompts take their place.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from lorl.errors import InfrastructureError, UserError
from lorl.experience import Completion, Finish, Forest
from lorl.packing import pack_prompts
from lorl.policy.attention import ForestAttention
from lorl.policy.policy import Policy
from lorl.rollout.decode import DecodeCache
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.sampling import draw_tokens, uniforms

_PREFILL_TOKENS = 8192  # prompts packed into one pass
_LEAVE_SHARE = 8  # finished rows leave once they are an eighth of the batch: each leaving copies the cache


@dataclass(slots=True)
class _Sample:
    request: Request
    index: int
    uniforms: Tensor  # float64[max_tokens]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None


_Branch = list[_Sample]  # samples with the same tokens so far: one row of the batch. Empty once all are finished


class TorchEngine:
    """`Engine` over a `Policy`. It holds no weights: publishing records which version the policy's adapter is at, and
    generating refuses to run on anything else."""

    def __init__(self, policy: Policy, *, max_concurrent: int = 256, memory_fraction: float | None = None) -> None:
        self._policy = policy
        self._max_concurrent = max_concurrent
        self._cache_tokens = int((memory_fraction or 0.4) * _device_memory(policy.device) / _bytes_per_token(policy))
        self._published: dict[str, tuple[int, str]] = {}

    def publish(self, name: str, version: int, checksum: str) -> float:
        held = self._policy.checksum(name)
        if held != checksum:
            raise InfrastructureError(
                f"adapter {name!r} version {version}: the engine holds {held}, the trainer published {checksum}"
            )
        self._published[name] = (version, checksum)
        return 0.0  # it reads the trainer's own tensors

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None
    ) -> Generator[Completion]:
        version = self._version(adapter)
        waiting = deque(requests)
        cache = DecodeCache(self._policy.device)
        branches: list[_Branch] = []
        while waiting or any(branches):
            running = len(branches)
            if admitted := self._take(waiting, sum(map(len, branches)), sampling):
                fresh, logits = self._prefill(cache, admitted, sampling, adapter)
                branches += fresh
            else:
                running = 0
                logits = self._step(cache, branches, adapter)
            drawn = self._draw(branches[running:], logits, sampling)
            for sample in drawn:
                sample.finish = self._finish(sample, sampling)
                if sample.finish is not None:
                    yield self._completion(sample, sampling, version)
            branches = _part(cache, branches, running)

    def rest(self) -> None:
        """Nothing to give back: the cache lives only inside `generate`."""

    @property
    def resting_bytes(self) -> int:
        return 0  # its cache is a tensor that is let go

    def wake(self) -> None:
        """Nothing to take."""

    def rebuild(self) -> None:
        """Nothing outlives `generate` but the list of what was published."""
        self._published.clear()

    def close(self) -> None:
        self._published.clear()

    def _version(self, adapter: str | None) -> int:
        if adapter is None:
            return 0
        if adapter not in self._published:
            raise InfrastructureError(f"adapter {adapter!r} was never published to the engine")
        version, checksum = self._published[adapter]
        if self._policy.checksum(adapter) != checksum:
            raise InfrastructureError(
                f"adapter {adapter!r} changed after version {version} was published: rollouts would be stale; "
                "publish it first"
            )
        return version

    def _take(self, waiting: deque[Request], active: int, sampling: Sampling) -> list[Request]:
        """The next requests that fit beside `active` rows; at least one when nothing runs."""
        taken: list[Request] = []
        tokens, rows = 0, active
        own = active * sampling.max_tokens
        while waiting:
            request = waiting[0]
            length, count = len(request.prompt.tokens), len(request.seeds)
            need = length + count * sampling.max_tokens
            if need > self._cache_tokens:
                raise UserError(
                    f"prompt {request.prompt.id!r} with {count} samples needs a KV cache of {need} tokens and "
                    f"rollout.memory_fraction leaves room for {self._cache_tokens}; raise it, or lower rollout.n or "
                    "rollout.max_response_tokens."
                )
            crowded = rows + count > self._max_concurrent or own + need > self._cache_tokens
            if (rows or taken) and (crowded or tokens + length > _PREFILL_TOKENS):
                break
            taken.append(waiting.popleft())
            tokens, rows, own = tokens + length, rows + count, own + need
        return taken

    @torch.inference_mode()
    def _prefill(
        self, cache: DecodeCache, requests: list[Request], sampling: Sampling, adapter: str | None
    ) -> tuple[list[_Branch], Tensor]:
        """Runs the prompts packed, once each: a branch a prompt, and the logits [B, V] of each one's first token."""
        device = self._policy.device
        packed = pack_prompts([request.prompt for request in requests])
        none = torch.empty(0, dtype=torch.int64)
        forest = Forest(
            tokens=torch.tensor(packed.tokens, device=device),
            positions=torch.tensor(packed.positions, device=device),
            segments=torch.tensor(packed.offsets, dtype=torch.int32),
            parent=torch.tensor(packed.parent, dtype=torch.int32),
            previous=none,
            sampled=none,
        )
        layout = ForestAttention(forest, record=True)
        hidden = self._policy.hidden(layout, forest.tokens, forest.positions, adapter=adapter)
        assert layout.recorded is not None
        cache.admit(layout.recorded, packed.path)
        last = torch.stack([path[-1] for path in packed.path]).to(device)
        logits = self._policy.logits(hidden[last])
        branches = [
            [
                _Sample(request, index, torch.from_numpy(uniforms(seed, sampling.max_tokens)))
                for index, seed in enumerate(request.seeds)
            ]
            for request in requests
        ]
        return branches, logits

    @torch.inference_mode()
    def _step(self, cache: DecodeCache, branches: list[_Branch], adapter: str | None) -> Tensor:
        """Feeds each row's last token; logits [B, V] of the next. A row without samples gets any token, for nothing."""
        last = [branch[0].tokens[-1] if branch else 0 for branch in branches]
        cache.begin()
        tokens = torch.tensor(last, device=self._policy.device)
        hidden = self._policy.hidden(cache, tokens, cache.positions, adapter=adapter)
        cache.end()
        return self._policy.logits(hidden)

    def _draw(self, branches: list[_Branch], logits: Tensor, sampling: Sampling) -> list[_Sample]:
        """Appends a token to every sample of the branches, whose distributions are `logits` [B, V]."""
        samples = [sample for branch in branches for sample in branch]
        rows = [row for row, branch in enumerate(branches) for _ in branch]
        device = logits.device
        draws = torch.stack([sample.uniforms[len(sample.tokens)] for sample in samples]).to(device)
        tokens, logprobs = draw_tokens(logits, torch.tensor(rows, device=device), draws, sampling)
        for drawn, token, logprob in zip(samples, tokens.tolist(), logprobs.tolist(), strict=True):
            drawn.tokens.append(token)
            drawn.logprobs.append(logprob)
        return samples

    def _finish(self, sample: _Sample, sampling: Sampling) -> Finish | None:
        if sample.tokens[-1] in self._policy.eos_token_ids and not sampling.ignore_eos:
            return "stop"
        if sampling.stop and self._stop_at(sample, sampling) is not None:
            return "stop"
        return "length" if len(sample.tokens) >= sampling.max_tokens else None

    def _stop_at(self, sample: _Sample, sampling: Sampling) -> int | None:
        """Where in the completion's text the first stop string begins."""
        text = self._text(sample)
        found = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def _text(self, sample: _Sample) -> str:
        tokenizer: Any = self._policy.tokenizer
        return tokenizer.decode(sample.tokens, skip_special_tokens=True)

    def _completion(self, sample: _Sample, sampling: Sampling, version: int) -> Completion:
        text = self._text(sample)
        if sampling.stop and (at := self._stop_at(sample, sampling)) is not None:
            text = text[:at]
        assert sample.finish is not None
        return Completion(
            prompt=sample.request.prompt,
            sample=sample.index,
            tokens=sample.tokens,
            logprobs=sample.logprobs,
            text=text,
            finish=sample.finish,
            version=version,
        )


def _part(cache: DecodeCache, branches: list[_Branch], running: int) -> list[_Branch]:
    """Splits the branches from `running` on by their samples' last token, and takes finished samples out.

    Forking copies the cache's rows, and so does leaving: rows without samples stay until there are enough of them, or
    until a fork copies anyway.
    """
    parted: list[list[_Branch]] = [[branch] for branch in branches[:running]]
    for branch in branches[running:]:
        by_token: dict[int, _Branch] = {}
        for sample in branch:
            if sample.finish is None:
                by_token.setdefault(sample.tokens[-1], []).append(sample)
        parted.append(list(by_token.values()))
    forked = any(len(parts) > 1 for parts in parted)
    empty = sum(not any(parts) for parts in parted)
    if not forked and empty < max(1, len(parted) // _LEAVE_SHARE):
        return [parts[0] if parts else [] for parts in parted]
    kept = [(row, part) for row, parts in enumerate(parted) for part in parts if part]
    cache.keep(torch.tensor([row for row, _ in kept], dtype=torch.int64))
    return [part for _, part in kept]


def _bytes_per_token(policy: Policy) -> int:
    """Keys and values of one token over all layers."""
    config = policy.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * policy.dtype.itemsize


def _device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
