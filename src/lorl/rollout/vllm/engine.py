"""The vLLM engine: in the trainer's process, on the trainer's base, its adapter slots written from the masters."""

import gc
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from lorl.errors import InfrastructureError, UserError
from lorl.experience import Completion
from lorl.plan.hardware import GIB
from lorl.policy.fold import fold
from lorl.policy.policy import Policy
from lorl.policy.shards import Sharers
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.proof import PublishProof
from lorl.rollout.vllm import slots
from lorl.rollout.vllm.launch import WAITING
from lorl.rollout.vllm.sampler import CountedSampler
from lorl.rollout.vllm.scheduling import skip_known_answers
from lorl.rollout.vllm.versions import Inside

_CUDA_PAGE = 2 * 2**20  # what device memory is mapped in


@dataclass(frozen=True, slots=True)
class _Published:
    version: int
    adapter_id: int  # new for every version: vLLM knows adapters by it
    slot: int
    masters: Mapping[str, nn.Parameter]
    links: Sequence[slots.Link]
    writes: int  # to the masters in their life so far: more of them later means that this version is stale


@dataclass(frozen=True, slots=True)
class PublishTimes:
    """Seconds of a publish by part."""

    gather: float = 0.0  # the masters and their places
    copy: float = 0.0
    activate: float = 0.0  # vLLM's registers
    slots: float = 0.0  # proof: slot against masters
    answers: float = 0.0  # proof: engine against trainer


class VllmEngine:
    """`Engine` over a running vLLM whose base is the policy's.

    Attributes:
        publish_times: of the last publish.
    """

    def __init__(
        self,
        launch: Callable[[], Inside],
        inside: Inside,
        policy: Policy,
        *,
        max_concurrent: int,
        adapter_slots: int,
        rank: int,
        rests: bool,
        sharers: Sharers | None = None,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        """`launch` makes a fresh vLLM over the same weights, for `rebuild`. `sharers` are the ranks that run one engine
        together, where there are several: whatever is called, is called on all of them. `let_go` has the trainer give
        back what its last pass still holds, before sampling."""
        self._launch = launch
        self._policy = policy
        self._rank = rank
        self._in_flight = max_concurrent + WAITING
        self._adapter_slots = adapter_slots
        self._rests = rests
        self._sharers = sharers
        self._let_go = let_go
        self.publish_times = PublishTimes()
        self._adopt(inside)
        self._proof = PublishProof(self, policy, self._place, prompt_tokens=inside.block_size + 4, agree=self._any_rank)

    @property
    def folds(self) -> bool:
        """Whether rollouts of an adapter add it into the base (`policy.fold`) instead of using its slot.

        The trainer then rounds as the fold does: `Policy.folds` is the same switch.
        """
        return self._policy.folds

    @folds.setter
    def folds(self, on: bool) -> None:
        self._policy.folds = on

    def publish(self, name: str, version: int, checksum: str) -> float:
        links, (gather, copy, activate) = self._place(name, version)
        clock = _Clock(self._policy.device)
        if (held := self._policy.checksum(name)) != checksum:  # of the masters, which the slots are compared with
            raise InfrastructureError(
                f"adapter {name!r} version {version}: the engine was given {held}, the trainer published {checksum}"
            )
        slots.check(links, f"adapter {name!r} version {version}")
        compared = clock.lap()
        self._proof.check(name, version)
        self.publish_times = PublishTimes(gather, copy, activate, compared, clock.lap())
        return gather + copy + activate

    def _place(self, name: str, version: int) -> tuple[Sequence[slots.Link], tuple[float, float, float]]:
        """A publish without its proof: the masters' places in the slot that they were copied to, and the seconds that
        it took to gather, copy and activate them."""
        clock = _Clock(self._policy.device)
        masters, before = self._policy.parameters(name), self._published.get(name)
        if before is None or any(
            now is not then for now, then in zip(masters.values(), before.masters.values(), strict=True)
        ):
            slot = before.slot if before else self._free_slot(name)
            slots.clear(self._inside.adapters.modules, slot)
            links = self._link(name, masters, slot)
        else:
            slot, links = before.slot, before.links
        gather = clock.lap()
        slots.write(links)
        copy = clock.lap()
        if before is not None:
            self._inside.unregister(before.adapter_id)
        self._last_id += 1
        self._inside.register(self._last_id, slot, self._rank)
        self._published[name] = _Published(version, self._last_id, slot, masters, links, _writes(masters))
        return links, (gather, copy, clock.lap())

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, adapter: str | None
    ) -> Generator[Completion]:
        if self._sharers is None:
            yield from self._answers(requests, sampling, adapter)
            return
        sampled = 0
        for completion in self._answers(requests, sampling, adapter):
            sampled ^= _digest(completion)
            yield completion
        _check_equal(self._sharers, sampled)

    def _answers(self, requests: Sequence[Request], sampling: Sampling, adapter: str | None) -> Generator[Completion]:
        if adapter is None:
            yield from self._sample(requests, sampling, 0, {})
            return
        published = self._current(adapter)
        # vLLM keys its prefix cache by the adapter's name, or by the salt: every version has its own.
        label = f"{adapter}@{published.version}.{published.adapter_id}"
        if not self.folds:
            from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

            request = LoRARequest(label, published.adapter_id, f"/{label}")  # the path is never opened
            yield from self._sample(requests, sampling, published.version, {"lora_request": request})
            return
        with fold(self._policy, adapter):
            yield from self._sample(requests, sampling, published.version, {}, salt=label)

    def rest(self) -> None:
        if not self._rests or self._resting:
            return
        if self._policy.device.type == "cuda":
            self._inside.engine.sleep(level=1)
        else:  # vLLM's CPU build cannot sleep: the cache's storage is let go, and vLLM's views of it stay
            self._inside.engine.reset_prefix_cache()
            self._storages = [(cache.untyped_storage(), cache.untyped_storage().nbytes()) for cache in self._caches()]
            for storage, _ in self._storages:
                storage.resize_(0)
        self._resting = True

    @property
    def resting_bytes(self) -> int:
        if not self._resting or self._policy.device.type != "cuda":
            return 0
        return sum(cache.untyped_storage().nbytes() for cache in self._caches())

    def wake(self) -> None:
        if not self._resting:
            return
        if self._policy.device.type == "cuda":
            self._make_room()
            self._inside.engine.wake_up()
        else:
            for storage, size in self._storages:
                storage.resize_(size)
            for cache in self._caches():
                cache.zero_()
        self._resting = False

    def rebuild(self) -> None:
        self.close()
        self._adopt(self._launch())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._published.clear()
        self._inside.shut_down(resting=self._resting)
        # Adapter slots and CUDA graphs go with them: an engine may be built in their place.
        del self._inside, self._sampler
        gc.collect()

    @property
    def proof(self) -> PublishProof:
        """What compares this engine with the trainer at every publish."""
        return self._proof

    @property
    def inside(self) -> Inside:
        """The running vLLM, for measurements and tests."""
        return self._inside

    def _adopt(self, inside: Inside) -> None:
        self._inside = inside
        inside.widen_logits()
        skip_known_answers(inside.blocks)
        self._sampler = CountedSampler(inside, device=self._policy.device, capacity=self._in_flight)
        self._published: dict[str, _Published] = {}
        self._last_id = 0
        self._last_request = 0
        self._resting = False
        self._closed = False
        self._storages: list[tuple[Any, int]] = []

    def _make_room(self) -> None:
        """Gives what training freed back to the device, where the cache is to be mapped. Raises UserError, on all ranks
        of the engine, where that is too little: vLLM would stop halfway."""
        caches, device = self._caches(), self._policy.device
        needed = sum(cache.untyped_storage().nbytes() + _CUDA_PAGE for cache in caches)
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(device)[0] < needed:
            gc.collect()  # what failed on the way may be held by its traceback
            torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        if self._any_rank(free < needed, "whether the KV cache can wake"):
            raise UserError(
                f"the KV cache of {needed / GIB:.1f} GiB cannot wake: training left {free / GIB:.1f} GiB free on "
                f"{device}; set rollout.memory_fraction below {min(free, needed) / total:.2f}"
            )

    def _any_rank(self, says: bool, what: str = "the proof of a publish") -> bool:
        return says if self._sharers is None else any(self._sharers.values(says, what))

    def _caches(self) -> list[Tensor]:
        return self._inside.kv_caches()

    def _free_slot(self, name: str) -> int:
        taken = {published.slot for published in self._published.values()}
        free = [slot for slot in range(self._adapter_slots) if slot not in taken]
        if not free:
            raise InfrastructureError(
                f"adapter {name!r} finds no slot: {sorted(self._published)} hold all {self._adapter_slots}; raise "
                "rollout.adapter_slots."
            )
        return free[0]

    def _link(self, name: str, masters: Mapping[str, nn.Parameter], slot: int) -> list[slots.Link]:
        tensors = {key: parameter.data for key, parameter in masters.items()}
        modules = {slots.module_of(key) for key in tensors}
        scaling = self._policy.scaling(name)
        return slots.link(
            tensors,
            {module: scaling[module] for module in modules},
            self._inside.adapters.modules,
            self._inside.packed_modules(),
            slot,
        )

    def _current(self, adapter: str) -> _Published:
        published = self._published.get(adapter)
        if published is None:
            raise InfrastructureError(f"adapter {adapter!r} was never published to the engine")
        if _writes(published.masters) != published.writes:
            raise InfrastructureError(
                f"adapter {adapter!r} changed after version {published.version} was published: rollouts would be "
                "stale; publish it first"
            )
        return published

    def _sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        version: int,
        options: Mapping[str, Any],
        salt: str | None = None,
    ) -> Generator[Completion]:
        self._let_go()
        self.wake()
        engine, params = self._inside.engine, self._parameters(sampling)
        waiting = deque((request, index) for request in requests for index in range(len(request.seeds)))
        running: dict[str, tuple[Request, int, str]] = {}  # by lorl's id: what it is, and vLLM's own id for it
        self._sampler.begin(sampling)
        try:
            while waiting or running:
                fresh: list[tuple[str, int]] = []
                while waiting and len(running) < self._in_flight:
                    request, index = waiting.popleft()
                    self._last_request += 1
                    name = str(self._last_request)
                    prompt: dict[str, Any] = {"prompt_token_ids": request.prompt.tokens}
                    if salt is not None:
                        prompt["cache_salt"] = salt
                    own = engine.add_request(name, prompt, params, **options)
                    running[name] = (request, index, own)
                    fresh.append((own, request.seeds[index]))
                if fresh:
                    self._sampler.add(fresh)
                finished = [output for output in engine.step() if output.finished]
                if finished:
                    yield from self._completions(finished, running, sampling, version)
        finally:
            if running:  # the caller left, or something raised
                engine.abort_request(list(running))
            self._sampler.end()

    def _completions(
        self, finished: Sequence[Any], running: dict[str, tuple[Request, int, str]], sampling: Sampling, version: int
    ) -> Generator[Completion]:
        ended = [running.pop(output.request_id) for output in finished]
        answers = [output.outputs[0] for output in finished]
        lengths = [(own, len(answer.token_ids)) for (_, _, own), answer in zip(ended, answers, strict=True)]
        tables = self._sampler.take(lengths)
        tokenizer: Any = self._policy.tokenizer
        texts = tokenizer.batch_decode([list(answer.token_ids) for answer in answers], skip_special_tokens=True)
        for (request, index, _), answer, logprobs, text in zip(ended, answers, tables, texts, strict=True):
            stops = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
            yield Completion(
                prompt=request.prompt,
                sample=index,
                tokens=list(answer.token_ids),
                logprobs=logprobs,
                text=text[: min(stops)] if stops else text,
                finish="length" if answer.finish_reason == "length" else "stop",
                version=version,
            )

    def _parameters(self, sampling: Sampling) -> Any:
        """vLLM is told when to end; how tokens are drawn is `CountedSampler`'s."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        return SamplingParams(
            temperature=1.0,
            max_tokens=sampling.max_tokens,
            stop=sampling.stop or None,
            stop_token_ids=None if sampling.ignore_eos else sorted(self._policy.eos_token_ids),
            ignore_eos=True,  # the ids above are the ones that lorl knows
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


class _Clock:
    """Seconds between laps, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._at = self._now()

    def lap(self) -> float:
        now = self._now()
        taken, self._at = now - self._at, now
        return taken

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _digest(completion: Completion) -> int:
    """63 bits of what was sampled."""
    text = f"{completion.prompt.id} {completion.sample} {completion.tokens}"
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


def _check_equal(sharers: Sharers, sampled: int) -> None:
    """Raises InfrastructureError unless all ranks of one engine sampled the same."""
    found = sharers.values(sampled, "checksums of a rollout")
    for rank, other in zip(sharers.ranks, found, strict=True):
        if other != found[0]:
            raise InfrastructureError(
                f"rank {rank} sampled other tokens than rank {sharers.ranks[0]} from the same requests: the ranks of a "
                "tensor-parallel vLLM need the same hardware and software"
            )


def _writes(masters: Mapping[str, nn.Parameter]) -> int:
    """How often the tensors were written to: torch counts in-place writes."""
    return sum(parameter._version for parameter in masters.values())
