"""vLLM's own scheduler and block manager over made-up workloads, without a model."""

import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_engines import save_model

BLOCK = 16  # tokens, as on a GPU


@dataclass(frozen=True, slots=True)
class Workload:
    """Groups of samples of one prompt each, of random lengths."""

    seed: int
    blocks: int  # of the cache
    running: int  # samples at a time
    samples: int = 40
    groups: int = 8
    longest: int = 90  # tokens of an answer


@dataclass(slots=True)
class Played:
    """What a workload came to."""

    steps: list[Any] = field(default_factory=list)  # who got how many tokens and which blocks, and what was left
    cached: list[str] = field(default_factory=list)  # blocks that others could begin with in the end, by their hashes
    answers: list[list[int]] = field(default_factory=list)
    thrown_out: int = 0  # samples that lost their blocks to others on the way


def make_scheduler(model: Path, work: Workload, *, ahead: bool, window: int | None = None) -> Any:
    """`ahead`: the scheduler that prepares a step while the last one runs, as vLLM does on a GPU. `window`: tokens that
    attention reaches back."""
    import torch
    from vllm.config import (  # pyright: ignore[reportMissingImports]
        CacheConfig,
        DeviceConfig,
        ModelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # pyright: ignore[reportMissingImports]
    from vllm.v1.core.sched.scheduler import Scheduler  # pyright: ignore[reportMissingImports]
    from vllm.v1.kv_cache_interface import (  # pyright: ignore[reportMissingImports]
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )
    from vllm.v1.structured_output import StructuredOutputManager  # pyright: ignore[reportMissingImports]

    config = VllmConfig(
        model_config=ModelConfig(model=str(model), dtype="float16", skip_tokenizer_init=True),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=work.running, max_num_batched_tokens=512, max_model_len=1024, async_scheduling=ahead,
            is_encoder_decoder=False,
        ),
        device_config=DeviceConfig("cpu"),
    )  # fmt: skip
    config.cache_config.block_size, config.cache_config.num_gpu_blocks = BLOCK, work.blocks  # a CPU has its own mind
    config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs = 512, work.running
    sizes: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float16}
    layers = FullAttentionSpec(**sizes) if window is None else SlidingWindowSpec(**sizes, sliding_window=window)
    cache = KVCacheConfig(work.blocks, [], [KVCacheGroupSpec(["layer"], layers)])
    kind = AsyncScheduler if ahead else Scheduler
    return kind(config, cache, StructuredOutputManager(config), block_size=BLOCK, hash_block_size=BLOCK)


def make_requests(work: Workload) -> list[Any]:
    from vllm.sampling_params import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.utils.hashing import sha256  # pyright: ignore[reportMissingImports]
    from vllm.v1.core.kv_cache_utils import (  # pyright: ignore[reportMissingImports]
        get_request_block_hasher,
        init_none_hash,
    )
    from vllm.v1.request import Request  # pyright: ignore[reportMissingImports]

    init_none_hash(sha256)
    draw, hasher = random.Random(work.seed), get_request_block_hasher(BLOCK, sha256)
    prompts = [[draw.randrange(5, 200) for _ in range(draw.randrange(1, 100))] for _ in range(work.groups)]
    requests = []
    for index in range(work.samples):
        params = SamplingParams(max_tokens=draw.randrange(1, work.longest), ignore_eos=True)
        params.update_from_generation_config({}, 2)
        prompt = prompts[index % work.groups]
        requests.append(Request(str(index), prompt, params, None, block_hasher=hasher))
    return requests


def play(scheduler: Any, requests: list[Any], *, ahead: bool) -> Played:
    """Runs `requests` to their end; the token of each is drawn from its number and the step's."""
    from vllm.v1.outputs import ModelRunnerOutput  # pyright: ignore[reportMissingImports]

    played, pool = Played(), scheduler.kv_cache_manager.block_pool
    for request in requests:
        scheduler.add_request(request)
    running: deque[tuple[Any, Any]] = deque()
    while scheduler.has_unfinished_requests():
        planned = scheduler.schedule()
        names, cached = list(planned.num_scheduled_tokens), planned.scheduled_cached_reqs
        played.thrown_out += len(planned.preempted_req_ids or ())
        played.steps.append(
            (
                dict(planned.num_scheduled_tokens),
                {new.req_id: new.block_ids for new in planned.scheduled_new_reqs},
                dict(zip(cached.req_ids, cached.new_block_ids, strict=True)),
                pool.get_num_free_blocks(),
            )
        )
        drawn = [
            [] if scheduler.requests[name].is_prefill_chunk else [10 + (7 * int(name) + len(played.steps)) % 150]
            for name in names
        ]
        places = {name: place for place, name in enumerate(names)}
        output = ModelRunnerOutput(
            req_ids=names, req_id_to_index=places, sampled_token_ids=drawn, logprobs=None, prompt_logprobs_dict={},
            pooler_output=[],
        )  # fmt: skip
        running.append((planned, output))
        if len(running) > ahead or not names:
            scheduler.update_from_output(*running.popleft())
    known = pool.cached_block_hash_to_block
    played.cached = sorted(map(str, known._cache))
    played.answers = [list(request.output_token_ids) for request in requests]
    return played


def save_shape(folder: Path) -> Path:
    return save_model(folder / "shape", "llama", max_position_embeddings=1024)
