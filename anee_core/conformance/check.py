"""One named check: a function that raises `MismatchError` when a promise is broken."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from anee_core.errors import InputError, suggestion

S = TypeVar("S")

_CORE = Path(__file__).parents[1]


class MismatchError(AssertionError):
    """A promise is broken: what was expected, what was found, and where to look."""

    def __init__(self, expected: str, found: str, look: str) -> None:
        super().__init__(" ".join(f"expected {expected}; found {found}; look at {look}".split()))


@dataclass(frozen=True)
class Check(Generic[S]):
    """A named check of a subject ``S``."""

    name: str
    """Name by which it is reported and chosen."""
    promise: str
    """What holds where the check passes, as a sentence without its capital and full stop."""
    look: str
    """Where a fault that it finds is likely to be."""
    run: Callable[[S], None]
    """The check itself, which raises `MismatchError` where the promise is broken."""
    first: bool = False
    """Whether later checks of a subject make no sense if this one fails."""

    def failure(self, subject: S) -> str | None:
        """Run the check and return one line on what is wrong, or None if nothing is."""
        try:
            self.run(subject)
        except MismatchError as error:
            return str(error)
        except Exception as error:
            kind, text = type(error).__name__, " ".join(str(error).split())
            return f"expected {self.promise}; found {kind}: {text} ({_where(error)}); look at {self.look}"
        return None


def _where(error: Exception) -> str:
    """Return the last line of the traceback, and the last one that is neither ANEE's nor a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and not Path(f.filename).is_relative_to(_CORE)]
    shown = [frames[-1], *own[-1:]] if own and own[-1] is not frames[-1] else frames[-1:]
    return ", from ".join(f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}" for frame in shown)


def check(name: str, look: str, first: bool = False) -> Callable[[Callable[[S], None]], Check[S]]:
    """Turn a function into a `Check`; the first paragraph of its docstring is the promise."""

    def wrap(run: Callable[[S], None]) -> Check[S]:
        promise = " ".join((run.__doc__ or name).split("\n\n")[0].split()).rstrip(".")
        return Check(name, promise[0].lower() + promise[1:], look, run, first)

    return wrap


def named(checks: Sequence[Check[S]], names: Sequence[str] | None) -> tuple[Check[S], ...]:
    """Return the checks with these names; all, if there are none.

    Raises:
        InputError: there is no such check.
    """
    known = {check.name: check for check in checks}
    for name in names or ():
        if name not in known:
            raise InputError(f"there is no check '{name}'; {suggestion(name, known)}")
    return tuple(known[name] for name in names) if names else tuple(checks)


def expect(holds: object, expected: str, found: Any, look: str) -> None:
    """Raise `MismatchError` unless ``holds``."""
    if not holds:
        raise MismatchError(expected, str(found), look)


def expect_same(
    found: Any, expected: Tensor, what: str, look: str, tolerance: tuple[float, float] | None = None
) -> None:
    """Raise `MismatchError` unless two tensors are equal, or close within (absolute, relative) ``tolerance``."""
    expect(isinstance(found, Tensor), f"{what} as a tensor {list(expected.shape)}", f"a {type(found).__name__}", look)
    expect(found.dtype == expected.dtype, f"{what} in {expected.dtype}", found.dtype, look)
    expect(found.shape == expected.shape, f"{what} of shape {list(expected.shape)}", list(found.shape), look)
    if tolerance is None:
        same = torch.equal(found, expected)
    else:
        same = torch.allclose(found.float(), expected.float(), atol=tolerance[0], rtol=tolerance[1], equal_nan=False)
    if same:
        return
    gap = (found.float() - expected.float()).abs()
    at = [int(i) for i in torch.unravel_index(gap.nan_to_num(torch.inf).argmax(), gap.shape)]
    exactly = "bit for bit" if tolerance is None else f"within {tolerance[0]:g} + {tolerance[1]:g} x |value|"
    expect(False, f"{what} {exactly}", f"a difference of {gap[tuple(at)].item():.3g} at {at}", look)
