"""One budget for the device: the base, the KV cache and what training needs, decided before anything is loaded.

The formulas are those of `lorl plan`.
"""

import math
from dataclasses import dataclass
from typing import Any

from lorl.errors import UserError
from lorl.plan import footprint
from lorl.plan.hardware import GIB, RESERVE
from lorl.plan.lora import lora_on
from lorl.plan.shape import Shape


@dataclass(frozen=True, slots=True)
class Budget:
    kv_bytes: int
    rests: bool  # the KV cache gives its memory back while the policy trains


def budget(
    *,
    total: int,
    free: int,
    base: int,
    adapters: int,
    engine: int,
    training: int,
    fraction: float | None,
    smallest: int,
    fullest: int,
    rest: str,
) -> Budget:
    """How large the KV cache is, and whether it must rest between rollouts. All in bytes.

    Args:
        total, free: the device's memory, and what of it nobody holds yet.
        base: the frozen weights; adapters: masters, optimizer state and slots; engine: vLLM's graphs and buffers.
        training: the largest forward and backward pass.
        fraction: `rollout.memory_fraction` of `total` for the KV cache; None: the least of what rollouts can fill, 0.4,
            and what fits.
        smallest: a KV cache that holds one sample; fullest: one that no rollout fills.
        rest: `rollout.rest`: auto, always or never.

    Raises:
        UserError: it cannot fit, with the largest fraction that does.
    """
    room = free - base - adapters - engine - int(RESERVE * total)
    if room < training:
        raise UserError(
            f"the base ({_gib(base)}) and a training pass ({_gib(training)}) do not fit the device's {_gib(free)}; "
            "lower parallel.microbatch_tokens, or set model.gradient_checkpointing=true."
        )
    cache = footprint.kv_cache(
        total=total,
        room=room,
        training=training,
        fraction=fraction,
        smallest=smallest,
        fullest=fullest,
        rest=rest,
    )
    if not smallest <= cache.wanted <= cache.most:
        advice = (
            f"set rollout.memory_fraction={_two_digits(cache.most / total):g}"
            if cache.most >= smallest
            else "use a smaller model"
        )
        if rest == "never":
            advice += ", or rollout.rest=auto"
        held = f"the base ({_gib(base)}), adapters ({_gib(adapters)}), vLLM's graphs and buffers ({_gib(engine)})"
        raise UserError(
            f"rollout.memory_fraction asks for {_gib(cache.wanted)} of KV cache: beside {held} and what training needs "
            f"({_gib(training)}), at most {_gib(max(cache.most, 0))} of the device's {_gib(total)} are free, and one "
            f"sample takes {_gib(smallest)}; {advice}."
        )
    return Budget(cache.wanted, cache.rests)


def training_bytes(
    config: Any,
    tokens: int,
    *,
    itemsize: int,
    checkpointing: bool,
    rank: int = 32,
    masked: int = 0,
    entropy: bool = False,
    away: bool = False,
) -> int:
    """What a packed pass over `tokens` tokens holds at its largest, beyond weights and adapters (of `rank`, on every
    linear layer).

    `config` is transformers', of the decoder. `masked` is how many tokens the trees have that dense attention masks are
    made for (on a CPU). `away`: what layers keep waits in host memory.
    """
    shape = Shape.of(config)
    half = itemsize == 2
    how = footprint.Pass(itemsize, eager=not half, recompute=checkpointing, entropy=entropy, away=away, span=masked)
    lora = lora_on(shape, rank, "all-linear")
    return footprint.training_peak_bytes(shape, lora, tokens, tokens, how, "cuda" if half else "cpu")


def adapter_bytes(
    config: Any, rank: int, slots: int, *, itemsize: int, learning: int = 1, frozen: int = 0, ways: int = 1
) -> int:
    """`learning` adapters of `rank` on every linear layer, with gradients and optimizer, `frozen` ones without, and the
    slots of an engine of `ways` ranks."""
    shape = Shape.of(config)
    lora = lora_on(shape, rank, "all-linear")
    masters = learning * footprint.adapter_bytes(lora.parameters, learns=True)
    masters += frozen * footprint.adapter_bytes(lora.parameters, learns=False)
    return masters + footprint.slot_bytes(shape, lora, itemsize, slots, ways)


def engine_bytes(config: Any, tokens: int, rows: int, *, itemsize: int, ways: int = 1) -> int:
    """vLLM's graphs and buffers on a GPU, with passes over `tokens` tokens and `rows` samples at once."""
    return footprint.engine_bytes(Shape.of(config), itemsize, tokens, rows, ways)


def moment_bytes(config: Any, rank: int) -> int:
    """AdamW's moments of one adapter of `rank` on every linear layer."""
    return lora_on(Shape.of(config), rank, "all-linear").parameters * footprint.ADAMW_BYTES


def kv_bytes_per_token(config: Any, itemsize: int, ways: int = 1) -> int:
    """Keys and values of one token over all layers, on each of `ways` tensor-parallel ranks."""
    return footprint.kv_bytes(Shape.of(config), itemsize, ways)


def _two_digits(fraction: float) -> float:
    """Of a positive number the first two digits that count; what is more is cut off, so that it still fits."""
    digits = 1 - math.floor(math.log10(fraction))
    return math.floor(fraction * 10**digits) / 10**digits


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
