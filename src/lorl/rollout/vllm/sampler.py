"""Tokens drawn inside vLLM by lorl's counted randomness, their log-probabilities kept on the device.

Asked for log-probabilities, vLLM builds Python objects for every token and loses 40% of its throughput at batch 256.
Here they are a by-product of the draw: one number a token, written into a table that stays on the device and is read
once a sample is finished. And since uniform number i of a sample's seed decides its token i, what is sampled does not
depend on order or batching, only on the last digits of the logits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from lorl.rollout.engine import Sampling
from lorl.rollout.sampling import check_finite, draw_scores, scores_of, uniforms
from lorl.rollout.vllm.versions import Inside

logger = logging.get_logger(__name__)


class CountedSampler:
    """Stands in for vLLM's sampler while samples are registered; what vLLM draws for itself (warm-up) goes through its
    own."""

    def __init__(self, inside: Inside, *, device: torch.device, capacity: int) -> None:
        self._inside = inside
        self._device = device
        self._capacity = capacity
        self._free: list[int] = list(range(capacity))
        self._slots: dict[str, int] = {}  # request id -> row of the tables
        self._sampling = Sampling()
        self._uniforms = torch.zeros(0)
        self._logprobs = torch.zeros(0)
        self._ids: list[str] = []  # of the running batch
        self._rows = self._prompts = torch.zeros(0, dtype=torch.int64)
        sampler = inside.runner.sampler
        self._own = sampler.forward
        self._draw = CompiledDraw() if device.type == "cuda" else draw_into
        sampler.forward = self._forward

    def begin(self, sampling: Sampling) -> None:
        """Forgets all samples and makes tables for `sampling.max_tokens` tokens a sample."""
        self._sampling = sampling
        self._free = list(range(self._capacity))
        self._slots.clear()
        self._ids = []
        # The extra row and column take what belongs to no token: of prompts and answers that are read in parts, and of
        # requests just ended.
        shape = (self._capacity + 1, sampling.max_tokens + 1)
        if self._logprobs.shape != shape:
            self._uniforms = torch.zeros(shape, dtype=torch.float64, device=self._device)
            self._logprobs = torch.zeros(shape, device=self._device)

    def add(self, requests: Sequence[tuple[str, int]]) -> None:
        """Registers samples by (request id, seed); at most `capacity` at a time."""
        rows = [self._free.pop() for _ in requests]
        self._slots |= {request: row for (request, _), row in zip(requests, rows, strict=True)}
        count = self._sampling.max_tokens
        numbers = torch.from_numpy(np.stack([uniforms(seed, count) for _, seed in requests]))
        self._uniforms[torch.tensor(rows, device=self._device), :count] = numbers.to(self._device)

    def take(self, requests: Sequence[tuple[str, int]]) -> list[list[float]]:
        """The log-probabilities of finished samples given as (request id, tokens); their rows are free again. Raises
        DivergedError where one is not a number."""
        rows = [self._slots.pop(request) for request, _ in requests]
        table = self._logprobs[torch.tensor(rows, device=self._device)].cpu().numpy()
        self._free += rows
        found = [values[:count] for values, (_, count) in zip(table, requests, strict=True)]
        check_finite(torch.from_numpy(np.concatenate(found)))
        return [values.tolist() for values in found]

    def end(self) -> None:
        self._slots.clear()

    def _forward(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._slots:
            return self._own(logits, sampling_metadata, *args, **kwargs)
        from vllm.v1.outputs import SamplerOutput  # pyright: ignore[reportMissingImports]

        tokens = self._draw(logits, self._batch(logits.shape[0]), self._sampling)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)

    def _batch(self, count: int) -> "Batch":
        """The running batch of `count` rows, on the device.

        What only changes when requests come and go is kept there, and sent through pinned memory: a copy from pageable
        memory would wait for the device, and vLLM's next step could not be prepared meanwhile.
        """
        ids = self._inside.runner.input_batch.req_ids
        if ids != self._ids:
            self._ids = list(ids)
            known = [self._slots.get(request, self._capacity) for request in ids]
            lengths = self._inside.prompt_lengths(count).tolist()
            pinned = torch.tensor([known, lengths], pin_memory=self._device.type == "cuda")
            self._rows, self._prompts = pinned.to(self._device, non_blocking=True)
        lengths, discarded = self._inside.sequence_lengths(count), self._inside.discarded(count)
        return Batch(self._rows, self._prompts, lengths, discarded, self._uniforms, self._logprobs)


class Batch(NamedTuple):
    """What a draw reads besides the logits, and where it writes."""

    rows: Tensor  # int64[B], each batch row's row of the tables
    prompts: Tensor  # int64[B], tokens of its prompt
    lengths: Tensor  # int32[B], its tokens so far
    discarded: Tensor  # bool[B], whether vLLM has a later token of it already: it reads it again, part by part
    uniforms: Tensor  # float64[capacity + 1, max_tokens + 1], the numbers that decide the tokens
    logprobs: Tensor  # float32, likewise: takes their log-probabilities


def draw_into(logits: Tensor, batch: Batch, sampling: Sampling) -> Tensor:
    """int32[B, 1]: the next token of each batch row, whose log-probability goes to its place in the table."""
    truncation = sampling if sampling.truncates else None
    return _draw_scores(scores_of(logits, sampling), batch, sampling.temperature == 0, truncation)


def _draw_scores(scores: Tensor, batch: Batch, greedy: bool, truncation: Sampling | None = None) -> Tensor:
    extra, last = batch.uniforms.shape[0] - 1, batch.uniforms.shape[1] - 1
    rows = batch.rows.where(~batch.discarded, extra)
    position = batch.lengths - batch.prompts
    position = position.where((position >= 0) & (position <= last), last)
    uniform = batch.uniforms[rows, position]
    tokens, found = draw_scores(scores, None, uniform, greedy=greedy, truncation=truncation)
    batch.logprobs[rows, position] = found
    return tokens.to(torch.int32).unsqueeze(-1)


class CompiledDraw:
    """`draw_into` as a few kernels. Its thirty operations one by one cost the host 1.2 ms a step at batch 256, which
    vLLM's next step waits for."""

    def __init__(self) -> None:
        self._run = torch.compile(_draw_scores)

    def __call__(self, logits: Tensor, batch: Batch, sampling: Sampling) -> Tensor:
        if sampling.truncates:  # sorts, which the compiler leaves as they are
            return draw_into(logits, batch, sampling)
        scores = scores_of(logits, sampling)  # outside: the compiler makes a tensor of a temperature that changes
        sized = (scores, batch.rows, batch.prompts, batch.lengths, batch.discarded)
        for tensor in sized:  # the batch's size changes from step to step
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        for table in (batch.uniforms, batch.logprobs):
            torch._dynamo.maybe_mark_dynamic(table, 1)
        greedy = sampling.temperature == 0
        dynamo: Any = torch._dynamo
        try:
            return self._run(scores, batch, greedy)
        except dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().split("\n", 1)[0][:200]
            logger.warning(f"the draw of tokens can't be compiled, so rollouts run slower: {reason}")
            self._run = _draw_scores
            return self._run(scores, batch, greedy)
