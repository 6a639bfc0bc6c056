"""Whether what the plan says of this device can be had, before anything is loaded."""

import math

from lorl.errors import UserError
from lorl.plan import memory as plan
from lorl.plan.hardware import GIB


def check(held: plan.Memory, rest: str, *, has_slots: bool) -> None:
    """Raises UserError where the KV cache that is wanted, or training, does not fit, with the largest fraction that
    does. `rest` is `rollout.rest`; `has_slots`: vLLM computes adapters beside this base, so that it need not fold."""
    cache, total = held.cache, held.capacity
    base, fold = _sum(held, plan.BASE, plan.COPY), _sum(held, plan.FOLD)
    training = _gib(cache.training + fold)
    free = total - _sum(held, plan.OTHERS)
    if cache.room < cache.training:
        raise UserError(
            f"the base ({_gib(base)}) and a training pass ({training}) do not fit the device's "
            f"{_gib(free)}; lower parallel.microbatch_tokens, or set model.gradient_checkpointing=true."
        )
    if held.has_cache:
        return
    advice = (
        f"set rollout.memory_fraction={_two_digits(cache.most / total):g}"
        if cache.most >= cache.smallest
        else "use a smaller model"
    )
    if has_slots and fold and cache.most < cache.smallest <= cache.most + fold:
        advice = f"set rollout.adapter_mode=adapter, which needs {_gib(fold)} less, or {advice}"
    if rest == "never":
        advice += ", or rollout.rest=auto"
    adapters = _sum(held, plan.MASTERS, plan.GRADIENTS, plan.OPTIMIZER, plan.SLOTS, plan.FOLD)
    engine = _sum(held, plan.ENGINE)
    beside = f"the base ({_gib(base)}), adapters ({_gib(adapters)}), vLLM's graphs and buffers ({_gib(engine)})"
    raise UserError(
        f"rollout.memory_fraction asks for {_gib(cache.wanted)} of KV cache: beside {beside} and what training needs "
        f"({training}), at most {_gib(max(cache.most, 0))} of the device's {_gib(total)} are free, and one "
        f"sample takes {_gib(cache.smallest)}; {advice}."
    )


def _sum(held: plan.Memory, *holders: str) -> int:
    return sum(held.row(holder).sampling for holder in holders)


def _two_digits(fraction: float) -> float:
    """Of a positive number the first two digits that count; what is more is cut off, so that it still fits."""
    digits = 1 - math.floor(math.log10(fraction))
    return math.floor(fraction * 10**digits) / 10**digits


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
