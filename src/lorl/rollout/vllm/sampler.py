"""Tokens drawn inside vLLM by lorl's counted randomness, their log-probabilities kept on the device.

Asked for log-probabilities, vLLM builds Python objects for every token and loses 40% of its throughput at batch 256.
Here they are a by-product of the draw: one number a token, written into a table that stays on the device and is read
once a sample is finished. And since uniform number i of a sample's seed decides its token i, what is sampled does not
depend on order or batching, only on the last digits of the logits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from lorl.rollout.engine import Sampling
from lorl.rollout.sampling import check_finite, draw, draw_scores, uniforms
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
        self._batch: list[str] = []
        self._rows = self._prompts = torch.zeros(0, dtype=torch.int64)
        sampler = inside.runner.sampler
        self._own = sampler.forward
        self._draw = CompiledDraw() if device.type == "cuda" else _draw_into
        sampler.forward = self._forward

    def begin(self, sampling: Sampling) -> None:
        """Forgets all samples and makes tables for `sampling.max_tokens` tokens a sample."""
        self._sampling = sampling
        self._free = list(range(self._capacity))
        self._slots.clear()
        self._batch = []
        # The extra row and column take what belongs to no token: rows of partial prefills, and of requests just ended.
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

        rows, prompts, lengths = self._where(logits.shape[0])
        tokens = self._draw(logits, rows, prompts, lengths, self._uniforms, self._logprobs, self._sampling)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)

    def _where(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """On the device, of every batch row: its row of the tables int64[B], the tokens of its prompt int64[B], and its
        tokens so far int32[B].

        What only changes when requests come and go is kept on the device, and sent through pinned memory: a copy from
        pageable memory would wait for the device, and vLLM's next step could not be prepared meanwhile.
        """
        ids = self._inside.runner.input_batch.req_ids
        if ids != self._batch:
            self._batch = list(ids)
            known = [self._slots.get(request, self._capacity) for request in ids]
            lengths = self._inside.prompt_lengths(count).tolist()
            pinned = torch.tensor([known, lengths], pin_memory=self._device.type == "cuda")
            self._rows, self._prompts = pinned.to(self._device, non_blocking=True)
        return self._rows, self._prompts, self._inside.sequence_lengths(count)


def _draw_into(
    logits: Tensor,
    rows: Tensor,
    prompts: Tensor,
    lengths: Tensor,
    uniforms: Tensor,
    logprobs: Tensor,
    sampling: Sampling,
) -> Tensor:
    """int32[B, 1]: the next token of each batch row. Its log-probability goes to its place in `logprobs`, where
    `uniforms` has the number that decides it: [capacity + 1, max_tokens + 1] both."""
    position = _position(lengths - prompts, uniforms)
    tokens, found = draw(logits, None, uniforms[rows, position], sampling)
    logprobs[rows, position] = found
    return tokens.to(torch.int32).unsqueeze(-1)


def _draw_scores_into(
    scores: Tensor,
    rows: Tensor,
    prompts: Tensor,
    lengths: Tensor,
    uniforms: Tensor,
    logprobs: Tensor,
    greedy: bool,
) -> Tensor:
    """`_draw_into` without what differs from run to run in floats: torch's compiler makes tensors of those."""
    position = _position(lengths - prompts, uniforms)
    tokens, found = draw_scores(scores, None, uniforms[rows, position], greedy=greedy, truncation=None)
    logprobs[rows, position] = found
    return tokens.to(torch.int32).unsqueeze(-1)


def _position(made: Tensor, table: Tensor) -> Tensor:
    """Columns of the table: the last one, which belongs to no token, for rows that are not at one of theirs."""
    last = table.shape[1] - 1
    return made.where((made >= 0) & (made <= last), last)


class CompiledDraw:
    """`_draw_into` as a few kernels. Its thirty operations one by one cost the host 1.2 ms a step at batch 256, which
    vLLM's next step waits for."""

    def __init__(self) -> None:
        self._run = torch.compile(_draw_scores_into)

    def __call__(
        self,
        logits: Tensor,
        rows: Tensor,
        prompts: Tensor,
        lengths: Tensor,
        uniforms: Tensor,
        logprobs: Tensor,
        sampling: Sampling,
    ) -> Tensor:
        if sampling.truncates:  # sorts, which the compiler leaves as they are
            return _draw_into(logits, rows, prompts, lengths, uniforms, logprobs, sampling)
        scores = logits if sampling.temperature in (0, 1) else logits.float() / sampling.temperature
        for tensor in (scores, rows, prompts, lengths):  # the batch's size changes from step to step
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        torch._dynamo.maybe_mark_dynamic(uniforms, 1)
        torch._dynamo.maybe_mark_dynamic(logprobs, 1)
        arguments = (scores, rows, prompts, lengths, uniforms, logprobs, sampling.temperature == 0)
        dynamo: Any = torch._dynamo
        try:
            return self._run(*arguments)
        except dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().split("\n", 1)[0][:200]
            logger.warning(f"the draw of tokens can't be compiled, so rollouts run slower: {reason}")
            self._run = _draw_scores_into
            return self._run(*arguments)
