"""The embedded engine: batched sampling on the trainer's own weights, in its process, on any device.

Sequences are decoded together. The samples of a prompt share its keys and values, rows leave the batch as they
finish, and waiting prompts take their place.
"""

from collections import deque
from collections.abc import Iterator, Sequence
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
from lorl.rollout.sampling import sample, uniforms

_PREFILL_TOKENS = 8192  # prompts packed into one pass
_LEAVE_SHARE = 8  # finished rows leave once they are an eighth of the batch: each leaving copies the cache


@dataclass(slots=True)
class _Row:
    request: Request
    sample: int
    uniforms: Tensor  # float64[max_tokens]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None


class TorchEngine:
    """`Engine` over a `Policy`. It holds no weights: publishing records which version the policy's adapter is at, and
    generating refuses to run on anything else."""

    def __init__(self, policy: Policy, *, max_concurrent: int = 256, memory_fraction: float = 0.4) -> None:
        self._policy = policy
        self._max_concurrent = max_concurrent
        self._cache_tokens = int(memory_fraction * _device_memory(policy.device) / _bytes_per_token(policy))
        self._published: dict[str, tuple[int, str]] = {}

    def publish(self, name: str, version: int, checksum: str) -> None:
        held = self._policy.checksum(name)
        if held != checksum:
            raise InfrastructureError(
                f"adapter {name!r} version {version}: the engine holds {held}, the trainer published {checksum}"
            )
        self._published[name] = (version, checksum)

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None) -> Iterator[Completion]:
        version = self._version(adapter)
        waiting = deque(requests)
        cache = DecodeCache(self._policy.device)
        rows: list[_Row] = []
        while waiting or rows:
            if admitted := self._take(waiting, len(rows), sampling):
                fresh, logits = self._prefill(cache, admitted, sampling, adapter)
                self._draw(fresh, logits, sampling)
                rows += fresh
            else:
                self._draw(rows, self._step(cache, rows, adapter), sampling)
            for row in rows:
                if row.finish is None and (finish := self._finish(row, sampling)):
                    row.finish = finish
                    yield self._completion(row, sampling, version)
            rows = _leave(cache, rows)

    def rest(self) -> None:
        """Nothing to give back: the cache lives only inside `generate`."""

    def wake(self) -> None:
        """Nothing to take."""

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
    ) -> tuple[list[_Row], Tensor]:
        """Runs the prompts packed, once each. Returns their rows and the logits [B, V] of each row's first token."""
        samples = [len(request.seeds) for request in requests]
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
        cache.admit(layout.recorded, packed.path, samples)
        last = torch.stack([path[-1] for path in packed.path]).to(device)
        logits = self._policy.logits(hidden[last])
        rows = [
            _Row(request, index, torch.from_numpy(uniforms(seed, sampling.max_tokens)))
            for request in requests
            for index, seed in enumerate(request.seeds)
        ]
        return rows, logits.repeat_interleave(torch.tensor(samples, device=device), dim=0)

    @torch.inference_mode()
    def _step(self, cache: DecodeCache, rows: list[_Row], adapter: str | None) -> Tensor:
        """Feeds each row's last token; logits [B, V] of the next."""
        tokens = torch.tensor([row.tokens[-1] for row in rows], device=self._policy.device)
        cache.begin()
        hidden = self._policy.hidden(cache, tokens, cache.positions, adapter=adapter)
        cache.end()
        return self._policy.logits(hidden)

    def _draw(self, rows: list[_Row], logits: Tensor, sampling: Sampling) -> None:
        """Appends a token to every row. A finished row still in the batch goes on for nothing, up to its limit."""
        limit = sampling.max_tokens - 1
        draws = torch.stack([row.uniforms[min(len(row.tokens), limit)] for row in rows])
        tokens, logprobs = sample(logits, draws, sampling)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if row.finish is None:
                row.tokens.append(token)
                row.logprobs.append(logprob)

    def _finish(self, row: _Row, sampling: Sampling) -> Finish | None:
        if row.tokens[-1] in self._policy.eos_token_ids and not sampling.ignore_eos:
            return "stop"
        if sampling.stop and self._stop_at(row, sampling) is not None:
            return "stop"
        return "length" if len(row.tokens) >= sampling.max_tokens else None

    def _stop_at(self, row: _Row, sampling: Sampling) -> int | None:
        """Where in the completion's text the first stop string begins."""
        text = self._text(row)
        found = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def _text(self, row: _Row) -> str:
        tokenizer: Any = self._policy.tokenizer
        return tokenizer.decode(row.tokens, skip_special_tokens=True)

    def _completion(self, row: _Row, sampling: Sampling, version: int) -> Completion:
        text = self._text(row)
        if sampling.stop and (at := self._stop_at(row, sampling)) is not None:
            text = text[:at]
        assert row.finish is not None
        return Completion(
            prompt=row.request.prompt,
            sample=row.sample,
            tokens=row.tokens,
            logprobs=row.logprobs,
            text=text,
            finish=row.finish,
            version=version,
        )


def _leave(cache: DecodeCache, rows: list[_Row]) -> list[_Row]:
    """Drops finished rows once there are enough of them to be worth the copy."""
    alive = [index for index, row in enumerate(rows) if row.finish is None]
    if len(rows) - len(alive) < max(1, len(rows) // _LEAVE_SHARE):
        return rows
    cache.keep(torch.tensor(alive, dtype=torch.int64))
    return [rows[index] for index in alive]


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
