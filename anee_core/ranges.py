"""What an argument may be: the range of a number, written once beside its type, and the kind of anything else."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any

from anee_core.errors import AneeError, InputError

MOST = 2**31 - 1
"""Largest number of anything that is counted."""
FINEST, COARSEST = 1e-30, 1e30
"""Smallest and largest positive factor that single precision still works with."""


@dataclass(frozen=True)
class Within:
    """What a number may be, as part of its type: ``Annotated[int, Within(1, MOST)]``.

    Numbers that are not finite lie in no range, and True and False are no numbers.
    """

    least: float
    """Smallest number."""
    most: float
    """Largest number."""
    whole: bool = True
    """Whether it is a whole number."""
    without_least: bool = False
    """Whether ``least`` itself is too small."""
    without_most: bool = False
    """Whether ``most`` itself is too large."""
    told: str = ""
    """What to call such a number in messages; empty for its kind and range."""

    def check(self, name: str, value: Any, error: type[AneeError] = InputError) -> None:
        """Raise ``error`` unless ``value`` is such a number; ``name`` says what it is for."""
        if not self._holds(value):
            got = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:36]}..."
            raise error(f"{name} is {self}; got {got}")

    def _holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number: Any = value
        at_end = (number == self.least and self.without_least) or (number == self.most and self.without_most)
        return bool(self.least <= number <= self.most) and not at_end

    def __str__(self) -> str:
        if self.told:
            return self.told
        kind = "a whole number" if self.whole else "a number"
        least, most = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.least, self.most))
        low = "above" if self.without_least else "at least"
        high = "below" if self.without_most else "at most"
        return f"{kind}, {low} {least} and {high} {most}"


Count = Annotated[int, Within(1, MOST)]
"""How many of something there are, at least one."""
CountOrNone = Annotated[int, Within(0, MOST)]
"""How many of something there are, 0 for none."""
Share = Annotated[float, Within(0, 1, whole=False)]
"""A share or a probability, in [0, 1]."""
SomeShare = Annotated[float, Within(0, 1, whole=False, without_least=True)]
"""A share or a probability, in (0, 1]."""
PartialShare = Annotated[float, Within(0, 1, whole=False, without_least=True, without_most=True)]
"""A share that is neither none nor all, in (0, 1)."""
Factor = Annotated[float, Within(FINEST, COARSEST, whole=False)]
"""A factor or rate above 0."""
Weight = Annotated[float, Within(0, COARSEST, whole=False)]
"""A factor, 0 for none."""
Positive = Annotated[float, Within(0, COARSEST, whole=False, without_least=True)]
"""A number above 0."""
Number = Annotated[float, Within(-COARSEST, COARSEST, whole=False)]
"""Any number that single precision works with."""
Seed = Annotated[int, Within(0, MOST)]
"""A seed that every generator of random numbers takes."""
TorchSeed = Annotated[int, Within(0, 2**64 - 1)]
"""A seed that torch's generators take."""
Size = Annotated[int, Within(1, 2**16)]
"""A batch, a rank: how many there are in memory at once."""
Length = Annotated[int, Within(2, 2**20)]
"""Tokens of a text that is read at once."""


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raise `InputError` unless ``value`` is of one of some kinds; ``wanted`` says which."""
    if not isinstance(value, kinds):
        got = f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {value!r}"
        raise InputError(f"{name} is {wanted}; got {got[:60]}")


def check_flags(**flags: Any) -> None:
    """Raise `InputError` unless all of these are True or False."""
    for name, value in flags.items():
        check_kind(name, value, bool, "True or False")


def check_numbers(made: Any, error: type[AneeError] = InputError, named: str = "") -> None:
    """Raise ``error`` for a field of a dataclass that is out of the range in its type; ``named`` stands before it."""
    kind: type = type(made)
    values = {name: getattr(made, name) for name in ranges_of(kind)}
    check_values(kind, values, lambda name: f"{named}{name}", error)


def check_values(
    kind: type, values: Mapping[str, Any], spelled: Callable[[str], str], error: type[AneeError] = InputError
) -> None:
    """Raise ``error`` for a value that is out of the range of the field that it is for; ``spelled`` names a field."""
    for name, (within, several, optional) in ranges_of(kind).items():
        value = values.get(name)
        if value is None and (optional or name not in values):
            continue
        for number in value if several and isinstance(value, (tuple, list)) else (value,):
            within.check(spelled(name), number, error)


@cache
def ranges_of(kind: type) -> dict[str, tuple[Within, bool, bool]]:
    """Return the range of each field of a dataclass that has one, whether it may be several numbers, and None."""
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except NameError:  # of a plugin's class, which imports some types for type checkers only
        return {}
    found = {}
    for item in dataclasses.fields(kind):
        kinds = _kinds(hints[item.name])
        within = _within(hints[item.name])
        if within is not None:
            several = any(typing.get_origin(each) in (tuple, list) for each in kinds)
            found[item.name] = within, several, type(None) in kinds
    return found


def _within(hint: Any) -> Within | None:
    """Return the range in an annotation, however deep."""
    inside = (_within(part) for part in typing.get_args(hint) if not isinstance(part, Within))
    own = (part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Within))
    return next((each for each in (*own, *inside) if each is not None), None)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the types that an annotation allows."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
