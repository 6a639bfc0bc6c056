"""Proof that an engine samples from what the trainer holds: a few answers after every publish, scored by both.

The engine answers through its ordinary path (adapter, prefix cache, sampler); the trainer scores the same tokens. How
far the two are apart on the base alone is the noise floor of two implementations; with the adapter they may be twice as
far. A stale or missing adapter, a wrong scale, swapped projections, or keys and values cached under another version all
show as a distance above that, whatever the engine believes about itself. Which layers it comes from is then asked by
giving both sides one layer of the adapter at a time.
"""

import re
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
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
_NAMED = 3  # layers that differ, in the error
_PLACE = re.compile(r"^base_model\.model\.(.+)\.lora_B\b")
_LAYER = re.compile(r"^(.*?\.\d+)\.")


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
        self,
        engine: Sampler,
        policy: Policy,
        place: Callable[[str, int], object],
        *,
        prompt_tokens: int,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """`place` gives the engine an adapter, by name and version, as the trainer holds it now: what a publish does
        before its proof. `agree` tells whether any of the ranks that run this engine says True: to measure again is a
        call of all."""
        self._engine = engine
        self._policy = policy
        self._place = place
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
        """Raises DivergedError when the engine's answers are not those of the trainer's adapter; it names the layers
        that differ."""
        found, far = self._measured(adapter)
        if not far:
            return
        to_base = self.distance(adapter, samples=_SAMPLES, on_base=True)
        if not self._agree(not to_base <= self.bound):
            cause = "it samples from the base: the adapter is not applied"
        elif layers := self._layers_apart(adapter, version):
            rest = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
            cause = f"with one layer of the adapter at a time they differ in {', '.join(layers[:_NAMED])}{rest}"
        else:
            cause = (
                "with one layer of the adapter at a time they agree; the prefix cache may hold keys of another version"
            )
        raise DivergedError(
            f"adapter {adapter!r} version {version}: engine and trainer differ by {found:.1e} nats a token, and by "
            f"{self.floor:.1e} on the base (bound {self.bound:.1e}); {cause}."
        )

    def _measured(self, adapter: str) -> tuple[float, bool]:
        """The distance, and whether it is past the bound on any rank, also on many samples."""
        found, far = 0.0, True
        for samples in (_SAMPLES, _SURE * _SAMPLES):
            if far:
                found = self.distance(adapter, samples=samples)
                far = self._agree(not found <= self.bound)
        return found, far

    def _layers_apart(self, adapter: str, version: int) -> list[str]:
        """Layers in which engine and trainer differ when they have nothing else of the adapter; the first one with its
        modules of which the same is true."""
        modules = [found[1] for name in self._policy.parameters(adapter) if (found := _PLACE.match(name))]
        layers: dict[str, list[str]] = {}
        for module in modules:
            found = _LAYER.match(module)
            layers.setdefault(found[1] if found else module, []).append(module)

        def apart(kept: Collection[str]) -> bool:
            with self._without_others(adapter, version, kept):
                return self._measured(adapter)[1]

        wrong = [layer for layer, kept in layers.items() if apart(kept)]
        if wrong and len(layers[wrong[0]]) > 1:
            parts = [module for module in layers[wrong[0]] if apart([module])]
            if parts:
                wrong[0] += f" ({', '.join(part.removeprefix(wrong[0] + '.') for part in parts)})"
        self._place(adapter, version)
        return wrong

    @contextmanager
    def _without_others(self, adapter: str, version: int, kept: Collection[str]) -> Iterator[None]:
        """Inside, both sides have of the adapter what belongs to the modules `kept`."""
        masters = self._policy.parameters(adapter)
        others = [
            masters[name].data for name in masters if (found := _PLACE.match(name)) and found[1] not in kept
        ]  # `data`: a write there does not count as one to the adapter
        values = [tensor.to("cpu", copy=True) for tensor in others]
        try:
            for tensor in others:
                tensor.zero_()
            self._place(adapter, version)
            yield
        finally:
            for tensor, value in zip(others, values, strict=True):
                tensor.copy_(value)

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
