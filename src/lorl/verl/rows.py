"""What a row of the table says: what becomes of one of verl's keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
OrMinusOne = Annotated[int, Field(ge=-1)]  # verl's "off" or "all"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
AboveZero = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Bound = float | str  # a number, or verl's "lower_upper"
Number = Annotated[float, Field(allow_inf_nan=False)]
Texts = str | list[str]
Mapping = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One of verl's keys. A key that ends in `.*` stands for all below it, and its value is their mapping.

    It sets lorl's keys (`sets`), or is accepted without effect (neither `sets` nor `refused`), or is refused unless its
    value is one of `off`.
    """

    key: str  # as verl 0.9.1 spells it
    type: Any  # annotation that the value is checked against
    default: Any  # verl's; it holds where the command line says nothing
    sets: tuple[str, ...] = ()
    convert: Callable[[Any], Any] | None = None  # from verl's value to lorl's; None: as it is
    joint: bool = False  # what it sets hangs on other keys too: see lorl.verl.objective and placement
    only_given: bool = False  # verl's default does not hold: lorl's does
    refused: bool = False
    off: tuple[Any, ...] = ()
    why: str = ""  # a clause for the log and the documentation
    spellings: tuple[str, ...] = ()  # older ones

    @property
    def prefix(self) -> str | None:
        """`a.b` of a row for `a.b.*`."""
        return self.key.removesuffix(".*") if self.key.endswith(".*") else None


def sets(
    key: str,
    type: Any,
    default: Any,
    *lorl: str,
    convert: Callable[[Any], Any] | None = None,
    only_given: bool = False,
    why: str = "",
    spellings: tuple[str, ...] = (),
) -> Row:
    """A key that sets `lorl` keys by itself."""
    return Row(
        key=key,
        type=type,
        default=default,
        sets=lorl,
        convert=convert,
        only_given=only_given,
        why=why,
        spellings=spellings,
    )


def joins(key: str, type: Any, default: Any, *lorl: str, why: str = "", spellings: tuple[str, ...] = ()) -> Row:
    """A key that sets `lorl` keys, or is checked, together with others (see `lorl.verl.objective` and `placement`)."""
    return Row(key=key, type=type, default=default, sets=lorl, joint=True, why=why, spellings=spellings)


def unused(key: str, type: Any, default: Any, why: str, *, spellings: tuple[str, ...] = ()) -> Row:
    """A key without meaning in lorl, which the log says, with the reason."""
    return Row(key=key, type=type, default=default, why=why, spellings=spellings)


def refused(
    key: str, type: Any, default: Any, why: str, *, off: tuple[Any, ...] | None = None, spellings: tuple[str, ...] = ()
) -> Row:
    """A key that asks for what lorl does not do, unless its value is verl's default (or one of `off`)."""
    off = (default,) if off is None else off
    return Row(key=key, type=type, default=default, refused=True, off=off, why=why, spellings=spellings)


def minus_one_is_off(value: int) -> int | None:
    """verl's -1 (and 0) for "never" or "all"."""
    return value if value > 0 else None
