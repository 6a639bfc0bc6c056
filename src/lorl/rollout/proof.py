"""Proof that an engine samples from what the trainer holds: a few answers after every publish, scored by both.

The engine answers through its ordinary path (adapter, prefix cache, sampler); the trainer scores the same tokens. How
far the two are apart on the base alone is the noise floor of two implementations; with the adapter they may be twice as
far. A stale or missing adapter, a wrong scale, swapped projections, or keys and values cached under another version all
show as a distance above that, whatever the engine believes about itself.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import torch

from lorl.errors import DivergedError
from lorl.experience import Completion, Outcome, Prompt
from lorl.packing import pack
from lorl.policy.policy import Policy
from lorl.rollout.engine import Request, Sampling
from lorl.seeding import stable_seed

_FACTOR = 2.0  # times the noise floor
_SLACK = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # nats: a floor that happens to be tiny is no bound
_SAMPLES, _TOKENS = 8, 8
_SURE = 8  # a distance above the bound is measured again on as many times more samples before anything is stopped


class Sampler(Protocol):
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None
    ) -> Generator[Completion]: ...


class PublishProof:
    """Compares engine and trainer on the same few prompts, publish after publish.

    The prompt is long enough to fill blocks of the engine's prefix cache: keys and values of an older version, were
    they found there, would be used.
    """

    def __init__(
        self, engine: Sampler, policy: Policy, *, prompt_tokens: int, agree: Callable[[bool], bool] = bool
    ) -> None:
        """`agree` tells whether any of the ranks that run this engine says True: to measure again is a call of all."""
        self._engine = engine
        self._policy = policy
        self._agree = agree
        generator = torch.Generator().manual_seed(stable_seed("proof") % 2**63)
        vocabulary = policy.config.get_text_config().vocab_size
        self._tokens = torch.randint(0, vocabulary, (prompt_tokens,), generator=generator).tolist()
        self._floor: float | None = None

    @property
    def floor(self) -> float:
        """Mean |log-probability difference| of engine and trainer on the base, measured once."""
        if self._floor is None:
            self._floor = self.distance(None, samples=_SURE * _SAMPLES)
        return self._floor

    @property
    def bound(self) -> float:
        return _FACTOR * self.floor + _SLACK.get(self._policy.dtype, 5e-3)

    def forget(self) -> None:
        """The base was replaced: its noise floor is measured anew."""
        self._floor = None

    def check(self, adapter: str, version: int) -> None:
        """Raises DivergedError when the engine's answers are not those of the trainer's adapter."""
        found = self.distance(adapter, samples=_SAMPLES)
        if not self._agree(not found <= self.bound):
            return
        found = self.distance(adapter, samples=_SURE * _SAMPLES)
        if self._agree(not found <= self.bound):
            to_base = self.distance(adapter, samples=_SAMPLES, on_base=True)
            cause = (
                "it samples from the base: the adapter is not applied"
                if to_base <= self.bound
                else "its slots hold the trainer's values, so they act on the wrong layers, or the prefix cache holds "
                "keys of another version"
            )
            raise DivergedError(
                f"adapter {adapter!r} version {version}: engine and trainer differ by {found:.1e} nats a token, and by "
                f"{self.floor:.1e} on the base (bound {self.bound:.1e}); {cause}."
            )

    @torch.no_grad()
    def distance(self, adapter: str | None, *, samples: int, on_base: bool = False) -> float:
        """Mean |log-probability difference| over a few sampled tokens: the engine's `adapter` against the trainer's, or
        against the trainer's base."""
        prompt = Prompt("proof", self._tokens, "")
        request = Request(prompt, [stable_seed("proof", index) for index in range(samples)])
        answers = list(self._engine.generate([request], Sampling(max_tokens=_TOKENS, ignore_eos=True), adapter=adapter))
        answers.sort(key=lambda answer: answer.sample)
        experience = pack(answers, [Outcome("ok", 0.0)] * len(answers))
        scorer = None if on_base else adapter
        scores = self._policy.logprobs(experience.forest.to(self._policy.device), adapter=scorer)
        return float((scores.logprobs.cpu() - experience.rollout_logprobs).abs().mean())
