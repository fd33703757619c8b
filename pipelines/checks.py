"""Checks of dataclasses that a person fills: types, choices and ranges, as their annotations say.

    @dataclass(frozen=True)
    class Options(Checked):
        seed: Annotated[int, at_least(0)] = 0
        views: Literal["rotate4", "plain"] = "rotate4"

`Options(seed=-1)` raises "Options.seed must be at least 0, got -1". Every error is a `ValueError`,
also for a wrong type: programs print it as one line.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import os
from collections.abc import Callable
from dataclasses import fields
from itertools import repeat
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class Must(NamedTuple):
    """A condition on a value, as metadata of `Annotated`."""

    words: str
    """What follows "must" in the error."""
    holds: Callable[[Any], bool]


def at_least(limit: float) -> Must:
    """Return the condition value >= limit."""
    return Must(f"be at least {limit}", lambda value: value >= limit)


def at_most(limit: float) -> Must:
    """Return the condition value <= limit."""
    return Must(f"be at most {limit}", lambda value: value <= limit)


def above(limit: float) -> Must:
    """Return the condition value > limit."""
    return Must(f"be above {limit}", lambda value: value > limit)


def below(limit: float) -> Must:
    """Return the condition value < limit."""
    return Must(f"be below {limit}", lambda value: value < limit)


NOT_EMPTY = Must("not be empty", bool)
EVEN = Must("be even", lambda value: value % 2 == 0)
DISTINCT = Must("not repeat a value", lambda values: len(set(values)) == len(values))
ORDERED = Must("be in ascending order", lambda values: sorted(values) == list(values))

NonEmptyStr = Annotated[str, NOT_EMPTY]
PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
Seed = Annotated[int, at_least(0), at_most(2**63 - 1)]
PositiveFloat = Annotated[float, above(0)]
NonNegativeFloat = Annotated[float, at_least(0)]
Fraction = Annotated[float, above(0), at_most(1)]


class Checked:
    """Base of dataclasses that check their fields when they are built.

    Values are converted where nothing can go wrong: a path to a string, a list to a tuple, a number
    of numpy to Python's. A subclass with a `__post_init__` of its own calls this one first.
    """

    def __post_init__(self) -> None:
        """Check and convert every field.

        Raises:
            ValueError: A value has the wrong type, is none of the choices or is out of range.
        """
        cls: type = type(self)
        for name, hint in _hints(cls):
            value = getattr(self, name)
            checked = check(f"{cls.__name__}.{name}", value, hint)
            if checked is not value:
                object.__setattr__(self, name, checked)  # the dataclass may be frozen


def check(name: str, value: object, hint: Any) -> Any:
    """Return a value as its annotation wants it.

    Args:
        name: Of the field or argument, for the error.
        value: The value.
        hint: A class, or Literal, Annotated, a union or a tuple of them. A string may be given as a
            path. A float may be an int, and stays one. Neither may be a bool, infinite or NaN.

    Raises:
        ValueError: The value has the wrong type, is none of the choices or is out of range.
    """
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        value = check(name, value, args[0])
        conditions = [item for item in args[1:] if isinstance(item, Must)]
        if not all(condition.holds(value) for condition in conditions):
            words = " and ".join(condition.words for condition in conditions)
            raise ValueError(f"{name} must {words.replace(' and be ', ' and ')}, got {value!r}")
        return value
    if kind in (Union, UnionType):
        for arg in args:
            try:
                return check(name, value, arg)
            except MismatchError:
                continue
    elif kind is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif kind is tuple:
        same = args[-1] is ...
        if isinstance(value, (tuple, list)) and (same or len(value) == len(args)):
            pairs = zip(value, repeat(args[0]) if same else args, strict=False)
            return tuple(check(f"{name}[{n}]", item, arg) for n, (item, arg) in enumerate(pairs))
    elif kind is int:
        if not isinstance(value, bool) and isinstance(value, Integral):
            return int(value)
    elif kind is float:
        with contextlib.suppress(OverflowError):  # Of a whole number beyond the largest float.
            if not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value):
                return int(value) if isinstance(value, Integral) else float(value)
    elif kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif isinstance(value, kind):
        return value
    text = f"{name} must be {_describe(hint)}, got {value!r}"
    if kind is Literal and isinstance(value, str):
        close = difflib.get_close_matches(value, args, cutoff=0.7)
        text += f": did you mean {' or '.join(close)}?" if close else ""
    raise MismatchError(text)


class MismatchError(ValueError):
    """A value has the wrong type or is none of the choices; another one of a union may take it."""


_WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    bool: "True or False",
    NoneType: "None",
}


def _describe(hint: Any) -> str:
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        return _describe(args[0])
    if kind is tuple:
        if args[-1] is ...:
            return f"a tuple, each value {_describe(args[0])}"
        return f"a tuple of {len(args)} values, each {_describe(args[0])}"
    if not args:
        return _WORDS.get(kind) or str(kind.__name__)
    words = [str(arg) for arg in args] if kind is Literal else [_describe(arg) for arg in args]
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


@functools.cache
def _hints(cls: type) -> list[tuple[str, Any]]:
    """Return the fields of a dataclass with their annotations."""
    hints = get_type_hints(cls, include_extras=True)
    return [(field.name, hints[field.name]) for field in fields(cls)]
