"""Starting vLLM in this process: its memory decided beforehand, its base left where the trainer can read it."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig

from lorl.config import RunConfig
from lorl.errors import InfrastructureError, UserError
from lorl.plan.demand import ENGINE_TOKENS
from lorl.plan.lora import SLOT_RANKS
from lorl.plan.lora import slot_rank as next_rank
from lorl.policy.load import weights_path
from lorl.rollout.vllm.versions import Inside

WAITING = 64  # samples beyond the running ones that vLLM is given, so that a finished one is replaced at once


@dataclass(frozen=True, slots=True)
class Shape:
    """What the engine is started with."""

    rank: int  # of the slots
    slots: int  # adapters that are live at once
    max_tokens: int  # prompt and completion
    kv_bytes: int
    can_rest: bool  # the KV cache lies in memory that can be unmapped


def slot_rank(lora: LoraConfig) -> int:
    """The smallest rank vLLM knows that holds the adapter. Raises UserError for what its kernels don't compute."""
    if lora.use_dora or lora.lora_bias or lora.modules_to_save:
        what = "DoRA" if lora.use_dora else "lora_bias" if lora.lora_bias else "modules_to_save"
        raise UserError(f"adapter: vLLM does not compute {what}; use rollout.engine=torch.")
    rank = max([lora.r, *(lora.rank_pattern or {}).values()])
    if rank > SLOT_RANKS[-1]:
        raise UserError(f"adapter.rank={rank} is more than vLLM's largest, {SLOT_RANKS[-1]}; use rollout.engine=torch.")
    return next_rank(rank)


def slots_compute(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether vLLM's adapter kernels take this base: on a GPU those of half precision alone."""
    return device.type == "cpu" or dtype in (torch.bfloat16, torch.float16)


def check_mode(mode: str, device: torch.device, dtype: torch.dtype, *, parts: bool = False) -> None:
    """Raises UserError where rollout.adapter_mode=`mode` cannot be had; `parts`: of the base lie on several ranks."""
    if slots_compute(device, dtype) or not (mode == "adapter" or parts):
        return
    instead = "strategy=ddp" if parts else "rollout.adapter_mode=fold"
    raise UserError(
        f"model.dtype={str(dtype).removeprefix('torch.')}: vLLM's adapter kernels compute bfloat16 alone on a GPU; use "
        f"model.dtype=bfloat16, {instead}, or rollout.engine=torch."
    )


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that CUDA graphs are captured for, up to `most`: two to each doubling.

    vLLM's own are all multiples of 8 or 16, and capturing them is much of its start. A batch is padded to the next
    size; decoding a few more rows takes hardly longer, since what takes the time is reading the weights.
    """
    powers = [2**power for power in range(most.bit_length())]
    return sorted({size for power in powers for size in (power, power * 3 // 2) if size <= most} | {most})


def compilation(config: RunConfig) -> dict[str, Any]:
    """vLLM's CompilationConfig on a GPU: by default graphs of decoding steps and nothing compiled, which starts several
    times sooner and decodes a few percent slower ("Starting vLLM" in docs/performance.md)."""
    graphs: dict[str, Any] = {"cudagraph_capture_sizes": graph_sizes(config.rollout.max_concurrent)}
    return graphs if config.rollout.compile else graphs | {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


def batched_tokens(config: RunConfig) -> int:
    """Tokens in one pass of vLLM."""
    return config.rollout.max_batched_tokens or max(ENGINE_TOKENS, config.rollout.max_concurrent)


def start(config: RunConfig, device: torch.device, dtype: torch.dtype, shape: Shape, **extra: Any) -> Inside:
    """A running vLLM engine, after `versions.prepare`. `extra` goes to vLLM's EngineArgs."""
    from vllm import EngineArgs, LLMEngine  # pyright: ignore[reportMissingImports]

    rollout, path = config.rollout, weights_path(config.model)
    arguments: dict[str, Any] = {
        "model": path,
        "tokenizer": path,
        "revision": config.model.revision,
        "trust_remote_code": config.model.trust_remote_code,
        "dtype": str(dtype).removeprefix("torch."),
        "load_format": "dummy" if config.model.random_weights else "auto",
        "seed": config.seed % 2**31,
        "max_model_len": shape.max_tokens,
        "max_num_seqs": rollout.max_concurrent,
        "max_num_batched_tokens": batched_tokens(config),
        "enable_prefix_caching": rollout.prefix_caching,
        "enforce_eager": rollout.enforce_eager or device.type == "cpu",
        "kv_cache_memory_bytes": shape.kv_bytes,
        "gpu_memory_utilization": 0.01,  # only compared with what is free, once kv_cache_memory_bytes is given
        "enable_lora": True,
        "max_loras": shape.slots,
        "max_lora_rank": shape.rank,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if device.type == "cuda":
        arguments["compilation_config"] = compilation(config)
    if device.type == "cuda" and shape.can_rest:
        arguments |= {"enable_sleep_mode": True, "worker_cls": "lorl.rollout.vllm.worker.RestingWorker"}
    try:
        inside = Inside(LLMEngine.from_engine_args(EngineArgs(**(arguments | extra))))
    except torch.OutOfMemoryError as error:
        raise InfrastructureError(f"vLLM ran out of memory while starting: {_line(error)}") from error
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"vLLM cannot start with this configuration: {_line(error)}") from error
    if inside.borrowed:
        inside.shut_down(resting=False)
        raise UserError(
            f"model.path={config.model.path}: this vLLM has no model of its own for it and computes with transformers' "
            "modules, which it changes for the trainer as well; use rollout.engine=torch."
        )
    return inside


def _line(error: BaseException) -> str:
    errors: Any = getattr(error, "errors", None)  # pydantic's first line says how many there are, and not what
    reason: Any = errors()[0]["msg"] if errors is not None else error
    return str(reason).strip().split("\n", 1)[0][:300]
