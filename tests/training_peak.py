"""A training pass at its largest by the formulas of `lorl.plan.footprint`, for tests that hold them to what is seen."""

from lorl.plan.footprint import Pass, head_moment_bytes, kept_bytes, layer_moment_bytes
from lorl.plan.lora import Lora
from lorl.plan.shape import Shape


def training_peak_bytes(shape: Shape, lora: Lora, tokens: int, targets: int, how: Pass, device: str) -> int:
    """The largest that a forward and backward pass over `tokens` packed tokens, `targets` of them sampled, holds beyond
    base and adapter. The head and the worst layer are never at work together."""
    moment = max(layer_moment_bytes(shape, lora, tokens, how), head_moment_bytes(shape, targets, how, device))
    return kept_bytes(shape, lora, tokens, how) + moment
