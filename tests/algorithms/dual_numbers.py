"""Forward-mode derivatives in plain Python: the papers' formulas, written as loops, give exact gradients too."""

import math
from collections.abc import Sequence
from typing import Union

import numpy as np

Number = Union[float, "Dual"]


class Dual:
    """A number and its gradient with respect to all variables."""

    def __init__(self, value: float, grad: np.ndarray) -> None:
        self.value, self.grad = float(value), grad

    def __add__(self, other: Number) -> "Dual":
        return Dual(self.value + sg(other), self.grad + _grad(other))

    def __neg__(self) -> "Dual":
        return Dual(-self.value, -self.grad)

    def __sub__(self, other: Number) -> "Dual":
        return self + (-other)

    def __rsub__(self, other: float) -> "Dual":
        return -self + other

    def __mul__(self, other: Number) -> "Dual":
        return Dual(self.value * sg(other), self.grad * sg(other) + self.value * _grad(other))

    def __truediv__(self, other: Number) -> "Dual":
        return self * (other**-1 if isinstance(other, Dual) else 1 / other)

    def __rtruediv__(self, other: float) -> "Dual":
        return self**-1 * other

    def __pow__(self, power: float) -> "Dual":
        return Dual(self.value**power, power * self.value ** (power - 1) * self.grad)

    def __lt__(self, other: Number) -> bool:
        return self.value < sg(other)

    def __gt__(self, other: Number) -> bool:
        return self.value > sg(other)

    __radd__, __rmul__ = __add__, __mul__


def variables(values: Sequence[float]) -> list[Dual]:
    return [Dual(value, row) for value, row in zip(values, np.eye(len(values)), strict=True)]


def sg(x: Number) -> float:
    """The value without its gradient: the papers' stop-gradient."""
    return x.value if isinstance(x, Dual) else x


def _grad(x: Number) -> np.ndarray | float:
    return x.grad if isinstance(x, Dual) else 0.0


def exp(x: Number) -> Number:
    value = math.exp(sg(x))
    return Dual(value, value * x.grad) if isinstance(x, Dual) else value


def absolute(x: Dual) -> Dual:
    return Dual(abs(x.value), math.copysign(1.0, x.value) * x.grad if x.value else 0 * x.grad)


def clip(x: Number, low: float, high: float) -> Number:
    return low if sg(x) < low else high if sg(x) > high else x


def mean(xs: Sequence[Number]) -> Number:
    return sum(xs[1:], start=xs[0]) / len(xs)
